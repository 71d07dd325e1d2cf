//! Runs plans. Uses only the plan: what the runtime needs, the plan says.

pub mod batch;
pub mod cpu;
pub mod executor;
pub mod io;
pub mod sampling;

pub use executor::{Batch, Executor, SamplingParams};
