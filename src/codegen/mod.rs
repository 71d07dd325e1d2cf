//! From a model description to a plan: recipes, the compile driver, and the lowering of the graph's operators to steps.

pub mod compile;
mod cost;
pub mod cubins;
mod expert_placement;
mod expert_ranks;
mod kernel_table;
pub mod kernels;
mod libraries;
pub mod lock;
mod lower;
mod packed;
mod pipeline;
mod pipeline_ranks;
pub mod recipe;
pub mod refine;
pub mod select;
mod semantic;
mod services;
mod tensors;
pub mod tuning;
mod types;

pub use compile::{CompileOptions, Compiled, Source, compile};
pub use expert_placement::Balance;
pub use lock::Lock;
pub use recipe::{Prompt, Recipe};
pub use tuning::Tuning;
