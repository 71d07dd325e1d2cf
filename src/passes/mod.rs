//! The pipeline: rewrites of the graph, in one table, applied by one driver. Uses only the graph.

pub mod context;
mod patch;
pub mod plan_memory;
pub mod schedule;

pub use context::{BucketSpec, PassContext, Phase, Target};
pub use patch::{Patch, Rewrite};
pub use plan_memory::{PlacedBuffer, Placement, plan_memory};
pub use schedule::{Schedule, ScheduledStep, Storage, schedule, storage};
