//! A group whose ranks are threads of one process.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};

use super::{Group, block};

/// One of the ranks. When it is dropped, the others' calls fail instead of waiting for it.
pub struct LocalGroup {
    rank: usize,
    size: usize,
    /// How often this rank has split it.
    splits: usize,
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
    /// The groups that this one was split into, each time.
    parts: Vec<Vec<Arc<Meeting>>>,
}

impl Meeting {
    fn new(size: usize) -> Arc<Meeting> {
        let state = Mutex::new(State { sent: vec![None; size], ..State::default() });
        Arc::new(Meeting { state, changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has nobody wait for a rank any more, nor in any group that it is in as part of this one.
    fn leave(&self, rank: usize) {
        let mut state = self.state();
        let size = state.sent.len();
        for parts in &state.parts {
            let each = size / parts.len();
            parts[rank / each].leave(rank % each);
        }
        state.gone.push(rank);
        self.changed.notify_all();
    }
}

fn has_ended<V>(rank: usize) -> Result<V> {
    bail!("rank {rank} of the group has ended before the work was done")
}

impl LocalGroup {
    /// So many ranks, by number.
    pub fn new(size: usize) -> Vec<LocalGroup> {
        let meeting = Meeting::new(size);
        (0..size).map(|rank| LocalGroup { rank, size, splits: 0, meeting: Arc::clone(&meeting) }).collect()
    }

    /// Waits until all ranks have sent something: what each did.
    fn meet(&mut self, sent: &[u8]) -> Result<Arc<Vec<Vec<u8>>>> {
        let mut state = self.meeting.state();
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
        let mut state = self.meeting.state();
        if state.gone.contains(&to) {
            return has_ended(to);
        }
        state.mail.entry((self.rank, to)).or_default().push_back(sent.to_vec());
        self.meeting.changed.notify_all();
        Ok(())
    }

    fn receive(&mut self, from: usize, received: &mut [u8]) -> Result<()> {
        let mut state = self.meeting.state();
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

    fn split(&mut self, size: usize) -> Result<Box<dyn Group>> {
        ensure!(size > 0 && self.size.is_multiple_of(size), "expected a divisor of {} ranks, found {size}", self.size);
        let mut state = self.meeting.state();
        if state.parts.len() == self.splits {
            let parts: Vec<Arc<Meeting>> = (0..self.size / size).map(|_| Meeting::new(size)).collect();
            state.gone.iter().for_each(|&gone| parts[gone / size].leave(gone % size));
            state.parts.push(parts);
        }
        let parts = &state.parts[self.splits];
        ensure!(parts.len() == self.size / size, "expected groups of {}, found {size}", self.size / parts.len());
        let meeting = Arc::clone(&parts[self.rank / size]);
        drop(state);
        self.splits += 1;
        Ok(Box::new(LocalGroup { rank: self.rank % size, size, splits: 0, meeting }))
    }
}

impl Drop for LocalGroup {
    fn drop(&mut self) {
        self.meeting.leave(self.rank);
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
    fn groups_are_split_into_neighbours() {
        let found = on_ranks(6, |mut group| {
            let me = group.rank();
            let (mut pair, mut half) = (group.split(2).expect("three pairs"), group.split(3).expect("two halves"));
            assert_eq!([(pair.rank(), pair.size()), (half.rank(), half.size())], [(me % 2, 2), (me % 3, 3)]);
            for round in 0..50u8 {
                let mut found = [0; 6];
                half.all_gather(&[me as u8 + round], &mut found[..3]).expect("all are there");
                group.all_gather(&[me as u8], &mut found).expect("all are there");
                assert_eq!(found, [0, 1, 2, 3, 4, 5]);
                pair.all_gather(&[me as u8 + round], &mut found[..2]).expect("both are there");
                let first = (me / 2 * 2) as u8 + round;
                assert_eq!(found[..2], [first, first + 1]);
            }
            if me == 4 {
                return String::new();
            }
            pair.all_gather(&[0], &mut [0; 2]).err().map_or("it is there".into(), |error| error.to_string())
        });
        let both = "it is there".to_owned();
        let ended = "rank 0 of the group has ended before the work was done".to_owned();
        assert_eq!(found, [both.clone(), both.clone(), both.clone(), both, String::new(), ended]);
        let [mut first, second] = LocalGroup::new(2).try_into().ok().expect("two");
        drop(second);
        let mut both = first.split(2).expect("it is one group");
        assert!(both.all_gather(&[0], &mut [0; 2]).is_err(), "one had left before");
        assert!(first.split(3).err().expect("of two").to_string().contains("expected a divisor of 2 ranks"));
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
