//! The queue, and the one rule by which steps follow each other. It knows no executor and no clock: the steps depend on the
//! requests and on the tokens chosen, never on timing.
//!
//! Between two steps:
//!
//! 1. Sequences that ended have left; their slots and pages are free.
//! 2. Requests are admitted in the order in which they came, each to the lowest free slot and the lowest free pages for all of
//!    its prompt and new tokens. The first that finds too few waits, and all behind it: none overtakes.
//! 3. A decode round that has begun goes on. Otherwise, if prompt rows are left, a prefill step runs, unless the last step
//!    was one and a sequence is decoding. Otherwise a decode round begins. So a decoding sequence waits for at most one
//!    prefill step a token, and a prompt for at most one decode round a chunk.
//!
//! A prefill step takes sequences in the order of admission, from each as many of its prompt rows as fit: the largest prefill
//! bucket's rows are filled, the last sequence's share may be a part, and `chunk` bounds every share. It runs in the smallest
//! bucket that holds what was packed. A prompt alone therefore runs in chunks of the largest bucket, then in the smallest that
//! holds the rest. Only the last row of a prompt gets logits; they give the first new token.
//!
//! A decode round runs one row of every decoding sequence, in the order of slots: as many steps of the largest decode bucket as
//! are filled, then one of the smallest that holds the rest.

use std::collections::VecDeque;
use std::ops::{ControlFlow, Range};

use anyhow::{Context, Result, ensure};

use super::buckets::{Buckets, i32_size};
use super::pages::{FreeList, Pages};
use super::request::{FinishReason, Request, RequestError};
use super::{Batch, SamplingParams};
use crate::plan::{Manifest, Phase};

/// A sequence in a slot. Its tokens up to `position` are in the state of its slot and pages; those from there on are rows
/// still to run.
#[derive(Clone, PartialEq, Debug)]
pub struct Sequence {
    /// The caller's number of the request, as given to [`Scheduler::submit`].
    pub index: usize,
    /// The request's id.
    pub id: u64,
    /// Slot.
    pub slot: u32,
    /// Pages, in the order of positions.
    pub pages: Vec<u32>,
    /// Prompt, then new tokens.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Rows that have run.
    pub position: usize,
    /// New tokens at the most.
    pub max_new_tokens: usize,
    /// Tokens that end it.
    pub eos: Vec<u32>,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
}

impl Sequence {
    /// Rows of the prompt that have not run.
    pub fn prompt_rows_left(&self) -> usize {
        self.prompt_tokens.saturating_sub(self.position)
    }

    /// Number of new tokens so far.
    pub fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    fn is_decoding(&self) -> bool {
        self.prompt_rows_left() == 0
    }
}

/// One sequence's rows of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Share {
    /// Slot of the sequence.
    pub slot: u32,
    /// Its rows of the batch.
    pub rows: Range<usize>,
    /// Whether its last row gets logits, which give a new token.
    pub chooses: bool,
}

/// What the executor runs next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Whether rows of prompts run, or one row of each decoding sequence.
    pub phase: Phase,
    /// Bucket, by position in the program.
    pub bucket: usize,
    /// Its rows, without padding.
    pub batch: Batch,
    /// Whose the rows are, in their order; those that choose are in the order of `batch.rows`.
    pub shares: Vec<Share>,
}

/// Queue, slots and pages.
#[derive(Clone, Debug)]
pub struct Scheduler {
    vocab: usize,
    max_context: usize,
    chunk: usize,
    buckets: Buckets,
    slots: FreeList,
    pages: Pages,
    queue: VecDeque<(usize, Request)>,
    /// By slot; grows as slots are used.
    sequences: Vec<Option<Sequence>>,
    /// Slots in use, in the order of admission.
    order: Vec<u32>,
    /// Slot from which the decode round goes on; `None` between rounds.
    round: Option<u32>,
    step: Step,
}

