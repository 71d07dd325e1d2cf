//! Steps in flight: they have run, because the CPU runs each as it is enqueued, but nobody has collected their tokens.

use std::borrow::Cow;
use std::collections::VecDeque;

use anyhow::{Context, Result, bail, ensure};

use crate::runtime::{Batch, PENDING};

/// What a device would keep of the tokens it chose.
#[derive(Debug)]
pub(super) struct Flight {
    lookahead: usize,
    /// The tokens chosen by each step in flight, the oldest first.
    chosen: VecDeque<Vec<i32>>,
    /// By slot: the token that its sequence chose last.
    last: Vec<Option<i32>>,
}

impl Flight {
    pub(super) fn new(lookahead: usize) -> Self {
        Flight { lookahead: lookahead.max(1), chosen: VecDeque::new(), last: Vec::new() }
    }

    pub(super) fn lookahead(&self) -> usize {
        self.lookahead
    }

    /// Forgets what the sequence before in a slot chose.
    pub(super) fn begin(&mut self, slot: u32) {
        *self.last_of(slot as usize) = None;
    }

    /// The tokens of a checked batch that is to run next, with those that are pending.
    pub(super) fn tokens<'b>(&self, batch: &'b Batch) -> Result<Cow<'b, [i32]>> {
        let (found, most) = (self.chosen.len(), self.lookahead);
        ensure!(found < most, "expected fewer than {most} steps in flight, found {found}; collect one first");
        if !batch.tokens.contains(&PENDING) {
            return Ok(Cow::Borrowed(&batch.tokens));
        }
        let resolve = |(&token, &slot): (&i32, &i32)| match self.last.get(slot as usize) {
            _ if token != PENDING => Ok(token),
            Some(&Some(last)) => Ok(last),
            _ => bail!("a pending token of slot {slot}, which has chosen none"),
        };
        batch.tokens.iter().zip(&batch.slots).map(resolve).collect()
    }

    /// Keeps what a batch chose.
    pub(super) fn push(&mut self, batch: &Batch, chosen: Vec<i32>) {
        for (&row, &token) in batch.rows.iter().zip(&chosen) {
            *self.last_of(batch.slots[row as usize] as usize) = Some(token);
        }
        self.chosen.push_back(chosen);
    }

    /// Hands out what the oldest step chose.
    pub(super) fn pop(&mut self, tokens: &mut Vec<i32>) -> Result<()> {
        tokens.extend(self.chosen.pop_front().context("expected a step in flight, found none")?);
        Ok(())
    }

    pub(super) fn discard(&mut self) {
        self.chosen.clear();
    }

    fn last_of(&mut self, slot: usize) -> &mut Option<i32> {
        if self.last.len() <= slot {
            self.last.resize(slot + 1, None);
        }
        &mut self.last[slot]
    }
}
