//! Steps that the ranks of a group run together.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::plan::{DType, Op, Semantic, TensorType};

/// What ranks exchange in a step. Parts are the step's reads (but for a link) and writes in their order, each dense and of one element type: a
/// library's call for each, all of them one group of calls. What ranks do together, all of them have; what one sends to another, that one
/// receives; and there is an order of all exchanges which that of every rank agrees with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collective {
    /// Who sends what to whom.
    pub kind: CollectiveKind,
    /// Ranks that take part, or that the two are among: `size` neighbours of the plan's, this one with them, of which the first has a multiple
    /// of `size` as its number.
    pub size: u64,
    /// Element type of each part, and how many elements a rank sends to each other rank, or receives of the one that sends.
    pub parts: Vec<(DType, u64)>,
}

/// Who sends what to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CollectiveKind {
    /// Each rank sends the same to all; what is written is what each sent, in the order of the ranks.
    AllGather,
    /// Each rank sends block i of what it reads to rank i; what is written is what each sent, in the order of the ranks.
    AllToAll,
    /// This rank sends all parts to the one of that number among these.
    Send(u64),
    /// This rank receives all parts from the one of that number among these.
    Receive(u64),
}

impl CollectiveKind {
    /// Of an operator that ranks compute together, and how many ranks do; none of one that each computes alone.
    pub fn of(op: &Op) -> Option<(CollectiveKind, u64)> {
        match *op {
            Op::AllGather { ranks } => Some((CollectiveKind::AllGather, ranks)),
            Op::AllToAll { ranks } => Some((CollectiveKind::AllToAll, ranks)),
            Op::Send { to, ranks } => Some((CollectiveKind::Send(to), ranks)),
            Op::Receive { from, ranks } => Some((CollectiveKind::Receive(from), ranks)),
            _ => None,
        }
    }

    /// The other rank, where two exchange.
    pub fn peer(self) -> Option<u64> {
        match self {
            CollectiveKind::Send(peer) | CollectiveKind::Receive(peer) => Some(peer),
            CollectiveKind::AllGather | CollectiveKind::AllToAll => None,
        }
    }

    /// The first of a step's reads that is a part: a link goes before.
    pub fn first_read(self) -> usize {
        usize::from(self.peer().is_some())
    }
}

impl Collective {
    /// What a step with that semantic exchanges; none if ranks compute it alone.
    pub fn of(semantic: &Semantic) -> Option<Collective> {
        let [instr] = &semantic.body[..] else { return None };
        let (kind, size) = CollectiveKind::of(&instr.0)?;
        let blocks = if kind == CollectiveKind::AllToAll { size.max(1) } else { 1 };
        let part = |ty: &TensorType| (ty.0, ty.elements().unwrap_or(0) / blocks);
        let parts = match kind {
            CollectiveKind::Receive(_) => &semantic.outputs[..],
            _ => semantic.inputs.get(kind.first_read()..).unwrap_or_default(),
        };
        Some(Collective { kind, size, parts: parts.iter().map(part).collect() })
    }

    /// The ranks among which a rank of that number exchanges.
    pub fn members(&self, rank: usize) -> Range<usize> {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX).max(1);
        let first = rank / size * size;
        first..first.saturating_add(size)
    }

    /// How many times as much as a step reads of a part it writes.
    pub fn growth(&self) -> usize {
        match self.kind {
            CollectiveKind::AllGather => self.size as usize,
            CollectiveKind::AllToAll | CollectiveKind::Send(_) | CollectiveKind::Receive(_) => 1,
        }
    }

    /// Bytes that a rank sends to each other rank.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (dtype, count)| sum.saturating_add(count.saturating_mul(dtype.bytes())))
    }
}

/// The ranks that have a part in what a rank has come to, if all of them have come to it, by what each has come to; the one that sends is the
/// first.
pub fn meeting<'a>(rank: usize, next: impl Fn(usize) -> Option<&'a Collective>) -> Option<Vec<usize>> {
    let own = next(rank)?;
    let comes_to = |other: usize, kind| next(other).is_some_and(|found| (found.kind, found.size) == (kind, own.size));
    match own.kind {
        CollectiveKind::Send(to) => {
            let to = usize::try_from(to).ok()?;
            comes_to(to, CollectiveKind::Receive(rank as u64)).then(|| vec![rank, to])
        }
        CollectiveKind::Receive(_) => None,
        kind => own.members(rank).all(|other| comes_to(other, kind)).then(|| own.members(rank).collect()),
    }
}
