//! Runs plans. Uses only the plan: what the runtime needs, the plan says.

pub mod batch;
pub mod buckets;
pub mod compare;
pub mod convert;
pub mod cpu;
pub mod cuda;
pub mod executor;
pub mod forced;
pub mod generate;
pub mod group;
pub mod io;
#[cfg(test)]
pub(crate) mod mock;
pub mod pages;
pub mod ranks;
pub mod request;
pub mod sampling;
pub mod scheduler;
pub mod score;
pub mod statistics;
pub mod weights;
pub mod workload;

pub use buckets::{Buckets, Capacity, Padding, padding};
pub use executor::{Batch, Executor, PENDING, SamplingParams};
pub use generate::{All, Generator, Next, Options, Work, logits_table};
pub use request::{FinishReason, Finished, Request, RequestError, Session};
pub use scheduler::Scheduler;
pub use score::{Scored, score};
pub use statistics::{BucketStatistics, PhaseStatistics, Statistics};
pub use weights::synthetic;
