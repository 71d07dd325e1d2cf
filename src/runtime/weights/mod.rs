//! Weights: from a checkpoint, or from a counter, into the weights region of the pool, in the layout that the plan states. On the
//! host that is [`load`] and [`fill_synthetic`], with [`pack`] for packed forms; a device takes what a [`Transfer`] gives it.

mod checkpoint;
mod header;
mod layout;
mod pack;
mod resolve;
pub mod share;
pub mod synthetic;
mod transfer;

pub use checkpoint::{Checkpoint, CheckpointError, CheckpointTensor};
pub use header::{HeaderEntry, HeaderError, parse_header};
pub use layout::{Places, places};
pub use pack::{Unpackable, pack, pack_row, unpack_row, unpackable};
pub use resolve::{CheckpointMismatch, Misshapen, Missing, Mistyped};
pub use transfer::{Room, Span, Transfer};

use crate::plan::packed::MAX_EXCEPTIONS;
use crate::plan::{Manifest, Program};

/// Called from worker threads, one call at a time, with the bytes of weights done so far: ascending, at last all of them.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// Why weights cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The checkpoint is not one that the plan was made for.
    #[error(transparent)]
    Mismatch(#[from] CheckpointMismatch),
    /// A weight that a plan wants packed does not pack.
    #[error(
        "weight {}: {} of {} rows do not pack, because more than {MAX_EXCEPTIONS} of their numbers lie outside of the 15 binades that hold \
         most; compile the plan again from this checkpoint (--model DIR), which leaves such weights as they are, or without --pack",
        .0.weight, .0.failed, .0.rows
    )]
    Unpackable(Unpackable),
    /// The plan's tensors or weights contradict each other.
    #[error("{entity} of the plan: {what}; the plan is damaged, compile it again")]
    Plan {
        /// The weight or tensor.
        entity: String,
        /// What was expected and what was found.
        what: String,
    },
}

/// Fills the weights region from a checkpoint. Bytes of the region between weights stay as they are.
///
/// # Errors
/// The checkpoint lacks tensors, has others, or has them with other shapes or types, all listed in one error; or the plan
/// is inconsistent.
pub fn load(
    manifest: &Manifest,
    program: &Program,
    checkpoint: &Checkpoint,
    region: &mut [u8],
    progress: Progress,
) -> Result<(), WeightError> {
    let stored = resolve::resolve(manifest, checkpoint)?;
    layout::fill(&manifest.tensors, &program.weights, &stored, region, progress)
}

/// Fills the weights region with the numbers of a counter; see [`synthetic`]. Bytes between weights stay as they are.
///
/// # Errors
/// The plan is inconsistent.
pub fn fill_synthetic(
    manifest: &Manifest,
    program: &Program,
    seed: u64,
    region: &mut [u8],
    progress: Progress,
) -> Result<(), WeightError> {
    let numbers = synthetic::Numbers::new(&manifest.tensors, seed);
    layout::fill(&manifest.tensors, &program.weights, &numbers, region, progress)
}

/// Where weights come from.
#[derive(Clone, Copy)]
pub enum Origin<'a> {
    /// A checkpoint.
    Checkpoint(&'a Checkpoint),
    /// A counter, with this seed; see [`synthetic`].
    Synthetic(u64),
}

/// Compares a checkpoint with what the plan needs, without reading its numbers.
///
/// # Errors
/// As [`load`].
pub fn check(manifest: &Manifest, checkpoint: &Checkpoint) -> Result<(), WeightError> {
    resolve::resolve(manifest, checkpoint).map(|_| ())
}

/// Bytes of all weights: the last value that progress reports.
pub fn total_bytes(program: &Program) -> u64 {
    program.weights.iter().fold(0, |sum, weight| sum.saturating_add(weight.ty.bytes().unwrap_or(u64::MAX)))
}
