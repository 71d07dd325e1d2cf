//! The plan: what the compiler writes and the runtime reads. Uses no other room.

pub mod collective;
pub mod exchange;
pub mod expert_counts;
pub mod file;
pub mod launch;
pub mod layout;
pub mod library;
pub mod manifest;
pub mod operators;
pub mod packed;
mod program;
pub mod validate;

pub use collective::{Collective, CollectiveKind, meeting};
pub use exchange::*;
pub use expert_counts::{ExpertCounts, scope};
pub use file::{PlanError, PlanFile};
pub use launch::*;
pub use layout::*;
pub use library::{LibraryCall, LibraryMatmul, WORKSPACE_BYTES};
pub use manifest::*;
pub use operators::*;
pub use packed::Packed;
pub use validate::{Fault, validate};
