//! What a pass may know beside the graph.

use std::collections::BTreeMap;
use std::ops::Range;

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
    /// The layers of the rank that is compiled for, if they are spread over several.
    pub layers: Option<LayerShare>,
}

/// What one rank has of the layers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerShare {
    /// The rank's number in its group.
    pub rank: usize,
    /// Ranks that have a stage, neighbours by number: the first so many have the first.
    pub width: usize,
    /// The layers of each stage: all layers in order.
    pub stages: Vec<Range<u64>>,
}

impl LayerShare {
    /// The number of the rank's stage.
    pub fn stage(&self) -> usize {
        self.rank / self.width
    }

    /// The stage that a layer is in.
    pub fn stage_of(&self, layer: u64) -> Option<usize> {
        self.stages.iter().position(|stage| stage.contains(&layer))
    }
}

/// What one rank has of the experts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExpertShare {
    /// Ranks that the experts are spread over, neighbours by number: those of a stage, where layers are spread as well.
    pub ranks: u64,
    /// All experts.
    pub of: u64,
    /// Those of this rank, ascending.
    pub local: Vec<u64>,
    /// For operators of a scope: for each of these, the turns that this rank runs it at, from the first number on, up to the second, without
    /// that. Of other scopes it runs them at all, so none of them is on another rank.
    pub parts: BTreeMap<String, Vec<(u64, u64)>>,
}
