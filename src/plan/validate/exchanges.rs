//! What ranks exchange: what one sends, another receives; what some do together, all of them do; and all of it comes about.
//!
//! A rank's exchanges have an order, and nobody goes on from one before all who have a part in it are there. So the exchanges of all ranks
//! come about if, and only if, there is an order of all of them with which that of every rank agrees. The ranks are run here to see: those
//! that have come to the same exchange go on; which ones go first makes no difference, because who is at one has a part in no other.

use crate::plan::{Bucket, Collective, CollectiveKind, Manifest, Step, meeting};

/// Checks a bucket's exchanges.
pub(super) fn check(manifest: &Manifest, bucket: usize) -> Result<(), String> {
    let mut ranks: Vec<Exchanges> = manifest.ranks.iter().map(|rank| Exchanges::of(&rank.buckets[bucket])).collect();
    loop {
        let next = |rank: usize| ranks.get(rank).and_then(Exchanges::next);
        let Some(together) = (0..ranks.len()).find_map(|rank| meeting(rank, |other| Some(next(other)?.1))) else {
            break;
        };
        for &other in &together[1..] {
            if let (Some(expected), Some(found)) = (next(together[0]), next(other)) {
                agree((together[0], expected), (other, found))?;
            }
        }
        together.into_iter().for_each(|rank| ranks[rank].done += 1);
    }
    let waiting: Vec<String> = ranks.iter().enumerate().filter_map(|(rank, own)| own.waits(rank)).collect();
    if waiting.is_empty() {
        return Ok(());
    }
    Err(format!(
        "expected an order of all exchanges that every rank's agrees with, found ranks that wait for ever: {}",
        waiting.join("; ")
    ))
}

/// Checks that two ranks exchange the same parts, and, what they do together, in steps of one name: the same layer's.
fn agree(
    (first, (expected, theirs)): (usize, (&Step, &Collective)),
    (rank, (found, own)): (usize, (&Step, &Collective)),
) -> Result<(), String> {
    let (expected_name, expected_parts, name, parts) = (&expected.name, &theirs.parts, &found.name, &own.parts);
    let together = theirs.kind.peer().is_none();
    if expected_parts == parts && (!together || expected_name == name) {
        return Ok(());
    }
    let expected = match together {
        true => format!("{expected_name} of {expected_parts:?}, as on rank {first}"),
        false => format!("to receive {expected_parts:?}, as rank {first} sends in step {expected_name}"),
    };
    Err(format!("rank {rank}, step {name}: expected {expected}, found {parts:?}"))
}

/// A rank's exchanges in their order.
struct Exchanges<'a> {
    list: Vec<(&'a Step, &'a Collective)>,
    /// How many have come about.
    done: usize,
}

impl<'a> Exchanges<'a> {
    fn of(bucket: &'a Bucket) -> Self {
        let list = bucket.steps.iter().filter_map(|step| Some((step, step.collective.as_ref()?)));
        Exchanges { list: list.collect(), done: 0 }
    }

    fn next(&self) -> Option<(&'a Step, &'a Collective)> {
        self.list.get(self.done).copied()
    }

    /// What the rank waits for, in words.
    fn waits(&self, rank: usize) -> Option<String> {
        let (step, collective) = self.next()?;
        let what = match collective.kind {
            CollectiveKind::Send(to) => format!("to send to rank {to}"),
            CollectiveKind::Receive(from) => format!("to receive of rank {from}"),
            CollectiveKind::AllGather | CollectiveKind::AllToAll => {
                let members = collective.members(rank);
                format!("for ranks {} to {}", members.start, members.end - 1)
            }
        };
        Some(format!("rank {rank} in step {} {what}", step.name))
    }
}
