//! What an executor does: the CPU and the CUDA executor behind one interface.

use anyhow::Result;

use crate::plan::{Manifest, SAMPLING_COLUMNS};

/// Rows of one step. All vectors of row data have the same length, at most the bucket's rows; the executor pads the rest
/// with token -1, position 0 and slot -1. Rows of a sequence are adjacent and ascend by position.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Batch {
    /// Token of each row.
    pub tokens: Vec<i32>,
    /// Position of each row in its sequence.
    pub positions: Vec<i32>,
    /// Slot of each row's sequence.
    pub slots: Vec<i32>,
    /// The rows that get logits, at most the bucket's; padded with -1.
    pub rows: Vec<i32>,
}

/// How a sequence's tokens are chosen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SamplingParams {
    /// Divides the logits; 0 chooses the most likely token.
    pub temperature: f32,
    /// Keeps the k most likely; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps those at least this fraction of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Random numbers are a function of this and the position alone.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl SamplingParams {
    /// The slot's row of the sampling table; see [`crate::plan::StateRole::Sampling`].
    pub fn to_row(self) -> [i32; SAMPLING_COLUMNS as usize] {
        [
            self.temperature.to_bits() as i32,
            self.top_k as i32,
            self.top_p.to_bits() as i32,
            self.min_p.to_bits() as i32,
            self.seed as u32 as i32,
            (self.seed >> 32) as u32 as i32,
            0,
            0,
        ]
    }

    /// Reads what [`SamplingParams::to_row`] wrote.
    pub fn from_row(row: &[i32]) -> Self {
        SamplingParams {
            temperature: f32::from_bits(row[0] as u32),
            top_k: row[1] as u32,
            top_p: f32::from_bits(row[2] as u32),
            min_p: f32::from_bits(row[3] as u32),
            seed: u64::from(row[4] as u32) | u64::from(row[5] as u32) << 32,
        }
    }
}

/// Runs a plan's steps over a pool that holds its weights and state.
pub trait Executor {
    /// The plan it runs.
    fn manifest(&self) -> &Manifest;

    /// Writes a slot's row of the block table; entries past `pages` are left as they are.
    ///
    /// # Errors
    /// The device failed.
    fn set_pages(&mut self, slot: u32, pages: &[u32]) -> Result<()>;

    /// Writes a slot's sampling parameters.
    ///
    /// # Errors
    /// The device failed.
    fn set_sampling(&mut self, slot: u32, params: SamplingParams) -> Result<()>;

    /// Runs all steps of a bucket, by position in the program.
    ///
    /// # Errors
    /// The batch does not fit the bucket, or the device failed.
    fn run(&mut self, bucket: usize, batch: &Batch) -> Result<()>;

    /// After [`Executor::run`] of the same bucket, runs its head again for other rows of the same batch.
    ///
    /// # Errors
    /// The rows do not fit the bucket, or the device failed.
    fn run_head(&mut self, bucket: usize, rows: &[i32]) -> Result<()>;

    /// The tokens chosen by the last run, one for each of the batch's rows with logits.
    ///
    /// # Errors
    /// The device failed.
    fn next_tokens(&mut self) -> Result<Vec<i32>>;

    /// The logits of the last run, `[rows with logits, vocab]`.
    ///
    /// # Errors
    /// The device failed.
    fn logits(&mut self) -> Result<Vec<f32>>;
}
