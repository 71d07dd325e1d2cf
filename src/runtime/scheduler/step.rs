//! A step: whose rows run in which bucket.

use std::ops::Range;

use super::sequence::Sequence;
use crate::plan::Phase;
use crate::runtime::Batch;
use crate::runtime::buckets::Capacity;

/// One sequence's rows of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Share {
    /// Slot of the sequence.
    pub slot: u32,
    /// Its rows of the batch.
    pub rows: Range<usize>,
    /// Whether its last row gets logits, which give a new token.
    pub chooses: bool,
    /// Whether its sequence was found to have ended after the step was planned. Nobody wants the results then, and the slot
    /// may be another sequence's.
    pub dropped: bool,
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

impl Step {
    /// An empty step with room for what either bucket holds.
    pub(super) fn with_room_for(a: Capacity, b: Capacity) -> Self {
        let tokens = a.tokens.max(b.tokens);
        let batch = Batch {
            tokens: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            slots: Vec::with_capacity(tokens),
            rows: Vec::with_capacity(a.rows.max(b.rows)),
        };
        Step { phase: Phase::Decode, bucket: 0, batch, shares: Vec::with_capacity(a.sequences.max(b.sequences)) }
    }

    /// The shares that choose a token, in the order of `batch.rows`.
    pub fn choosing(&self) -> impl Iterator<Item = &Share> {
        self.shares.iter().filter(|share| share.chooses)
    }

    /// Rows whose results are wanted.
    pub fn wanted_rows(&self) -> usize {
        self.shares.iter().filter(|share| !share.dropped).map(|share| share.rows.len()).sum()
    }

    /// Empties it; what it has allocated stays.
    pub(super) fn clear(&mut self) {
        self.batch.tokens.clear();
        self.batch.positions.clear();
        self.batch.slots.clear();
        self.batch.rows.clear();
        self.shares.clear();
    }

    /// Plans the next `count` rows of a sequence.
    pub(super) fn push(&mut self, sequence: &mut Sequence, count: usize, chooses: bool) {
        let start = self.batch.tokens.len();
        let positions = sequence.position..sequence.position + count;
        self.batch.tokens.extend(positions.clone().map(|position| sequence.token(position)));
        self.batch.positions.extend(positions.map(|position| position as i32));
        self.batch.slots.extend(std::iter::repeat_n(sequence.slot as i32, count));
        if chooses {
            self.batch.rows.push((start + count - 1) as i32);
        }
        self.shares.push(Share { slot: sequence.slot, rows: start..start + count, chooses, dropped: false });
        sequence.position += count;
    }
}
