//! A group whose ranks are threads of one process.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};

use super::{Group, block};

/// One of the ranks. When it is dropped, the others' calls fail instead of waiting for it.
pub struct LocalGroup {
    rank: usize,
    size: usize,
    meeting: Arc<Meeting>,
}

/// Where ranks meet, once for each call.
#[derive(Default)]
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What has been sent in the call at hand, by rank.
    sent: Vec<Option<Vec<u8>>>,
    /// What all sent in the last call that is complete. The next is not before every rank has taken this.
    complete: Arc<Vec<Vec<u8>>>,
    /// Calls that are complete.
    calls: u64,
    /// What is on its way, by (from, to), in the order in which it was sent.
    mail: HashMap<(usize, usize), VecDeque<Vec<u8>>>,
    /// The ranks that are no more, in the order in which they went.
    gone: Vec<usize>,
}

fn has_ended<V>(rank: usize) -> Result<V> {
    bail!("rank {rank} of the group has ended before the work was done")
}

impl LocalGroup {
    /// So many ranks, by number.
    pub fn new(size: usize) -> Vec<LocalGroup> {
        let state = Mutex::new(State { sent: vec![None; size], ..State::default() });
        let meeting = Arc::new(Meeting { state, changed: Condvar::new() });
        (0..size).map(|rank| LocalGroup { rank, size, meeting: Arc::clone(&meeting) }).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.meeting.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all ranks have sent something: what each did.
    fn meet(&mut self, sent: &[u8]) -> Result<Arc<Vec<Vec<u8>>>> {
        let mut state = self.state();
        let before = state.calls;
        state.sent[self.rank] = Some(sent.to_vec());
        if state.sent.iter().all(Option::is_some) {
            state.complete = Arc::new(state.sent.iter_mut().filter_map(Option::take).collect());
            state.calls += 1;
            self.meeting.changed.notify_all();
        }
        while state.calls == before {
            if let Some(&gone) = state.gone.first() {
                return has_ended(gone);
            }
            state = self.meeting.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(Arc::clone(&state.complete))
    }

    /// Receives from each rank the part of what it sent that `part` gives of so many bytes.
    fn take<'a>(
        all: &'a [Vec<u8>],
        expected: usize,
        received: &mut [u8],
        part: impl Fn(&'a [u8]) -> &'a [u8],
    ) -> Result<()> {
        let each = received.len() / all.len();
        ensure!(
            each * all.len() == received.len(),
            "expected room for {} equal parts, found {}",
            all.len(),
            received.len()
        );
        for (rank, (sent, place)) in all.iter().zip(received.chunks_mut(each.max(1))).enumerate() {
            ensure!(sent.len() == expected, "rank {rank}: expected {expected} bytes, found {}", sent.len());
            place.copy_from_slice(part(sent));
        }
        Ok(())
    }
}

impl Group for LocalGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        ensure!(
            received.len() == self.size * sent.len(),
            "expected room for {} of each, found {}",
            self.size,
            received.len()
        );
        let all = self.meet(sent)?;
        LocalGroup::take(&all, sent.len(), received, |sent| sent)
    }

    fn all_to_all(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        ensure!(received.len() == sent.len(), "expected room for {} bytes, found {}", sent.len(), received.len());
        let all = self.meet(sent)?;
        LocalGroup::take(&all, sent.len(), received, |sent| block(sent, self.rank, self.size))
    }

    fn send(&mut self, to: usize, sent: &[u8]) -> Result<()> {
        ensure!(to < self.size, "expected one of {} ranks, found {to}", self.size);
        let mut state = self.state();
        if state.gone.contains(&to) {
            return has_ended(to);
        }
        state.mail.entry((self.rank, to)).or_default().push_back(sent.to_vec());
        self.meeting.changed.notify_all();
        Ok(())
    }

    fn receive(&mut self, from: usize, received: &mut [u8]) -> Result<()> {
        let mut state = self.state();
        loop {
            // What it sent last may still be there when it has ended.
            if let Some(sent) = state.mail.get_mut(&(from, self.rank)).and_then(VecDeque::pop_front) {
                let (expected, found) = (received.len(), sent.len());
                ensure!(found == expected, "rank {from}: expected {expected} bytes, found {found}");
                received.copy_from_slice(&sent);
                return Ok(());
            }
            if state.gone.contains(&from) {
                return has_ended(from);
            }
            state = self.meeting.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for LocalGroup {
    fn drop(&mut self) {
        let rank = self.rank;
        self.state().gone.push(rank);
        self.meeting.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_ranks<R: Send>(size: usize, run: impl Fn(LocalGroup) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let run = &run;
            let ranks = LocalGroup::new(size).into_iter().map(|group| scope.spawn(move || run(group)));
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect()
        })
    }

    #[test]
    fn ranks_exchange_in_their_order_as_often_as_they_like() {
        for size in [1, 2, 5] {
            let found = on_ranks(size, |mut group| {
                for round in 0..100u8 {
                    let me = group.rank() as u8;
                    let mut gathered = vec![0; 2 * size];
                    group.all_gather(&[me, round], &mut gathered).expect("all are there");
                    let expected: Vec<u8> = (0..size as u8).flat_map(|rank| [rank, round]).collect();
                    assert_eq!(gathered, expected);
                    let sent: Vec<u8> = (0..size as u8).map(|to| 16 * me + to + round % 2).collect();
                    let mut own = vec![0; size];
                    group.all_to_all(&sent, &mut own).expect("all are there");
                    assert_eq!(own, (0..size as u8).map(|from| 16 * from + me + round % 2).collect::<Vec<_>>());
                }
                group.rank()
            });
            assert_eq!(found, (0..size).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_one_sends_another_receives_in_order() {
        let found = on_ranks(3, |mut group| {
            let (me, mut last) = (group.rank(), [0; 2]);
            for round in 0..100u8 {
                // Around in a circle, twice.
                group.send((me + 1) % 3, &[me as u8, round]).expect("it is there");
                group.send((me + 1) % 3, &[me as u8 + 10, round]).expect("it is there");
                let from = (me + 2) % 3;
                for number in [from, from + 10] {
                    group.receive(from, &mut last).expect("it is sent");
                    assert_eq!(last, [number as u8, round]);
                }
            }
            if me == 0 {
                return String::new();
            }
            group.receive(me - 1, &mut last).expect_err("nothing is left").to_string()
        });
        let ended = |rank: usize| format!("rank {rank} of the group has ended before the work was done");
        assert_eq!(found, [String::new(), ended(0), ended(1)]);
    }

    #[test]
    fn nobody_waits_for_a_rank_that_has_ended() {
        let found = on_ranks(3, |mut group| {
            if group.rank() == 1 {
                return String::new();
            }
            group.all_gather(&[0], &mut [0; 3]).expect_err("one is missing").to_string()
        });
        assert!(found[0] == found[2] && found[0].starts_with("rank ") && found[1].is_empty(), "{found:?}");
    }

    #[test]
    fn sizes_that_differ_are_told() {
        let found = on_ranks(2, |mut group| {
            let sent = vec![0; 1 + group.rank()];
            group.all_gather(&sent, &mut vec![0; 2 * sent.len()]).expect_err("they differ").to_string()
        });
        assert_eq!(found, ["rank 1: expected 1 bytes, found 2", "rank 0: expected 2 bytes, found 1"]);
    }
}
