//! Measurements on the device: how long buckets, blocks and steps take, beside the time that they would take at the least.
//!
//! That least time, the floor, is what the plan says must cross memory over the bandwidth of a copy on the same device, or, where
//! a peak is given and this is longer, the floating-point operations over that peak. How many experts a layer reads is
//! counted on the device, for the inputs that are timed.

mod blocks;
mod bucket;
mod copy;
mod experts;
mod fusion;
mod inputs;
mod profile;
mod timing;
mod trace;
mod transfer;
mod tune;
mod work;

pub use blocks::{Block, BlockReport, StageReport, measure_block};
pub use bucket::{BucketReport, measure_bucket};
pub use copy::{Machine, measure_machine};
pub use experts::{Distinct, LayerExperts, count_experts, expected_distinct};
pub use fusion::{Difference, Output, Variant, cpu_outputs, device_outputs, differences, measure_variant};
pub use inputs::{Inputs, Options};
pub use profile::{Profile, StepGroup, StepProfile, group, label, layer, profile};
pub use timing::Times;
pub use trace::chrome_trace;
pub use transfer::Transfer;
pub use tune::{Refused, Timed, graph_us, refused_kernels, time_steps};
pub use work::{Ceilings, Load, Work, fraction};
