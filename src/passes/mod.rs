//! The pipeline: rewrites of the graph, in one table, applied by one driver. Uses only the graph.

mod canonicalize;
pub mod context;
mod cse;
mod dce;
pub mod driver;
mod expert_parallel;
mod fuse_attention;
mod fuse_combine_norm;
mod fuse_norm_matmul;
mod fuse_pointwise;
mod fuse_residual;
mod fuse_shortconv;
mod fuse_swiglu;
mod group_experts;
mod layout_weights;
mod merge_projections;
mod order;
mod patch;
pub(crate) mod pipeline_parallel;
pub mod plan_memory;
pub mod schedule;
pub mod tactics;
mod view;
mod weights;

pub use context::{BucketSpec, ExpertShare, LayerShare, PassContext, Phase, Target};
pub use driver::{Driver, PassError, PassReport};
pub use patch::{Patch, Rewrite};
pub use plan_memory::{PlacedBuffer, Placement, place_apart, plan_memory};
pub use schedule::{Schedule, ScheduledStep, Storage, schedule, schedule_in_sequence, storage};

/// When a pass runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Once, before the graph is compiled for its buckets; must not look at the bucket.
    Once,
    /// For each bucket, on that bucket's copy of the graph.
    PerBucket,
}

/// A line of the pipeline.
pub struct Pass {
    /// What the command line calls it.
    pub name: &'static str,
    /// What it does, in a few words.
    pub summary: &'static str,
    /// When it runs.
    pub stage: Stage,
    /// What it does, in full.
    pub rewrite: &'static dyn Rewrite,
}

impl Pass {
    const fn once(name: &'static str, summary: &'static str, rewrite: &'static dyn Rewrite) -> Pass {
        Pass { name, summary, stage: Stage::Once, rewrite }
    }

    const fn per_bucket(name: &'static str, summary: &'static str, rewrite: &'static dyn Rewrite) -> Pass {
        Pass { name, summary, stage: Stage::PerBucket, rewrite }
    }
}

/// Every pass, in the order in which they run. Each of them may be left out: the graph keeps its meaning.
#[rustfmt::skip]
pub static PIPELINE: &[Pass] = &[
    Pass::once("canonicalize", "one spelling for one thing", &canonicalize::Canonicalize),
    Pass::once("cse", "equal operators as one", &cse::Cse),
    Pass::once("dce", "removes what nothing uses", &dce::Dce),
    Pass::once("merge-projections", "matmuls of one input as one matmul", &merge_projections::MergeProjections),
    Pass::once("layout-weights", "gate and up channels side by side", &layout_weights::LayoutWeights),
    Pass::once("expert-parallel", "experts of other ranks behind collectives", &expert_parallel::ExpertParallel),
    Pass::once("pipeline-parallel", "layers of other ranks behind sends", &pipeline_parallel::PipelineParallel),
    Pass::per_bucket("group-experts", "router, sorted rows, sum over experts", &group_experts::GroupExperts),
    Pass::per_bucket("fuse-norm-matmul", "norms into the products that read them", &fuse_norm_matmul::FuseNormMatmul),
    Pass::per_bucket("fuse-shortconv", "gates and convolution, into a product", &fuse_shortconv::FuseShortconv),
    Pass::per_bucket("fuse-swiglu", "silu and product into the gate/up epilogue", &fuse_swiglu::FuseSwiglu),
    Pass::per_bucket("fuse-attention", "head norms, RoPE, cache write, attention", &fuse_attention::FuseAttention),
    Pass::per_bucket("fuse-residual", "additions into the epilogue of the addend", &fuse_residual::FuseResidual),
    Pass::per_bucket("fuse-combine-norm", "norms behind the sum over experts", &fuse_combine_norm::FuseCombineNorm),
    Pass::per_bucket("fuse-pointwise", "elementwise operators as one generated kernel", &fuse_pointwise::FusePointwise),
    Pass::per_bucket("sweep", "removes what fusion left unused", &dce::Dce),
];

/// The pass of a name, if it is one that rewrites.
pub fn find(name: &str) -> Option<&'static Pass> {
    PIPELINE.iter().find(|pass| pass.name == name)
}

/// The last two passes of each bucket, which change no operator: [`schedule()`], or program order, one step at a time, ...
pub const SCHEDULE: &str = "schedule";
/// ... and [`plan_memory()`], or every buffer in bytes of its own.
pub const PLAN_MEMORY: &str = "plan-memory";

/// The names of all passes, in the order in which they run.
pub fn names() -> Vec<&'static str> {
    PIPELINE.iter().map(|pass| pass.name).chain([SCHEDULE, PLAN_MEMORY]).collect()
}

/// The names of the passes that make fewer steps: without them, each operator of the graph as built is a step of its own.
pub fn fusing() -> Vec<&'static str> {
    const APART: [&str; 6] = ["canonicalize", "cse", "dce", "expert-parallel", "pipeline-parallel", "sweep"];
    PIPELINE.iter().map(|pass| pass.name).filter(|name| !APART.contains(name)).collect()
}
