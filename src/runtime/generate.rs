//! The generate loop: requests in, tokens out, over any executor.

mod work;

use std::cell::RefCell;
use std::mem;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Result, bail, ensure};

use self::work::Feed;
pub use self::work::{All, Next, Work};
use super::Executor;
use super::request::{FinishReason, Finished, Request, RequestError, Session};
use super::scheduler::{Agreed, Scheduler, Step};
use super::statistics::Statistics;
use crate::plan::{Bucket, Manifest, Phase};

/// What a generator does besides generating.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Options {
    /// Rows of one prompt in one step, at most; `None` for as many as the largest prefill bucket holds.
    pub chunk: Option<usize>,
    /// Keeps the logits that each new token was chosen from.
    pub capture_logits: bool,
    /// Keeps the logits of every prompt position that runs: of all, but those that a session had in the pool.
    pub capture_prompt_logits: bool,
}

/// Runs requests to their ends, with as many steps in flight as the executor's lookahead; one if logits are kept, which are
/// those of the last step alone.
pub struct Generator<'e, E: ?Sized> {
    executor: &'e mut E,
    scheduler: Scheduler,
    options: Options,
    vocab: usize,
    statistics: Statistics,
    /// By slot: what is kept of the sequence in it.
    captures: Vec<Capture>,
    /// Tokens of the step collected last.
    chosen: Vec<i32>,
    /// When the step collected last was, or, if none was in flight then, when the next was enqueued.
    since: Instant,
    /// What came next when that was last asked, of the ranks that run steps together.
    agreed: Agreed,
}

#[derive(Clone, Default)]
struct Capture {
    logits: Vec<f32>,
    prompt_logits: Vec<f32>,
}

impl<'e, E: Executor + ?Sized> Generator<'e, E> {
    /// A generator over an executor whose slots it may all use.
    ///
    /// # Errors
    /// The plan is not one of a language model, the options are out of range, or the executor failed.
    pub fn new(executor: &'e mut E, options: Options) -> Result<Self> {
        // A generator that ended by a panic may have left steps.
        executor.discard()?;
        let one = options.capture_logits || options.capture_prompt_logits;
        let lookahead = if one { 1 } else { executor.lookahead() };
        let manifest = executor.manifest();
        let scheduler = Scheduler::new(manifest, options.chunk, lookahead)?;
        let vocab = super::buckets::i32_size("vocabulary of the plan", manifest.model.vocab)?;
        let statistics = manifest.ranks.first().map(Statistics::new).unwrap_or_default();
        Ok(Generator {
            executor,
            scheduler,
            options,
            vocab,
            statistics,
            captures: Vec::new(),
            chosen: Vec::new(),
            since: Instant::now(),
            agreed: Agreed::Later,
        })
    }

    /// The plan that it runs.
    pub fn manifest(&self) -> &Manifest {
        self.executor.manifest()
    }

    /// Forgets a session: its slot and its pages are free.
    pub fn forget(&mut self, session: Session) {
        self.scheduler.forget(session);
    }

    /// Slots and pages that are free; sessions keep theirs.
    pub fn free(&self) -> (usize, usize) {
        self.scheduler.free()
    }

    /// Prompt and new tokens that one sequence can have together.
    pub fn most_positions(&self) -> usize {
        self.scheduler.most_positions()
    }

