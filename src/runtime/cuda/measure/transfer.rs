//! What copies of a batch's inputs to the device take.

use anyhow::Result;
use serde::Serialize;

use super::inputs::Inputs;
use super::profile::{FILL_US, SCRATCH_BYTES};
use super::timing::{Marks, median};
use crate::cuda::DeviceMemory;
use crate::runtime::cuda::CudaExecutor;

/// Copies that are timed; the median is taken.
const RUNS: usize = 20;
/// What the host needs to queue one batch's copies, at the most.
const QUEUE_US: usize = 100;

/// The copies to the device when a batch's rows change. While they stay the same nothing is copied; tokens come back by a
/// kernel's stores to host memory, which is part of the graph.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Transfer {
    /// Bytes copied.
    pub bytes: u64,
    /// Their time on the device, in microseconds.
    pub us: f64,
}

/// Times the copies of these inputs; none if there are none.
///
/// # Errors
/// The device failed.
pub(super) fn transfer(executor: &mut CudaExecutor, bucket: usize, inputs: &Inputs) -> Result<Option<Transfer>> {
    if inputs.batch.is_none() {
        return Ok(None);
    }
    let at = &executor.program().buckets[bucket];
    // Token, position and slot of each row, and the rows that get logits.
    let bytes = (3 * at.tokens + at.rows) * size_of::<i32>() as u64;
    let (free, _) = executor.gpu().memory()?;
    let scratch = DeviceMemory::new(executor.gpu(), usize::try_from(SCRATCH_BYTES.min(free / 4))?)?;
    let mut samples = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let mut marks = Marks::new(executor.gpu(), 1)?;
        // The device is busy until all is queued, so that the host's time does not count.
        for _ in 0..QUEUE_US.div_ceil(FILL_US) + 1 {
            scratch.fill(0..scratch.bytes(), 0, executor.stream())?;
        }
        marks.record(executor.stream())?;
        inputs.upload(executor, bucket)?;
        marks.record(executor.stream())?;
        samples.extend(marks.spans(executor.stream())?.first().map(|span| 1e3 * span));
    }
    samples.sort_by(f64::total_cmp);
    Ok(Some(Transfer { bytes, us: median(&samples) }))
}
