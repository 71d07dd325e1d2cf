//! Steps that the ranks of a group run together.

use serde::{Deserialize, Serialize};

use crate::plan::{DType, Op, Semantic, TensorType};

/// What ranks exchange in a step. Parts are the step's reads and writes in their order, each read dense and of one element type: a library's
/// call for each, all of them one group of calls. Every rank of the group has the same collectives in the same order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collective {
    /// Who sends what to whom.
    pub kind: CollectiveKind,
    /// Ranks of the group: `size` neighbours among all, of which the first has a multiple of `size` as its number.
    pub size: u64,
    /// Element type of each part, and how many elements a rank sends to each other rank.
    pub parts: Vec<(DType, u64)>,
}

/// Who sends what to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CollectiveKind {
    /// Each rank sends the same to all; what is written is what each sent, in the order of the ranks.
    AllGather,
    /// Each rank sends block i of what it reads to rank i; what is written is what each sent, in the order of the ranks.
    AllToAll,
}

impl CollectiveKind {
    /// Of an operator that ranks compute together, and how many ranks do; none of one that each computes alone.
    pub fn of(op: &Op) -> Option<(CollectiveKind, u64)> {
        match *op {
            Op::AllGather { ranks } => Some((CollectiveKind::AllGather, ranks)),
            Op::AllToAll { ranks } => Some((CollectiveKind::AllToAll, ranks)),
            _ => None,
        }
    }
}

impl Collective {
    /// What a step with that semantic exchanges; none if ranks compute it alone.
    pub fn of(semantic: &Semantic) -> Option<Collective> {
        let [instr] = &semantic.body[..] else { return None };
        let (kind, size) = CollectiveKind::of(&instr.0)?;
        let blocks = if kind == CollectiveKind::AllToAll { size.max(1) } else { 1 };
        let part = |ty: &TensorType| (ty.0, ty.elements().unwrap_or(0) / blocks);
        Some(Collective { kind, size, parts: semantic.inputs.iter().map(part).collect() })
    }

    /// How many times as much as a step reads of a part it writes.
    pub fn growth(&self) -> usize {
        match self.kind {
            CollectiveKind::AllGather => self.size as usize,
            CollectiveKind::AllToAll => 1,
        }
    }

    /// Bytes that a rank sends to each other rank.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (dtype, count)| sum.saturating_add(count.saturating_mul(dtype.bytes())))
    }
}
