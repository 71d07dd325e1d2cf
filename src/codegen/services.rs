//! The kernels that the runtime launches by itself: see [`crate::plan::ServiceRole`].

use super::cubins::Source;
use crate::plan::Manifest;

/// Adds the services that a plan needs to its manifest, and their sources to those of its kernels.
pub fn add(_manifest: &mut Manifest, _sources: &mut Vec<Source>) {}
