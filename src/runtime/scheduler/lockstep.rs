//! Which step comes next: of one scheduler, or of several that run the same steps, each with rows of its own.
//!
//! Prefill and decode take turns where there are rows for both, and a decode round that was begun is ended first. Of several schedulers, the
//! rows of all count; the bucket is the largest that any of them needs, and who has no rows of that phase runs padding.

use anyhow::{Context, Result};

use super::{Scheduler, Sequence};
use crate::plan::Phase;
use crate::runtime::buckets::Capacity;
use crate::runtime::group::Group;

/// What a scheduler could run next, or several that run the same steps.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Wish {
    /// The bucket that the rows of prompts need, if there are such.
    pub prefill: Option<usize>,
    /// The bucket that the decoding sequences need, if there are such.
    pub decode: Option<usize>,
    /// Whether sequences of a decode round are left.
    pub in_round: bool,
    /// Whether the step before was one of prompts.
    pub after_prefill: bool,
    /// Whether no work is left, and none comes.
    pub over: bool,
}

/// What comes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Agreed {
    /// A step of this phase in this bucket.
    Step(Phase, usize),
    /// Nothing now.
    Later,
    /// Nothing any more.
    Over,
}

/// Bytes of a wish on its way.
const BYTES: usize = 11;

impl Wish {
    /// What follows from it. Of schedulers that run the same steps, each asks this of the wish of all, and so finds the same.
    pub fn agree(self) -> Agreed {
        let turn = self.decode.is_none() || !self.after_prefill;
        match (self.prefill, self.decode) {
            (Some(bucket), _) if turn && !self.in_round => Agreed::Step(Phase::Prefill, bucket),
            (_, Some(bucket)) => Agreed::Step(Phase::Decode, bucket),
            _ if self.over => Agreed::Over,
            _ => Agreed::Later,
        }
    }

    /// The wish of both: what either has is wanted, in the larger bucket; only both together are through.
    fn and(self, other: Wish) -> Wish {
        Wish {
            prefill: self.prefill.max(other.prefill),
            decode: self.decode.max(other.decode),
            in_round: self.in_round || other.in_round,
            after_prefill: self.after_prefill || other.after_prefill,
            over: self.over && other.over,
        }
    }

    fn to_bytes(self) -> [u8; BYTES] {
        let bucket = |bucket: Option<usize>| bucket.map_or(u32::MAX, |bucket| bucket as u32).to_le_bytes();
        let mut bytes = [0; BYTES];
        bytes[..4].copy_from_slice(&bucket(self.prefill));
        bytes[4..8].copy_from_slice(&bucket(self.decode));
        bytes[8..].copy_from_slice(&[self.in_round, self.after_prefill, self.over].map(u8::from));
        bytes
    }

    fn from_bytes(bytes: &[u8; BYTES]) -> Wish {
        let bucket = |at: usize| {
            let bucket = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            (bucket != u32::MAX).then_some(bucket as usize)
        };
        let [in_round, after_prefill, over] = [8, 9, 10].map(|at| bytes[at] != 0);
        Wish { prefill: bucket(0), decode: bucket(4), in_round, after_prefill, over }
    }
}

/// What a prefill step holds so far.
#[derive(Default)]
pub(super) struct Packed {
    tokens: usize,
    sequences: usize,
    rows: usize,
}

impl Packed {
    /// Adds rows of a sequence's prompt: how many, and whether they choose a token; `None` if there is no room.
    pub(super) fn add(&mut self, sequence: &Sequence, largest: Capacity, chunk: usize) -> Option<(usize, bool)> {
        let left = sequence.prompt_rows_left();
        let room = largest.tokens - self.tokens;
        let count = left.min(room).min(chunk).min(largest.rows_per_sequence);
        let chooses = count == left && sequence.max_new_tokens > 0;
        let no_row = chooses && self.rows == largest.rows;
        if count == 0 || no_row || self.sequences == largest.sequences {
            return None;
        }
        self.tokens += count;
        self.sequences += 1;
        self.rows += usize::from(chooses);
        Some((count, chooses))
    }
}

