//! The plan: what the compiler writes and the runtime reads. Uses no other room.

pub mod manifest;

pub use manifest::*;
