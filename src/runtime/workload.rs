//! Batches of random tokens that fill a bucket, for tools that run one step at a time.

use anyhow::{Context, Result, ensure};

use super::executor::{Batch, Executor, SamplingParams};
use super::sampling::draw;
use crate::plan::{Manifest, Phase};

/// How the rows that sequences have behind them come into the state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum History {
    /// They are run.
    #[default]
    Run,
    /// What the state holds by then counts as them: enough for one step, or for its time, and there at once.
    Held,
}

/// Random sequences in all slots that a bucket can hold, with pages of their own.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Rows of each sequence that are in the state already.
    pub positions: Vec<usize>,
    seed: u64,
    drawn: u64,
    vocab: usize,
    pages_each: usize,
    page_tokens: usize,
}

impl Workload {
    /// `sequences` of them, each with room for as many positions as the plan's pages allow, at most `positions`.
    ///
    /// # Errors
    /// The plan has too few slots or pages, or the device failed.
    pub fn new(executor: &mut dyn Executor, sequences: usize, positions: usize, seed: u64) -> Result<Workload> {
        let Manifest { limits, model, .. } = executor.manifest();
        let (slots, pages) = (limits.max_sequences as usize, limits.pages() as usize);
        ensure!(sequences >= 1 && sequences <= slots, "{sequences} sequences in a plan with {slots} slots");
        let (page_tokens, vocab) = (limits.page_tokens as usize, model.vocab as usize);
        let most = limits.pages_per_sequence() as usize;
        let pages_each = (pages / sequences).min(most).min(positions.max(1).div_ceil(page_tokens));
        ensure!(pages_each >= 1, "{pages} pages for {sequences} sequences; compile with a larger --kv-tokens");
        ensure!(vocab > 0, "the plan is no language model");
        for slot in 0..sequences as u32 {
            let first = slot * pages_each as u32;
            executor.set_pages(slot, &(first..first + pages_each as u32).collect::<Vec<_>>())?;
            executor.set_sampling(slot, SamplingParams::default())?;
            executor.set_stops(slot, &[], i32::MAX as u32)?;
        }
        Ok(Workload { positions: vec![0; sequences], seed, drawn: 0, vocab, pages_each, page_tokens })
    }

    /// Positions that each sequence has room for.
    pub fn room(&self) -> usize {
        self.pages_each * self.page_tokens
    }

    /// The next random number below `below`.
    pub fn draw(&mut self, below: usize) -> usize {
        self.drawn += 1;
        draw(self.seed, self.drawn, below as u64) as usize
    }

    /// A batch of the next rows of these sequences: `(sequence, rows)`, each ending in a row with logits.
    pub fn batch(&mut self, shares: &[(usize, usize)]) -> Batch {
        let mut batch = Batch::default();
        for &(sequence, rows) in shares {
            for _ in 0..rows {
                let token = self.draw(self.vocab);
                batch.tokens.push(token as i32);
                batch.positions.push(self.positions[sequence] as i32);
                batch.slots.push(sequence as i32);
                self.positions[sequence] += 1;
            }
            if rows > 0 {
                batch.rows.push(batch.tokens.len() as i32 - 1);
            }
        }
        batch
    }

    /// Sees to it that every sequence has `positions` rows behind it: run in the plan's largest prefill bucket, or by decode
    /// steps where there is none, or held by the state already.
    ///
    /// # Errors
    /// No room, or the device failed.
    pub fn fill(&mut self, executor: &mut dyn Executor, positions: &[usize], history: History) -> Result<()> {
        ensure!(
            positions.iter().all(|&n| n <= self.room()),
            "{positions:?} positions, each has room for {}",
            self.room()
        );
        if history == History::Held {
            self.positions.copy_from_slice(positions);
            return Ok(());
        }
        let program = executor.manifest().ranks.first().context("a plan without ranks")?;
        let largest = program.buckets.iter().rposition(|bucket| bucket.phase == Phase::Prefill);
        let bucket = largest.or(program.buckets.len().checked_sub(1)).context("a plan without buckets")?;
        let at = &program.buckets[bucket];
        let (rows, most) = (at.tokens as usize, at.sequences as usize);
        let each = if at.phase == Phase::Prefill { rows } else { 1 };
        loop {
            let (mut room, mut shares) = (rows, vec![]);
            for (sequence, &wanted) in positions.iter().enumerate() {
                let left = wanted.saturating_sub(self.positions[sequence]).min(room).min(each);
                if left > 0 && shares.len() < most {
                    shares.push((sequence, left));
                    room -= left;
                }
            }
            if shares.is_empty() {
                return Ok(());
            }
            let mut batch = self.batch(&shares);
            batch.rows.truncate(executor.manifest().ranks[0].buckets[bucket].rows as usize);
            executor.run(bucket, &batch)?;
        }
    }
}

/// Random rows for a bucket: sequences of different lengths, at different positions, with up to `context` rows behind them by
/// `history`, and some rows of padding.
///
/// # Errors
/// The plan has too little room, or the device failed.
pub fn random_batch(
    executor: &mut dyn Executor,
    bucket: usize,
    context: usize,
    seed: u64,
    history: History,
) -> Result<Batch> {
    let program = executor.manifest().ranks.first().context("a plan without ranks")?;
    let at = program.buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let (tokens, sequences, phase) = (at.tokens as usize, at.sequences as usize, at.phase);
    let limits = &executor.manifest().limits;
    let (pages, max_context) = (limits.pages().max(1) as usize, limits.max_context as usize);
    if phase == Phase::Decode {
        // One row of padding where there is more than one.
        let count = sequences.saturating_sub(1).clamp(1, pages);
        let mut work = Workload::new(executor, count, max_context.min(context + 1), seed)?;
        let most = work.room().min(max_context).saturating_sub(1).min(context);
        let behind: Vec<usize> = (0..count).map(|_| work.draw(most + 1)).collect();
        work.fill(executor, &behind, history)?;
        return Ok(work.batch(&(0..count).map(|i| (i, 1)).collect::<Vec<_>>()));
    }
    let count = sequences.min(4).min(pages);
    let mut work = Workload::new(executor, count, max_context.min(context + tokens), seed)?;
    let room = work.room().min(max_context);
    // Some begin anew, some go on.
    let behind: Vec<usize> =
        (0..count).map(|i| if i % 2 == 0 { 0 } else { work.draw(room.min(context).max(1)) }).collect();
    work.fill(executor, &behind, history)?;
    let mut left = (tokens - tokens / 16).max(1);
    let mut shares = vec![];
    for (i, behind) in behind.iter().enumerate() {
        let most = (room - behind).min(left);
        let rows = if i + 1 == count { most } else { most.min(1 + work.draw(tokens.div_ceil(count) * 3 / 2)) };
        left -= rows;
        if rows > 0 {
            shares.push((i, rows));
        }
    }
    Ok(work.batch(&shares))
}
