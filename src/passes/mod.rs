//! The pipeline: rewrites of the graph, in one table, applied by one driver. Uses only the graph.

pub mod context;
mod patch;

pub use context::{BucketSpec, PassContext, Phase, Target};
pub use patch::{Patch, Rewrite};
