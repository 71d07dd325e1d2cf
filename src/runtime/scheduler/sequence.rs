//! A sequence in a slot.

use crate::runtime::{PENDING, SamplingParams, Session};

/// A sequence in a slot. Its rows up to `position` are planned, and have run or are in flight; those from there on are
/// still to be planned. The tokens of its rows become known later than that: at most as many are missing as steps are in
/// flight.
#[derive(Clone, PartialEq, Debug)]
pub struct Sequence {
    /// The caller's number of the request, as given to [`Scheduler::submit`](super::Scheduler::submit).
    pub index: usize,
    /// The request's id.
    pub id: u64,
    /// Slot.
    pub slot: u32,
    /// Pages, in the order of positions.
    pub pages: Vec<u32>,
    /// Prompt, then the new tokens that are known.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Rows that are planned.
    pub position: usize,
    /// New tokens at the most.
    pub max_new_tokens: usize,
    /// Tokens that end it.
    pub eos: Vec<u32>,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// The session that it is part of.
    pub session: Option<Session>,
    /// Rows of the prompt that the pool held and that are not planned: it began at this position.
    pub kept: usize,
    /// Rows of the prompt that the pool held and that run all the same; see [`Scheduler`](super::Scheduler).
    pub lost: usize,
    /// Where it began past position 0: no position from here on was written in its slot before.
    pub(super) written: usize,
}

impl Sequence {
    /// Rows of the prompt that are not planned.
    pub fn prompt_rows_left(&self) -> usize {
        self.prompt_tokens.saturating_sub(self.position)
    }

    /// Number of new tokens that are known.
    pub fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Position of its last row if nothing ends it before: the last new token is never run.
    pub fn last_position(&self) -> usize {
        (self.prompt_tokens + self.max_new_tokens.saturating_sub(1)).saturating_sub(1)
    }

    /// Rows whose tokens are wanted and that have run, once it has ended: all but that of the last new token.
    pub(super) fn rows_run(&self) -> usize {
        self.prompt_tokens + self.new_tokens().saturating_sub(1)
    }

    /// Whether the next row to plan is one of a decode step.
    pub(super) fn is_decoding(&self) -> bool {
        self.prompt_rows_left() == 0 && self.position <= self.last_position()
    }

    /// The token of a row.
    pub(super) fn token(&self, position: usize) -> i32 {
        self.tokens.get(position).map_or(PENDING, |&token| token as i32)
    }
}
