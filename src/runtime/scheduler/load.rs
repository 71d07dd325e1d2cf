//! How much there is to do, and how much there could be, for those who divide work among several schedulers.

use super::{Scheduler, Sequence};
use crate::runtime::Request;

impl Scheduler {
    /// Whether nothing is in work: no sequence in a slot, no step in flight.
    pub fn is_idle(&self) -> bool {
        self.order.is_empty() && self.planned.is_empty()
    }

    /// Rows that are still to be planned, if no sequence ends before its last, those of requests that wait too.
    pub fn remaining_rows(&self) -> usize {
        let rows = |sequence: &Sequence| (sequence.last_position() + 1).saturating_sub(sequence.position);
        let waiting = self.queue.iter().map(|(_, request)| request.rows());
        self.sequences().map(rows).sum::<usize>() + waiting.sum::<usize>()
    }

    /// Sequences that may be in work at a time, and the pages that they share.
    pub fn capacity(&self) -> (usize, usize) {
        (self.slots.total(), self.pages.total())
    }

    /// Pages that a request needs.
    pub fn pages_for(&self, request: &Request) -> usize {
        self.pages.needed(request.prompt.len().saturating_add(request.max_new_tokens))
    }
}
