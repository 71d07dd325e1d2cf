//! The queue, and the one rule by which steps follow each other. It knows no executor and no clock: the steps depend on the
//! requests and on the tokens chosen, never on timing.
//!
//! Steps are planned ahead of their tokens: up to L of them, the lookahead, are *in flight*, which is planned and not
//! completed. Completing a step says which tokens it chose. Steps are completed in the order in which they were planned.
//!
//! **When.** Steps are planned until L are in flight or nothing can be planned, because every row of every sequence in a slot
//! has been; then the oldest is completed, and so on. So step n + L is planned when exactly the steps up to n are completed,
//! unless rows ran out before. With L = 1 a step is planned when the one before is completed.
//!
//! **What.** Between two planned steps:
//!
//! 1. Sequences that ended, by the steps completed so far, have left; their slots and pages are free.
//! 2. Requests are admitted in the order in which they came, each to the lowest free slot and the lowest free pages for all of
//!    its prompt and new tokens. The first that finds too few waits, and all behind it: none overtakes.
//! 3. A decode round that has begun goes on. Otherwise, if prompt rows are left, a prefill step is planned, unless the last
//!    planned was one and a sequence is decoding. Otherwise a decode round begins. So a decoding sequence waits for at most one
//!    prefill step a token, and a prompt for at most one decode round a chunk.
//!
//! A prefill step takes sequences in the order of admission, from each as many of its prompt rows as fit: the largest prefill
//! bucket's rows are filled, the last sequence's share may be a part, and `chunk` bounds every share. It runs in the smallest
//! bucket that holds what was packed. A prompt alone therefore runs in chunks of the largest bucket, then in the smallest that
//! holds the rest. Only the last row of a prompt gets logits; they give the first new token.
//!
//! A decode round plans one row of every sequence whose prompt is planned and that has a row left, in the order of slots: as
//! many steps of the largest decode bucket as are filled, then one of the smallest that holds the rest. A row whose token is
//! chosen by a step in flight says [`PENDING`](super::PENDING).
//!
//! **Ends.** A sequence has `prompt + max_new_tokens - 1` rows, and none is planned beyond. That it ended before, by a token or
//! by the caller, is known when the step n that chose its last token is completed; by then the steps n + 1 to n + L - 1 may
//! hold rows of it. Those shares are marked as dropped, and nothing is made of their tokens. The slot and the pages are free
//! at once, all the same: an executor does everything in the order of the calls ([`Executor`](super::Executor)), so the
//! rows in flight run before anything of the next sequence there, which begins at position 0 and reads nothing that it
//! has not written.
//!
//! **Sessions.** A sequence with a [`Session`](super::Session) keeps its slot and the pages of its rows when it ends, until
//! [`Scheduler::forget`]. The session's next request has the whole conversation as its prompt, and waits until the one before
//! has ended. It is admitted to the same slot, keeps the pages and gets the lowest free ones for the rest. Of its prompt, the
//! rows that it shares with what the slot holds are not planned, so it begins at the first position where the two differ;
//! at the latest at the prompt's last row, which has to choose. The token chosen last was never run: it is among the rows of the
//! next prompt. So a session changes which rows run, and no result.
//!
//! Cutting a sequence back leaves rows behind it, as do steps that were in flight when it ended. Attention never looks at
//! them. But in a convolution's ring they stand where earlier columns were: a sequence goes on at a position only if the
//! columns before it are still there, whatever may have been written since position 0 was; else it begins at position 0.
//!
//! Sessions that have ended wait for nobody: a request that can be admitted only when a session is forgotten is refused as soon
//! as no sequence is left in a slot ([`Scheduler::refuse`]).

mod load;
mod lockstep;
mod sequence;
mod session;
mod step;

use std::collections::VecDeque;
use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};

use self::lockstep::Packed;
pub use self::lockstep::{Agreed, Wish};
pub use self::sequence::Sequence;
use self::session::{Held, Reuse, reach};
pub use self::step::{Share, Step};
use super::buckets::{Buckets, i32_size};
use super::pages::{FreeList, Pages};
use super::request::{FinishReason, Request, RequestError};
use crate::plan::{Manifest, Phase};

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
    /// Sessions without a sequence in their slots.
    held: Vec<Held>,
    /// How far a sequence may be cut back; see [`reach`].
    reach: usize,
    /// Slot from which the decode round goes on; `None` between rounds.
    round: Option<u32>,
    /// Of the last planned step.
    phase: Phase,
    /// Steps in flight, the oldest first.
    planned: VecDeque<Step>,
    /// The records of the steps that may be in flight besides.
    spare: Vec<Step>,
    /// Room for the wishes of a group.
    wishes: Vec<u8>,
}

