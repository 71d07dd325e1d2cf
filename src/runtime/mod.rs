//! Runs plans. Uses only the plan: what the runtime needs, the plan says.

pub mod convert;
pub mod executor;
pub mod weights;

pub use executor::{Batch, Executor, SamplingParams};
pub use weights::synthetic;
