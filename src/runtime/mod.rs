//! Runs plans. Uses only the plan: what the runtime needs, the plan says.

pub mod executor;

pub use executor::{Batch, Executor, SamplingParams};
