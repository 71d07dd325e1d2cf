//! Exchanges between two ranks: what one sends, the other receives, and all of them come about.
//!
//! A rank's exchanges have an order, and neither end of one goes on before both are there. So the exchanges of all ranks come about if, and
//! only if, there is an order of all of them with which that of every rank agrees. The ranks are run here to see: whichever two have come to
//! the two ends of one exchange go on; which ones go first makes no difference, because an end never belongs to another exchange.

use crate::plan::{Bucket, Collective, CollectiveKind, Manifest, Step};

/// Checks a bucket's exchanges, all of which are between two ranks.
pub(super) fn check(manifest: &Manifest, bucket: usize) -> Result<(), String> {
    let mut ranks: Vec<Exchanges> = manifest.ranks.iter().map(|rank| Exchanges::of(&rank.buckets[bucket])).collect();
    loop {
        let meeting = (0..ranks.len()).find_map(|rank| Some((rank, sends_to(&ranks, rank)?)));
        let Some((from, to)) = meeting else { break };
        let (sent, received) = (ranks[from].next(), ranks[to].next());
        if let (Some((sending, sent)), Some((receiving, received))) = (sent, received)
            && sent.parts != received.parts
        {
            return Err(format!(
                "rank {to}, step {}: expected to receive {:?}, as rank {from} sends in step {}, found {:?}",
                receiving.name, sent.parts, sending.name, received.parts
            ));
        }
        ranks[from].done += 1;
        ranks[to].done += 1;
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

/// The rank that waits for what a rank sends next.
fn sends_to(ranks: &[Exchanges], rank: usize) -> Option<usize> {
    let CollectiveKind::Send(to) = ranks[rank].next()?.1.kind else { return None };
    let to = usize::try_from(to).ok()?;
    let (_, next) = ranks.get(to)?.next()?;
    (next.kind == CollectiveKind::Receive(rank as u64)).then_some(to)
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
            CollectiveKind::AllGather | CollectiveKind::AllToAll => "for all ranks".to_owned(),
        };
        Some(format!("rank {rank} in step {} {what}", step.name))
    }
}
