//! What a pass may know beside the graph.

use crate::ir::Extents;

/// What the plan is lowered for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// The CPU executor.
    Cpu,
    /// NVIDIA Hopper.
    Sm90a,
}

/// What a bucket is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Rows of prompts.
    Prefill,
    /// One row a sequence.
    Decode,
    /// A graph whose dimensions are constants.
    Fixed,
}

/// A bucket to compile for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BucketSpec {
    /// Phase.
    pub phase: Phase,
    /// Sizes of the symbols.
    pub extents: Extents,
}

impl BucketSpec {
    /// `prefill_512`, `decode_8`, `fixed_1`.
    pub fn name(&self) -> String {
        match self.phase {
            Phase::Prefill => format!("prefill_{}", self.extents.tokens),
            Phase::Decode => format!("decode_{}", self.extents.tokens),
            Phase::Fixed => format!("fixed_{}", self.extents.tokens),
        }
    }
}

/// What a pass may know beside the graph.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PassContext {
    /// What the plan is lowered for.
    pub target: Target,
    /// The bucket; passes before the per-bucket ones must not look at it.
    pub bucket: BucketSpec,
    /// The experts of the rank that is compiled for, if they are spread over several.
    pub experts: Option<ExpertShare>,
}

/// What one rank has of the experts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExpertShare {
    /// Ranks that the experts are spread over.
    pub ranks: u64,
    /// All experts.
    pub of: u64,
    /// Those of this rank, ascending.
    pub local: Vec<u64>,
    /// For each of these, how many ranks have it; empty if no other has any of them.
    pub copies: Vec<u64>,
    /// For each, which of those ranks this is, counted from 0; empty as `copies` is.
    pub copy: Vec<u64>,
}

impl ExpertShare {
    /// That of a rank, where each has these, ascending, and all together have all.
    pub fn of_rank(experts: &[Vec<u64>], rank: usize) -> ExpertShare {
        let local = experts[rank].clone();
        let on = |ranks: &[Vec<u64>], expert| ranks.iter().filter(|local| local.contains(expert)).count() as u64;
        let mut copies: Vec<u64> = local.iter().map(|expert| on(experts, expert)).collect();
        let mut copy: Vec<u64> = local.iter().map(|expert| on(&experts[..rank], expert)).collect();
        if copies.iter().all(|&copies| copies == 1) {
            (copies, copy) = (vec![], vec![]);
        }
        let of = experts.iter().flatten().max().map_or(0, |last| last + 1);
        ExpertShare { ranks: experts.len() as u64, of, local, copies, copy }
    }
}