impl Scheduler {
    /// What could run next; `over` if nothing is left.
    pub fn wish(&self, over: bool) -> Wish {
        let (largest, mut packed) = (self.buckets.largest_prefill(), Packed::default());
        for sequence in self.sequences().filter(|sequence| sequence.prompt_rows_left() > 0) {
            if packed.add(sequence, largest, self.chunk).is_none() {
                break;
            }
        }
        let prefill = self.buckets.prefill(packed.tokens, packed.sequences, packed.rows).bucket;
        let in_round = self.in_round().count();
        let decoding =
            if in_round > 0 { in_round } else { self.sequences().filter(|sequence| sequence.is_decoding()).count() };
        let decode = self.buckets.decode(decoding.min(self.buckets.largest_decode().decodes())).bucket;
        Wish {
            prefill: (packed.tokens > 0).then_some(prefill),
            decode: (decoding > 0).then_some(decode),
            in_round: in_round > 0,
            after_prefill: self.phase == Phase::Prefill,
            over,
        }
    }

    /// What the schedulers of a group run next. All of them have the same plan, and as many steps in flight.
    ///
    /// # Errors
    /// The group failed.
    pub fn agree(&mut self, group: &mut dyn Group, over: bool) -> Result<Agreed> {
        let own = self.wish(over).to_bytes();
        self.wishes.resize(group.size() * BYTES, 0);
        group.all_gather(&own, &mut self.wishes)?;
        let (wishes, _) = self.wishes.as_chunks();
        let all = wishes.iter().map(Wish::from_bytes).reduce(Wish::and);
        Ok(all.context("a group has at least one rank")?.agree())
    }

    /// Whether another step may be in flight.
    pub fn has_spare_step(&self) -> bool {
        !self.spare.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(prefill: Option<usize>, decode: Option<usize>) -> Wish {
        Wish { prefill, decode, ..Wish::default() }
    }

    /// What those with these wishes run after a step of prompts, or another.
    fn agreed<const N: usize>(wishes: [Wish; N], after_prefill: bool) -> Agreed {
        wishes.map(|wish| Wish { after_prefill, ..wish }).into_iter().reduce(Wish::and).expect("one at least").agree()
    }

    #[test]
    fn the_largest_bucket_that_any_needs_runs_in_turns() {
        let wishes = [wish(Some(2), None), wish(None, Some(5)), wish(Some(1), Some(4)), Wish::default()];
        assert_eq!(agreed(wishes, false), Agreed::Step(Phase::Prefill, 2));
        assert_eq!(agreed(wishes, true), Agreed::Step(Phase::Decode, 5));
        // Nobody decodes: prompts go on.
        assert_eq!(agreed([wishes[0]], true), Agreed::Step(Phase::Prefill, 2));
        let in_round = Wish { in_round: true, ..wishes[1] };
        assert_eq!(agreed([wishes[0], in_round], false), Agreed::Step(Phase::Decode, 5));
    }

    #[test]
    fn it_is_over_when_it_is_for_all() {
        let over = Wish { over: true, ..Wish::default() };
        assert_eq!(agreed([over, Wish::default()], false), Agreed::Later);
        assert_eq!(agreed([over, wish(Some(0), None)], false), Agreed::Step(Phase::Prefill, 0));
        assert_eq!(agreed([over, over], false), Agreed::Over);
    }

    #[test]
    fn wishes_arrive_as_they_are() {
        for prefill in [None, Some(0), Some(70_000)] {
            for flags in 0..8 {
                let [in_round, after_prefill, over] = [1, 2, 4].map(|flag| flags & flag != 0);
                let wish = Wish { prefill, decode: prefill.map(|bucket| bucket + 1), in_round, after_prefill, over };
                assert_eq!(Wish::from_bytes(&wish.to_bytes()), wish);
            }
        }
    }
}
