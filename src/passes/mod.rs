//! The pipeline: rewrites of the graph, in one table, applied by one driver. Uses only the graph.

pub mod context;
mod fuse_attention;
mod fuse_norm_matmul;
mod fuse_residual;
mod fuse_shortconv;
mod fuse_swiglu;
mod group_experts;
mod patch;
pub mod tactics;
mod view;

pub use context::{BucketSpec, PassContext, Phase, Target};
pub use fuse_attention::FuseAttention;
pub use fuse_norm_matmul::FuseNormMatmul;
pub use fuse_residual::FuseResidual;
pub use fuse_shortconv::FuseShortconv;
pub use fuse_swiglu::FuseSwiglu;
pub use group_experts::GroupExperts;
pub use patch::{Patch, Rewrite};
