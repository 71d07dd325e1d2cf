//! Which step comes next: of one scheduler, or of several that run the same steps, each with rows of its own.
//!
//! Prefill and decode take turns where there are rows for both, and a decode round that was begun is ended first. Of several schedulers, the
//! rows of all count; the bucket is the largest that any of them needs, and who has no rows of that phase runs padding.

use anyhow::{Result, ensure};

use super::{Scheduler, Sequence};
use crate::plan::Phase;
use crate::runtime::buckets::Capacity;
use crate::runtime::group::Group;

/// What a scheduler could run next.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Wish {
    /// The bucket that its rows of prompts need, if it has such.
    pub prefill: Option<usize>,
    /// The bucket that its decoding sequences need, if it has such.
    pub decode: Option<usize>,
    /// Whether sequences of a decode round are left.
    pub in_round: bool,
    /// Whether it has no work left, and gets none.
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
const BYTES: usize = 10;

impl Wish {
    /// What follows from the wishes of all, after a step of phase `last`.
    pub fn agree(wishes: &[Wish], last: Phase) -> Agreed {
        let prefill = wishes.iter().filter_map(|wish| wish.prefill).max();
        let decode = wishes.iter().filter_map(|wish| wish.decode).max();
        let in_round = wishes.iter().any(|wish| wish.in_round);
        let turn = decode.is_none() || last != Phase::Prefill;
        match (prefill, decode) {
            (Some(bucket), _) if turn && !in_round => Agreed::Step(Phase::Prefill, bucket),
            (_, Some(bucket)) => Agreed::Step(Phase::Decode, bucket),
            _ if wishes.iter().all(|wish| wish.over) => Agreed::Over,
            _ => Agreed::Later,
        }
    }

    fn to_bytes(self) -> [u8; BYTES] {
        let bucket = |bucket: Option<usize>| bucket.map_or(u32::MAX, |bucket| bucket as u32).to_le_bytes();
        let mut bytes = [0; BYTES];
        bytes[..4].copy_from_slice(&bucket(self.prefill));
        bytes[4..8].copy_from_slice(&bucket(self.decode));
        (bytes[8], bytes[9]) = (u8::from(self.in_round), u8::from(self.over));
        bytes
    }

    fn from_bytes(bytes: &[u8; BYTES]) -> Wish {
        let bucket = |at: usize| {
            let bucket = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            (bucket != u32::MAX).then_some(bucket as usize)
        };
        Wish { prefill: bucket(0), decode: bucket(4), in_round: bytes[8] != 0, over: bytes[9] != 0 }
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
            over,
        }
    }

    /// What the schedulers of a group run next. All of them have the same plan, and as many steps in flight.
    ///
    /// # Errors
    /// The group failed.
    pub fn agree(&self, group: &mut dyn Group, over: bool) -> Result<Agreed> {
        let mut all = vec![0; group.size() * BYTES];
        group.all_gather(&self.wish(over).to_bytes(), &mut all)?;
        let (wishes, rest) = all.as_chunks::<BYTES>();
        ensure!(rest.is_empty(), "expected whole wishes, found {} bytes; this is a bug", all.len());
        let wishes: Vec<Wish> = wishes.iter().map(Wish::from_bytes).collect();
        Ok(Wish::agree(&wishes, self.phase))
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

    #[test]
    fn the_largest_bucket_that_any_needs_runs_in_turns() {
        let wishes = [wish(Some(2), None), wish(None, Some(5)), wish(Some(1), Some(4)), Wish::default()];
        assert_eq!(Wish::agree(&wishes, Phase::Decode), Agreed::Step(Phase::Prefill, 2));
        assert_eq!(Wish::agree(&wishes, Phase::Prefill), Agreed::Step(Phase::Decode, 5));
        // Nobody decodes: prompts go on.
        assert_eq!(Wish::agree(&wishes[..1], Phase::Prefill), Agreed::Step(Phase::Prefill, 2));
        let in_round = Wish { in_round: true, ..wishes[1] };
        assert_eq!(Wish::agree(&[wishes[0], in_round], Phase::Decode), Agreed::Step(Phase::Decode, 5));
    }

    #[test]
    fn it_is_over_when_it_is_for_all() {
        let over = Wish { over: true, ..Wish::default() };
        assert_eq!(Wish::agree(&[over, Wish::default()], Phase::Decode), Agreed::Later);
        assert_eq!(Wish::agree(&[over, wish(Some(0), None)], Phase::Decode), Agreed::Step(Phase::Prefill, 0));
        assert_eq!(Wish::agree(&[over, over], Phase::Decode), Agreed::Over);
    }

    #[test]
    fn wishes_arrive_as_they_are() {
        for prefill in [None, Some(0), Some(70_000)] {
            for (in_round, over) in [(false, true), (true, false)] {
                let wish = Wish { prefill, decode: prefill.map(|bucket| bucket + 1), in_round, over };
                assert_eq!(Wish::from_bytes(&wish.to_bytes()), wish);
            }
        }
    }
}