impl Scheduler {
    /// An empty queue for a plan. `chunk` bounds the rows that one prompt runs in a step.
    ///
    /// # Errors
    /// The plan has no bucket, slot or page for sequences, or `chunk` is 0.
    pub fn new(manifest: &Manifest, chunk: Option<usize>) -> Result<Self> {
        let limits = &manifest.limits;
        let program =
            manifest.ranks.first().context("plan: expected a program for rank 0, found no rank; compile again")?;
        ensure!(chunk != Some(0), "--chunk: expected at least 1 row, found 0; leave it out to run prompts whole");
        ensure!(
            limits.max_sequences > 0 && limits.max_context > 0,
            "limits of the plan: expected room for at least one sequence, found max_sequences = {}, max_context = {}; \
             compile with a larger --max-sequences and --max-context",
            limits.max_sequences,
            limits.max_context
        );
        let slots = i32_size("limits of the plan: max_sequences", limits.max_sequences)?;
        Ok(Scheduler {
            vocab: i32_size("vocabulary of the plan", manifest.model.vocab)?,
            max_context: i32_size("limits of the plan: max_context", limits.max_context)?,
            chunk: chunk.unwrap_or(usize::MAX),
            buckets: Buckets::new(program)?,
            slots: FreeList::new(slots as u32),
            pages: Pages::new(limits)?,
            queue: VecDeque::new(),
            sequences: Vec::new(),
            order: Vec::new(),
            round: None,
            // Nothing decodes at first, so this only says that no prefill step came before.
            step: Step { phase: Phase::Decode, bucket: 0, batch: Batch::default(), shares: Vec::new() },
        })
    }

