//! What an executor does: the CPU and the CUDA executor behind one interface.

use anyhow::Result;

use crate::plan::{ExpertCounts, Manifest, SAMPLING_COLUMNS};
use crate::runtime::group::Group;

/// Stands in [`Batch::tokens`] for the token that was chosen last for the row's slot, by a step enqueued before, and that
/// the host does not know yet; a device reads it from its own memory. Such a row is the only one of its sequence in the
/// batch.
pub const PENDING: i32 = -2;

/// Rows of one step. All vectors of row data have the same length, at most the bucket's rows; the executor pads the rest
/// with token -1, position 0 and slot -1. Rows of a sequence are adjacent and ascend by position.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Batch {
    /// Token of each row, or [`PENDING`].
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

    /// The first number that is out of range: its name, what was expected of it, and what was found.
    pub fn fault(self) -> Option<(&'static str, &'static str, f32)> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Some(("temperature", "of at least 0", self.temperature));
        }
        let shares = [("top-p", self.top_p), ("min-p", self.min_p)];
        let bad = shares.into_iter().find(|(_, found)| !(0.0..=1.0).contains(found));
        bad.map(|(name, found)| (name, "from 0 to 1", found))
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
///
/// Steps and everything that `set_*` writes take effect in the order of the calls, as on a stream: what is set for a slot
/// changes no step enqueued before. So a slot and its pages may go to another sequence while steps of the one before are
/// in flight.
pub trait Executor {
    /// The plan it runs.
    fn manifest(&self) -> &Manifest;

    /// What it runs on, for a person to read.
    fn device(&self) -> String;

    /// Bytes that the pool takes on the device, as its driver reports them; none where nobody reports.
    fn measured_pool_bytes(&self) -> Option<u64> {
        None
    }

    /// How often routers have chosen each expert so far, if it counts that.
    fn expert_counts(&self) -> Option<ExpertCounts> {
        None
    }

    /// The ranks that run steps together with this one, which have to be the same steps; none if it runs them alone.
    fn group(&mut self) -> Option<&mut dyn Group> {
        None
    }

    /// Sets the experts that a plan with forced routing chooses for a slot's sequence: `[layers, positions, experts a token]`.
    fn force_experts(&mut self, slot: i32, choices: Vec<i32>);

    /// How many steps may be in flight, that is enqueued and not collected: at least 1, and always the same, because
    /// which steps run depends on it.
    fn lookahead(&self) -> usize;

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

    /// Says that a sequence begins in a slot, which tokens end it, and the position of its last row. Its first row is at position
    /// 0, or where it goes on with what rows of the slot have written; the token of that row is known. Once it has chosen one of the tokens or run that row, a device may turn its further rows into padding, whose tokens are -1; an executor
    /// may as well run them, because nobody looks at their results.
    ///
    /// # Errors
    /// The device failed.
    fn set_stops(&mut self, slot: u32, eos: &[u32], last_position: u32) -> Result<()>;

    /// Starts all steps of a bucket, by position in the program, and need not wait for them. The batch may change as soon
    /// as this returns.
    ///
    /// # Errors
    /// The batch does not fit the bucket, [`Executor::lookahead`] steps are in flight, or the device failed; the step is not
    /// in flight then.
    fn enqueue(&mut self, bucket: usize, batch: &Batch) -> Result<()>;

    /// Waits for the oldest step in flight and appends the tokens it chose, one for each of its batch's rows with logits;
    /// -1 for a row turned into padding, see [`Executor::set_stops`].
    ///
    /// # Errors
    /// No step is in flight, or the device failed.
    fn collect(&mut self, tokens: &mut Vec<i32>) -> Result<()>;

    /// Waits for all steps in flight and forgets the tokens they chose. What they wrote to the state stays.
    ///
    /// # Errors
    /// The device failed; nothing is in flight then either.
    fn discard(&mut self) -> Result<()>;

    /// Runs the head of the step enqueued last again, for other rows of its batch, for their logits alone: no token counts as
    /// chosen, and no sequence ends. `bucket` is that step's, and no step is in flight.
    ///
    /// # Errors
    /// The rows do not fit the bucket, or the device failed.
    fn run_head(&mut self, bucket: usize, rows: &[i32]) -> Result<()>;

    /// Appends the logits of the step enqueued last, or of its head if that ran again, `[rows with logits, vocab]`. No
    /// step is in flight.
    ///
    /// # Errors
    /// The device failed.
    fn logits(&mut self, logits: &mut Vec<f32>) -> Result<()>;

    /// Enqueues a step and collects its tokens, for tools that run single steps. No step is in flight.
    ///
    /// # Errors
    /// Those of [`Executor::enqueue`] and [`Executor::collect`].
    fn run(&mut self, bucket: usize, batch: &Batch) -> Result<Vec<i32>> {
        let mut tokens = Vec::with_capacity(batch.rows.len());
        self.enqueue(bucket, batch)?;
        self.collect(&mut tokens)?;
        Ok(tokens)
    }
}