    /// What has run so far.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Runs requests; the results are in their order. `on_token(id, token)` sees every new token when it is known, also
    /// one that ends its sequence, and may stop the sequence: which it must decide by the tokens alone for runs to repeat.
    /// A sequence's tokens come in order and do not depend on the lookahead; how those of several mix does.
    ///
    /// # Errors
    /// The executor failed, and all sessions are forgotten. A request that the plan cannot serve is an error in its place, and
    /// the others run; what its session holds stays.
    pub fn generate(
        &mut self,
        requests: Vec<Request>,
        on_token: impl FnMut(u64, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Result<Finished, RequestError>>> {
        let mut all = All::new(requests, on_token);
        self.run(&mut all)?;
        all.results()
    }

    /// Runs requests that are asked for as places for them become free, and gives each result when its sequence has ended.
    /// The steps are those of [`Generator::generate`] with all of the requests.
    ///
    /// # Errors
    /// The executor failed, or the work did; what had not ended is forgotten.
    pub fn run(&mut self, work: &mut impl Work) -> Result<()> {
        let mut feed = Feed::new(work);
        while let Some(outcome) = self.advance(&mut feed).transpose() {
            if let Err(error) = outcome {
                self.scheduler.clear();
                self.captures.clear();
                // The first failure says more than one of what was in flight besides.
                let _ = self.executor.discard();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Queues a request, unless it is done or refused at once.
    fn submit(&mut self, index: usize, request: Request) -> Option<Result<Finished, RequestError>> {
        if request.max_new_tokens == 0 && !self.options.capture_prompt_logits {
            return Some(self.scheduler.check(&request).map(|()| Finished {
                id: request.id,
                prompt_tokens: request.prompt.len(),
                kept_rows: 0,
                lost_rows: 0,
                tokens: Vec::new(),
                reason: FinishReason::Length,
                logits: Vec::new(),
                prompt_logits: Vec::new(),
            }));
        }
        self.scheduler.submit(index, request).err().map(Err)
    }

    /// Enqueues steps until none more may be in flight, then takes the tokens of the oldest; `None` if nothing is left.
    fn advance<W: Work>(&mut self, feed: &mut Feed<'_, W>) -> Result<Option<()>> {
        feed.work.turn(&self.scheduler)?;
        self.enqueue(feed)?;
        let Some(step) = self.scheduler.oldest() else {
            // What comes later may still come, also to the ranks that run steps together with this one.
            return Ok(if self.agreed == Agreed::Over { None } else { Some(()) });
        };
        self.chosen.clear();
        self.executor.collect(&mut self.chosen)?;
        if self.options.capture_logits && !step.batch.rows.is_empty() {
            capture_logits(self.executor, step, self.vocab, &mut self.captures)?;
        }
        if self.options.capture_prompt_logits && step.phase == Phase::Prefill {
            capture_prompt_logits(self.executor, step, self.vocab, &mut self.captures)?;
        }
        let now = Instant::now();
        let capacity = bucket_size(self.executor, step.bucket, |bucket| bucket.tokens)?;
        let elapsed = now.duration_since(mem::replace(&mut self.since, now));
        self.statistics.count(step.phase, step.bucket, step.wanted_rows() as u64, capacity, elapsed);
        self.statistics.tokens += step.choosing().filter(|share| !share.dropped).count() as u64;
        // Both callbacks of the scheduler lead to the work; they are never called within each other.
        let (work, mut outcome) = (RefCell::new(&mut *feed.work), Ok(()));
        self.scheduler.complete(
            &self.chosen,
            |sequence, token| work.borrow_mut().token(sequence.id, token),
            |mut sequence, reason| {
                let Capture { logits, prompt_logits } = mem::take(&mut self.captures[sequence.slot as usize]);
                let finished = Finished {
                    id: sequence.id,
                    prompt_tokens: sequence.prompt_tokens,
                    kept_rows: sequence.kept,
                    lost_rows: sequence.lost,
                    tokens: sequence.tokens.split_off(sequence.prompt_tokens),
                    reason,
                    logits,
                    prompt_logits,
                };
                if outcome.is_ok() {
                    outcome = work.borrow_mut().finished(sequence.index, Ok(finished));
                }
            },
        )?;
        outcome.map(Some)
    }

    /// Admits what fits. Only the first that waits matters, as none overtakes it: the others need not be known yet.
    fn admit<W: Work>(&mut self, feed: &mut Feed<'_, W>) -> Result<()> {
        // Where this rank waits, those that run steps together with it wait too.
        let others_idle = !matches!(self.agreed, Agreed::Step(..));
        loop {
            while self.scheduler.waiting() == 0
                && let Some((index, request)) = feed.next(self.scheduler.is_idle() && others_idle)?
            {
                if let Some(result) = self.submit(index, request) {
                    feed.work.finished(index, result)?;
                }
            }
            let Some(sequence) = self.scheduler.admit() else { return Ok(()) };
            self.executor.set_pages(sequence.slot, &sequence.pages)?;
            self.executor.set_sampling(sequence.slot, sequence.sampling)?;
            let last_position = u32::try_from(sequence.last_position())?;
            self.executor.set_stops(sequence.slot, &sequence.eos, last_position)?;
            let slots = self.captures.len().max(sequence.slot as usize + 1);
            self.captures.resize_with(slots, Capture::default);
        }
    }

    /// Admits what fits, refuses what never will, and enqueues steps, as many as may be in flight.
    fn enqueue<W: Work>(&mut self, feed: &mut Feed<'_, W>) -> Result<()> {
        loop {
            self.admit(feed)?;
            while let Some((index, error)) = self.scheduler.refuse() {
                feed.work.finished(index, Err(error))?;
                self.admit(feed)?;
            }
            if !self.scheduler.has_spare_step() {
                return Ok(());
            }
            // Something that waits now, with no sequence at work, is nothing that room will be made for.
            let stuck = feed.dry || self.scheduler.waiting() > 0;
            let over = stuck && self.scheduler.sequences().next().is_none();
            self.agreed = match self.executor.group() {
                None => self.scheduler.wish(over).agree(),
                Some(group) => self.scheduler.agree(group, over)?,
            };
            let Agreed::Step(phase, bucket) = self.agreed else { return Ok(()) };
            let idle = self.scheduler.in_flight() == 0;
            let Some(step) = self.scheduler.plan_step(phase, bucket) else { return Ok(()) };
            if idle {
                self.since = Instant::now();
            }
            self.executor.enqueue(step.bucket, &step.batch)?;
        }
    }
}

/// Keeps the rows that the step's tokens were chosen from.
fn capture_logits<E: Executor + ?Sized>(
    executor: &mut E,
    step: &Step,
    vocab: usize,
    captures: &mut [Capture],
) -> Result<()> {
    let logits = read_logits(executor, step.batch.rows.len(), vocab)?;
    for (share, row) in step.choosing().zip(logits.chunks_exact(vocab)) {
        captures[share.slot as usize].logits.extend_from_slice(row);
    }
    Ok(())
}

/// Runs the head again over all of the step's rows, as many at a time as it holds.
fn capture_prompt_logits<E: Executor + ?Sized>(
    executor: &mut E,
    step: &Step,
    vocab: usize,
    captures: &mut [Capture],
) -> Result<()> {
    let tile = bucket_size(executor, step.bucket, |bucket| bucket.rows)?.max(1) as usize;
    let rows: Vec<i32> = (0..step.batch.tokens.len() as i32).collect();
    for rows in rows.chunks(tile) {
        executor.run_head(step.bucket, rows)?;
        let logits = read_logits(executor, rows.len(), vocab)?;
        for (&row, logits) in rows.iter().zip(logits.chunks_exact(vocab)) {
            let slot = step.batch.slots[row as usize] as usize;
            captures[slot].prompt_logits.extend_from_slice(logits);
        }
    }
    Ok(())
}

fn read_logits<E: Executor + ?Sized>(executor: &mut E, rows: usize, vocab: usize) -> Result<Vec<f32>> {
    let mut logits = Vec::with_capacity(rows * vocab);
    executor.logits(&mut logits)?;
    ensure!(
        logits.len() == rows * vocab,
        "executor: expected {rows} rows of {vocab} logits, found {} numbers; this is a bug",
        logits.len()
    );
    Ok(logits)
}

fn bucket_size<E: Executor + ?Sized>(executor: &E, bucket: usize, size: impl Fn(&Bucket) -> u64) -> Result<u64> {
    match executor.manifest().ranks.first().and_then(|program| program.buckets.get(bucket)) {
        Some(bucket) => Ok(size(bucket)),
        None => bail!("plan: expected bucket {bucket} in the program of rank 0, found none; compile the plan again"),
    }
}

/// The captured logits of several sequences as one table `[sequences, new_tokens, vocab]`, NaN after a sequence has ended
/// and for one that did not run. `new_tokens` is what the longest generated, or more.
pub fn logits_table<'f>(
    finished: impl IntoIterator<Item = Option<&'f Finished>>,
    new_tokens: usize,
    vocab: usize,
) -> Vec<f32> {
    let mut table = Vec::new();
    for (index, sequence) in finished.into_iter().enumerate() {
        let size = new_tokens * vocab;
        let logits = sequence.map_or(&[][..], |sequence| &sequence.logits);
        table.extend_from_slice(&logits[..logits.len().min(size)]);
        table.resize((index + 1) * size, f32::NAN);
    }
    table
}

#[cfg(test)]
mod session_tests;
#[cfg(test)]
mod tests;