    /// Whether the plan can serve a request.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, request: &Request) -> Result<(), RequestError> {
        let (id, prompt, new) = (request.id, request.prompt.len(), request.max_new_tokens);
        if prompt == 0 {
            return Err(RequestError::EmptyPrompt { id });
        }
        if let Some(index) = request.prompt.iter().position(|&token| token as usize >= self.vocab) {
            return Err(RequestError::UnknownToken { id, index, token: request.prompt[index], vocab: self.vocab });
        }
        request.check_sampling()?;
        let positions = prompt.saturating_add(new);
        if positions > self.max_context {
            return Err(RequestError::TooLong { id, prompt, new, max_context: self.max_context });
        }
        let needed = self.pages.needed(positions);
        if needed > self.pages.total() {
            let (page_tokens, pages) = (self.pages.page_tokens(), self.pages.total());
            return Err(RequestError::TooManyPages { id, prompt, new, needed, page_tokens, pages });
        }
        Ok(())
    }

    /// Puts a request at the queue's end. `index` is the caller's number for it.
    ///
    /// # Errors
    /// The plan cannot serve it.
    pub fn submit(&mut self, index: usize, request: Request) -> Result<(), RequestError> {
        self.check(&request)?;
        self.queue.push_back((index, request));
        Ok(())
    }

    /// Moves the queue's first request into a slot. The caller gives the slot's pages and sampling parameters to the
    /// executor. `None` if the queue is empty or its first has to wait.
    pub fn admit(&mut self) -> Option<&Sequence> {
        let (_, request) = self.queue.front()?;
        let positions = request.prompt.len() + request.max_new_tokens;
        if self.slots.free() == 0 {
            return None;
        }
        let pages = self.pages.reserve(positions)?;
        let slot = self.slots.take_one()?;
        let (index, Request { id, prompt, max_new_tokens, eos, sampling }) = self.queue.pop_front()?;
        let (prompt_tokens, mut tokens) = (prompt.len(), prompt);
        tokens.reserve_exact(max_new_tokens);
        self.order.push(slot);
        let place = slot as usize;
        if self.sequences.len() <= place {
            self.sequences.resize(place + 1, None);
        }
        let sequence =
            Sequence { index, id, slot, pages, tokens, prompt_tokens, position: 0, max_new_tokens, eos, sampling };
        Some(self.sequences[place].insert(sequence))
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// The sequences in slots, in the order of admission.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.order.iter().filter_map(|&slot| self.sequences[slot as usize].as_ref())
    }

    /// Decides on the next step; `None` if no sequence is in a slot. Once the executor has run it, [`Scheduler::complete`]
    /// must follow.
    pub fn next_step(&mut self) -> Option<&Step> {
        let decoding = self.sequences().any(Sequence::is_decoding);
        let prefilling = self.sequences().any(|sequence| !sequence.is_decoding());
        let turn = !decoding || self.step.phase != Phase::Prefill;
        let Step { batch, shares, .. } = &mut self.step;
        batch.tokens.clear();
        batch.positions.clear();
        batch.slots.clear();
        batch.rows.clear();
        shares.clear();
        if self.round.is_none() && prefilling && turn {
            self.pack_prefill();
        } else if decoding {
            self.pack_decode();
        } else {
            return None;
        }
        Some(&self.step)
    }

    fn pack_prefill(&mut self) {
        let largest = self.buckets.largest_prefill();
        let step = &mut self.step;
        for &slot in &self.order {
            let Some(sequence) = &self.sequences[slot as usize] else { continue };
            let left = sequence.prompt_rows_left();
            if left == 0 {
                continue;
            }
            let room = largest.tokens - step.batch.tokens.len();
            let count = left.min(room).min(self.chunk).min(largest.rows_per_sequence);
            let chooses = count == left && sequence.max_new_tokens > 0;
            let no_row = chooses && step.batch.rows.len() == largest.rows;
            if count == 0 || no_row || step.shares.len() == largest.sequences {
                break;
            }
            step.push(sequence, count, chooses);
        }
        step.phase = Phase::Prefill;
        step.bucket = self.buckets.prefill(step.batch.tokens.len(), step.shares.len(), step.batch.rows.len()).bucket;
    }

    fn pack_decode(&mut self) {
        let largest = self.buckets.largest_decode().decodes();
        let step = &mut self.step;
        let first = self.round.take().unwrap_or(0);
        let from = self.sequences.iter().skip(first as usize).flatten();
        for sequence in from.filter(|sequence| sequence.is_decoding()) {
            if step.shares.len() == largest {
                self.round = Some(sequence.slot);
                break;
            }
            step.push(sequence, 1, true);
        }
        step.phase = Phase::Decode;
        step.bucket = self.buckets.decode(step.shares.len()).bucket;
    }

    /// Takes the tokens chosen by the step that has run, one for each of its rows with logits. `on_token` sees each token
    /// and may stop its sequence; `on_end` gets the sequences that have ended, whose slots and pages are free by then.
    ///
    /// # Errors
    /// The tokens are not as many as the rows, or not of the vocabulary; nothing has changed then.
    pub fn complete(
        &mut self,
        chosen: &[i32],
        mut on_token: impl FnMut(&Sequence, u32) -> ControlFlow<()>,
        mut on_end: impl FnMut(Sequence, FinishReason),
    ) -> Result<()> {
        let (expected, found) = (self.step.batch.rows.len(), chosen.len());
        ensure!(expected == found, "executor: expected {expected} chosen tokens, found {found}; this is a bug");
        if let Some(bad) = chosen.iter().find(|&&token| token < 0 || token as usize >= self.vocab) {
            anyhow::bail!("executor: expected tokens below {}, found {bad}; the logits may be NaN", self.vocab);
        }
        let mut chosen = chosen.iter().map(|&token| token as u32);
        let shares = std::mem::take(&mut self.step.shares);
        for share in &shares {
            let Some(sequence) = &mut self.sequences[share.slot as usize] else { continue };
            sequence.position += share.rows.len();
            let mut reason = (sequence.is_decoding() && sequence.max_new_tokens == 0).then_some(FinishReason::Length);
            if share.chooses
                && let Some(token) = chosen.next()
            {
                sequence.tokens.push(token);
                let stopped = on_token(sequence, token).is_break();
                reason = if sequence.eos.contains(&token) {
                    Some(FinishReason::Eos)
                } else if stopped {
                    Some(FinishReason::Stop)
                } else {
                    (sequence.new_tokens() == sequence.max_new_tokens).then_some(FinishReason::Length)
                };
            }
            if let Some(reason) = reason
                && let Some(sequence) = self.release(share.slot)
            {
                on_end(sequence, reason);
            }
        }
        self.step.shares = shares;
        Ok(())
    }

    /// Forgets all sequences and requests, as after an executor has failed.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.round = None;
        self.step.phase = Phase::Decode;
        for slot in std::mem::take(&mut self.order) {
            self.release(slot);
        }
    }

    fn release(&mut self, slot: u32) -> Option<Sequence> {
        let sequence = self.sequences[slot as usize].take()?;
        self.order.retain(|&other| other != slot);
        self.slots.give_back(slot);
        self.pages.release(&sequence.pages);
        Some(sequence)
    }
}

impl Step {
    /// Adds the next `count` rows of a sequence.
    fn push(&mut self, sequence: &Sequence, count: usize, chooses: bool) {
        let start = self.batch.tokens.len();
        let positions = sequence.position..sequence.position + count;
        self.batch.tokens.extend(sequence.tokens[positions.clone()].iter().map(|&token| token as i32));
        self.batch.positions.extend(positions.map(|position| position as i32));
        self.batch.slots.extend(std::iter::repeat_n(sequence.slot as i32, count));
        if chooses {
            self.batch.rows.push((start + count - 1) as i32);
        }
        self.shares.push(Share { slot: sequence.slot, rows: start..start + count, chooses });
    }
}

#[cfg(test)]
mod tests;
