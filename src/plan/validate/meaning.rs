//! What integers stand for. An index is used only as what it was made for, and below the size it indexes, so that no
//! mixed-up operand sends a kernel out of its bounds.

use std::fmt;

use super::payload::{pages, rows};
use crate::plan::{DType, Limits, Op, TensorType};

/// What the elements of an integer tensor are. All may also be negative, which means none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Meaning {
    pub(super) kind: Kind,
    /// The elements are below this; an [`Kind::Offset`] is at most this.
    pub(super) below: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Token,
    Position,
    Slot,
    Row,
    Expert,
    Pair,
    Place,
    Offset,
    Page,
}

impl Meaning {
    pub(super) fn new(kind: Kind, below: u64) -> Self {
        Meaning { kind, below }
    }

    /// The same of integers that another rank has sent: what its plan's limits bound, which are this rank's too.
    pub(super) fn within(self, limits: &Limits) -> Self {
        let below = match self.kind {
            Kind::Position => limits.max_context,
            Kind::Slot => limits.max_sequences,
            Kind::Page => limits.pages(),
            _ => self.below,
        };
        Meaning { below: self.below.min(below), ..self }
    }

    /// True if these can stand where `required` is expected.
    pub(super) fn serves(self, required: Meaning) -> bool {
        self.kind == required.kind && self.below <= required.below
    }
}

impl fmt::Display for Meaning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.kind)?;
        if self.below < u64::MAX { write!(f, " below {}", self.below) } else { Ok(()) }
    }
}

const ANY: u64 = u64::MAX;

/// What an operator expects of its integer arguments, by position; its shapes hold.
pub(super) fn required(op: &Op, arguments: &[&TensorType]) -> Vec<(usize, Meaning)> {
    let dim =
        |argument: usize, axis: usize| arguments.get(argument).and_then(|ty| ty.1.get(axis)).copied().unwrap_or(0);
    let new = Meaning::new;
    match op {
        Op::Embed => vec![(0, new(Kind::Token, dim(1, 0)))],
        Op::Conv1dCausal => vec![(3, new(Kind::Position, ANY)), (4, new(Kind::Slot, dim(2, 0)))],
        Op::Rope { .. } => vec![(1, new(Kind::Position, ANY))],
        Op::KvWrite | Op::Attention { .. } => {
            let (kv, table) = if *op == Op::KvWrite { (2, 3) } else { (1, 2) };
            let positions = dim(table, 1).saturating_mul(dim(kv, 3));
            vec![(table + 1, new(Kind::Position, positions)), (table + 2, new(Kind::Slot, dim(table, 0)))]
        }
        Op::TopK => vec![(1, new(Kind::Slot, ANY))],
        Op::GatherRows => vec![(1, new(Kind::Row, dim(0, 0)))],
        Op::GatherColumns => vec![(1, new(Kind::Expert, dim(0, 1)))],
        Op::ExpertMatmul => vec![(2, new(Kind::Expert, dim(1, 0)))],
        Op::WeightedSum => vec![(2, new(Kind::Expert, ANY))],
        Op::GatherPairs { k } => vec![(1, new(Kind::Pair, dim(0, 0).saturating_mul(*k)))],
        Op::GroupedMatmulGather { k } => {
            let pairs = dim(0, 0).saturating_mul(*k);
            vec![(2, new(Kind::Pair, pairs)), (3, new(Kind::Offset, pairs))]
        }
        Op::GroupedMatmul => vec![(2, new(Kind::Offset, dim(0, 0)))],
        Op::GroupedWeightedSum => vec![(2, new(Kind::Place, dim(0, 0)))],
        Op::Sample => {
            vec![(1, new(Kind::Row, dim(2, 0))), (2, new(Kind::Position, ANY)), (3, new(Kind::Slot, dim(4, 0)))]
        }
        Op::LocalExperts { of, .. } => vec![(0, new(Kind::Expert, *of))],
        // Experts mean the same on every rank; rows, slots and what is derived of them do not.
        Op::AllGather { .. } => {
            let integers = arguments.iter().enumerate().filter(|(_, ty)| ty.0 == DType::I32);
            integers.map(|(i, _)| (i, new(Kind::Expert, ANY))).collect()
        }
        // Where two ranks exchange, integers say which of the sender's rows, slots and pages there are, and are used as that alone.
        Op::Send { .. } => rows(arguments, 1)
            .map(|(pos, slot)| vec![(pos, new(Kind::Position, ANY)), (slot, new(Kind::Slot, ANY))])
            .unwrap_or_default(),
        Op::Receive { .. } => vec![],
        Op::AllToAll { .. } | Op::BlockSum { .. } => vec![],
        Op::GroupRows | Op::RmsNorm { .. } | Op::Matmul | Op::Split { .. } | Op::Pointwise(_) | Op::RowSum => vec![],
    }
}

/// What an operator expects of its integer arguments because of its results.
pub(super) fn required_by_results(op: &Op, results: &[&TensorType]) -> Vec<(usize, Meaning)> {
    match (op, results) {
        (Op::GroupRows, [_, _, offsets]) => {
            vec![(0, Meaning::new(Kind::Expert, offsets.1.first().map_or(0, |count| count - 1)))]
        }
        _ => vec![],
    }
}

/// What an operator's integer results are, by position; its shapes hold. Positions, slots and pages of another rank have no bound but the
/// plan's limits, which are all ranks'.
pub(super) fn given(op: &Op, arguments: &[&TensorType], results: &[&TensorType]) -> Vec<(usize, Meaning)> {
    let new = Meaning::new;
    if let Op::Receive { .. } = op {
        let rows = rows(results, 0).map(|(pos, slot)| [(pos, Kind::Position), (slot, Kind::Slot)]);
        let pages = pages(results).map(|at| (at, Kind::Page));
        return rows.into_iter().flatten().chain(pages).map(|(at, kind)| (at, new(kind, ANY))).collect();
    }
    let Some(first) = arguments.first() else { return vec![] };
    match op {
        Op::TopK => vec![(0, new(Kind::Expert, first.1.last().copied().unwrap_or(0)))],
        Op::LocalExperts { experts, .. } => vec![(0, new(Kind::Expert, experts.len() as u64))],
        Op::GroupRows => {
            let pairs = first.elements().unwrap_or(u64::MAX);
            vec![(0, new(Kind::Pair, pairs)), (1, new(Kind::Place, pairs)), (2, new(Kind::Offset, pairs))]
        }
        Op::Sample => vec![(0, new(Kind::Token, first.1.last().copied().unwrap_or(0)))],
        _ => vec![],
    }
}