impl Scheduler {
    /// An empty queue for a plan. `chunk` bounds the rows that one prompt runs in a step, `lookahead` the steps in flight.
    ///
    /// # Errors
    /// The plan has no bucket, slot or page for sequences, or `chunk` or `lookahead` is 0.
    pub fn new(manifest: &Manifest, chunk: Option<usize>, lookahead: usize) -> Result<Self> {
        let limits = &manifest.limits;
        let program =
            manifest.ranks.first().context("plan: expected a program for rank 0, found no rank; compile again")?;
        ensure!(chunk != Some(0), "--chunk: expected at least 1 row, found 0; leave it out to run prompts whole");
        ensure!(lookahead > 0, "executor: expected a lookahead of at least 1 step, found 0; this is a bug");
        ensure!(
            limits.max_sequences > 0 && limits.max_context > 0,
            "limits of the plan: expected room for at least one sequence, found max_sequences = {}, max_context = {}; \
             compile with a larger --max-sequences and --max-context",
            limits.max_sequences,
            limits.max_context
        );
        let slots = i32_size("limits of the plan: max_sequences", limits.max_sequences)?;
        let buckets = Buckets::new(program)?;
        let record = Step::with_room_for(buckets.largest_prefill(), buckets.largest_decode());
        Ok(Scheduler {
            vocab: i32_size("vocabulary of the plan", manifest.model.vocab)?,
            max_context: i32_size("limits of the plan: max_context", limits.max_context)?,
            chunk: chunk.unwrap_or(usize::MAX),
            buckets,
            slots: FreeList::new(slots as u32),
            pages: Pages::new(limits)?,
            queue: VecDeque::new(),
            sequences: Vec::new(),
            order: Vec::new(),
            held: Vec::new(),
            reach: reach(program),
            round: None,
            // Nothing decodes at first, so this only says that no prefill step came before.
            phase: Phase::Decode,
            planned: VecDeque::with_capacity(lookahead),
            spare: (0..lookahead).map(|_| record.clone()).collect(),
            wishes: Vec::new(),
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

    /// Moves the queue's first request into a slot. The caller gives the slot's pages, sampling parameters and stops to the
    /// executor before the next step. `None` if the queue is empty or its first has to wait.
    pub fn admit(&mut self) -> Option<&Sequence> {
        let (_, request) = self.queue.front()?;
        let positions = request.prompt.len() + request.max_new_tokens;
        let held = self.held.iter().position(|held| Some(held.session) == request.session);
        let (slot, pages, written, Reuse { kept, lost }) = if let Some(at) = held {
            if !self.pages.resize(&mut self.held[at].pages, positions) {
                return None;
            }
            let held = self.held.remove(at);
            let reuse = held.reuse(&request.prompt, self.reach);
            (held.slot, held.pages, if reuse.kept > 0 { held.written } else { 0 }, reuse)
        } else {
            let running = self.sequences().any(|other| other.session.is_some() && other.session == request.session);
            if running || self.slots.free() == 0 {
                return None;
            }
            let pages = self.pages.reserve(positions)?;
            (self.slots.take_one()?, pages, 0, Reuse { kept: 0, lost: 0 })
        };
        let (index, Request { id, prompt, max_new_tokens, eos, sampling, session }) = self.queue.pop_front()?;
        let (prompt_tokens, mut tokens, position) = (prompt.len(), prompt, kept);
        tokens.reserve_exact(max_new_tokens);
        self.order.push(slot);
        let place = slot as usize;
        if self.sequences.len() <= place {
            self.sequences.resize(place + 1, None);
        }
        let sequence = Sequence {
            index,
            id,
            slot,
            pages,
            tokens,
            prompt_tokens,
            position,
            max_new_tokens,
            eos,
            sampling,
            session,
            kept,
            lost,
            written,
        };
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

    /// Steps in flight.
    pub fn in_flight(&self) -> usize {
        self.planned.len()
    }

    /// The oldest step in flight, which [`Scheduler::complete`] takes the tokens of.
    pub fn oldest(&self) -> Option<&Step> {
        self.planned.front()
    }

    /// Plans the next step, which is in flight from then on; `None` if as many as may be are, or no rows are left to plan.
    /// To follow the rule above, call it until then, and then [`Scheduler::complete`] once.
    pub fn next_step(&mut self) -> Option<&Step> {
        if !self.has_spare_step() {
            return None;
        }
        match self.wish(false).agree() {
            Agreed::Step(phase, bucket) => self.plan_step(phase, bucket),
            Agreed::Later | Agreed::Over => None,
        }
    }

    /// Plans the rows that this scheduler has for a step of a phase, none if it has none, in a bucket that holds them; `None` if as many
    /// steps as may be are in flight.
    pub fn plan_step(&mut self, phase: Phase, bucket: usize) -> Option<&Step> {
        let mut step = self.spare.pop()?;
        step.clear();
        if self.in_round().next().is_none() {
            // Those that the round had left have ended.
            self.round = None;
        }
        match phase {
            Phase::Prefill => self.pack_prefill(&mut step),
            Phase::Decode | Phase::Fixed => self.pack_decode(&mut step),
        }
        (step.phase, step.bucket) = (phase, bucket);
        self.phase = phase;
        self.planned.push_back(step);
        self.planned.back()
    }

    fn pack_prefill(&mut self, step: &mut Step) {
        let (largest, mut packed) = (self.buckets.largest_prefill(), Packed::default());
        for &slot in &self.order {
            let Some(sequence) = &mut self.sequences[slot as usize] else { continue };
            if sequence.prompt_rows_left() > 0 {
                let Some((count, chooses)) = packed.add(sequence, largest, self.chunk) else { break };
                step.push(sequence, count, chooses);
            }
        }
    }

    fn pack_decode(&mut self, step: &mut Step) {
        let largest = self.buckets.largest_decode().decodes();
        let first = self.round.take().unwrap_or(0);
        let from = self.sequences.iter_mut().skip(first as usize).flatten();
        for sequence in from.filter(|sequence| sequence.is_decoding()) {
            if step.shares.len() == largest {
                self.round = Some(sequence.slot);
                break;
            }
            step.push(sequence, 1, true);
        }
    }

    /// The sequences that the decode round has left, if one has begun.
    fn in_round(&self) -> impl Iterator<Item = &Sequence> {
        let first = self.round.map_or(usize::MAX, |slot| slot as usize);
        self.sequences.iter().skip(first).flatten().filter(|sequence| sequence.is_decoding())
    }

    /// Takes the tokens chosen by the oldest step in flight, one for each of its rows with logits. `on_token` sees each
    /// token of a sequence that has not ended, and may stop it; `on_end` gets the sequences that have ended, whose slots and
    /// pages are free by then, or their sessions'.
    ///
    /// # Errors
    /// No step is in flight, or the tokens are not as many as the rows, or not of the vocabulary; nothing has changed then.
    pub fn complete(
        &mut self,
        chosen: &[i32],
        mut on_token: impl FnMut(&Sequence, u32) -> ControlFlow<()>,
        mut on_end: impl FnMut(Sequence, FinishReason),
    ) -> Result<()> {
        self.check_chosen(chosen)?;
        let Some(step) = self.planned.pop_front() else { return Ok(()) };
        let mut chosen = chosen.iter();
        for share in &step.shares {
            let token = if share.chooses { chosen.next() } else { None };
            if share.dropped {
                continue;
            }
            let Some(sequence) = &mut self.sequences[share.slot as usize] else { continue };
            let last_row = share.rows.end - 1;
            let runs_out = step.batch.positions[last_row] as usize == sequence.last_position();
            let mut reason = runs_out.then_some(FinishReason::Length);
            if let Some(&token) = token {
                let token = token as u32;
                sequence.tokens.push(token);
                let stopped = on_token(sequence, token).is_break();
                if sequence.eos.contains(&token) {
                    reason = Some(FinishReason::Eos);
                } else if stopped {
                    reason = Some(FinishReason::Stop);
                }
            }
            if let Some(reason) = reason
                && let Some(sequence) = self.end(share.slot)
            {
                on_end(sequence, reason);
            }
        }
        self.spare.push(step);
        Ok(())
    }

    fn check_chosen(&self, chosen: &[i32]) -> Result<()> {
        let step = self.oldest().context("scheduler: expected a step in flight, found none; this is a bug")?;
        let (expected, found) = (step.batch.rows.len(), chosen.len());
        ensure!(expected == found, "executor: expected {expected} chosen tokens, found {found}; this is a bug");
        let mut wanted = step.choosing().zip(chosen).filter(|(share, _)| !share.dropped);
        if let Some((_, bad)) = wanted.find(|&(_, &token)| token < 0 || token as usize >= self.vocab) {
            anyhow::bail!("executor: expected tokens below {}, found {bad}; the logits may be NaN", self.vocab);
        }
        Ok(())
    }

    /// Forgets all sequences, sessions, requests and steps, as after an executor has failed.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.round = None;
        self.phase = Phase::Decode;
        self.spare.extend(self.planned.drain(..));
        for slot in std::mem::take(&mut self.order) {
            self.sequences[slot as usize].take();
        }
        self.held.clear();
        self.slots.free_all();
        self.pages.free_all();
    }

    /// Takes a sequence out of its slot, which is free then or held by its session.
    fn end(&mut self, slot: u32) -> Option<Sequence> {
        let mut sequence = self.sequences[slot as usize].take()?;
        self.order.retain(|&other| other != slot);
        for share in self.planned.iter_mut().flat_map(|step| &mut step.shares) {
            share.dropped |= share.slot == slot;
        }
        if let Some(session) = sequence.session {
            let tokens = sequence.tokens[..sequence.rows_run()].to_vec();
            let written = sequence.written.max(sequence.position);
            let mut pages = std::mem::take(&mut sequence.pages);
            self.pages.resize(&mut pages, tokens.len());
            self.held.push(Held { session, slot, pages, tokens, written });
        } else {
            self.slots.give_back(slot);
            self.pages.release(&sequence.pages);
        }
        Some(sequence)
    }
}

#[cfg(test)]
mod session_tests;
#[cfg(test)]
mod tests;
