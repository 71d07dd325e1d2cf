//! What the pool holds of a session between its requests, and how much of that the next one can use.

use super::Scheduler;
use crate::plan::{Op, Program, Slot};
use crate::runtime::{RequestError, Session};

/// What the pool holds of a session between its requests: a slot, and the pages of the rows that have run.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) session: Session,
    pub(super) slot: u32,
    /// Pages of the tokens, in the order of positions.
    pub(super) pages: Vec<u32>,
    /// The tokens whose rows have run and were wanted, from position 0 on.
    pub(super) tokens: Vec<u32>,
    /// No position from here on was written since position 0 was. It may be past the tokens: rows that were in flight when a
    /// sequence ended may have run, and rows may have been cut away since.
    pub(super) written: usize,
}

/// What of a prompt need not run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Reuse {
    /// Rows that need not.
    pub(super) kept: usize,
    /// Rows that the pool holds and that run again, because the state that the next row needs has been overwritten.
    pub(super) lost: usize,
}

impl Held {
    /// What of a prompt need not run, where `reach` is from [`reach`]. The last row of a prompt always runs: it chooses.
    pub(super) fn reuse(&self, prompt: &[u32], reach: usize) -> Reuse {
        let common = self.tokens.iter().zip(prompt).take_while(|(held, new)| held == new).count();
        let common = common.min(prompt.len().saturating_sub(1));
        if self.written.saturating_sub(common) <= reach {
            Reuse { kept: common, lost: 0 }
        } else {
            Reuse { kept: 0, lost: common }
        }
    }
}

/// How many positions may have been written from a position on, that one included, for a sequence to go on there. Keys and
/// values can be cut anywhere. A convolution of `taps` needs the columns of the `taps - 1` positions before; its ring still
/// has the earliest of these if no position `columns` later was written.
pub(super) fn reach(program: &Program) -> usize {
    let mut reach = usize::MAX;
    for semantic in &program.semantics {
        let size = |slot: Option<&Slot>, axis: usize| {
            let ty = match *slot? {
                Slot::In(i) => semantic.inputs.get(i as usize),
                Slot::Out(i) => semantic.outputs.get(i as usize),
                Slot::Temp(i) => semantic.temps.get(i as usize),
            };
            ty?.1.get(axis).map(|&size| size as usize)
        };
        let convolutions = semantic.body.iter().filter(|instr| matches!(instr.0, Op::Conv1dCausal));
        for instr in convolutions {
            // The validator has found both; without them, nothing could be cut.
            let (taps, columns) = (size(instr.1.get(1), 1), size(instr.1.get(2), 1));
            let found = taps.zip(columns).map_or(0, |(taps, columns)| (columns + 1).saturating_sub(taps));
            reach = reach.min(found);
        }
    }
    reach
}

impl Scheduler {
    /// Takes the queue's first request off it if it waits for what only sessions hold, which no step will free. To be asked
    /// when [`Scheduler::admit`] has admitted all that it can.
    pub fn refuse(&mut self) -> Option<(usize, RequestError)> {
        if !self.order.is_empty() {
            return None;
        }
        let (index, request) = self.queue.pop_front()?;
        let own = self.held.iter().find(|held| Some(held.session) == request.session);
        let has = own.map_or(0, |held| held.pages.len());
        let needed = self.pages.needed(request.prompt.len() + request.max_new_tokens).saturating_sub(has);
        let others = self.held.len() - usize::from(own.is_some());
        let (slots, pages) = self.free();
        Some((index, RequestError::NoRoom { id: request.id, needed, pages, slots, others }))
    }

    /// Forgets what the pool holds of a session without a sequence in a slot; its slot and pages are free.
    pub fn forget(&mut self, session: Session) {
        if let Some(at) = self.held.iter().position(|held| held.session == session) {
            let held = self.held.remove(at);
            self.slots.give_back(held.slot);
            self.pages.release(&held.pages);
        }
    }

    /// Slots and pages that are free.
    pub fn free(&self) -> (usize, usize) {
        (self.slots.free(), self.pages.free())
    }

    /// Positions that one sequence can have if it has the pool for itself.
    pub fn most_positions(&self) -> usize {
        self.max_context.min(self.pages.total() * self.pages.page_tokens())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Phase;
    use crate::runtime::mock::{bucket, manifest};

    #[test]
    fn reach_follows_from_taps_and_columns() {
        let mut program = manifest(2, 8, 8, 8, vec![bucket(Phase::Decode, 1, 1, 1)]).ranks.remove(0);
        assert_eq!(reach(&program), 6, "3 taps, 8 columns");
        let mut other = program.semantics[0].clone();
        other.inputs[1].1 = vec![1, 5];
        program.semantics.push(other);
        assert_eq!(reach(&program), 4, "the widest counts");
        program.semantics.clear();
        assert_eq!(reach(&program), usize::MAX);
    }

    #[test]
    fn reuse_is_the_common_prefix_as_far_back_as_the_ring_has_columns() {
        let held = Held { session: Session(0), slot: 0, pages: vec![], tokens: (0..10).collect(), written: 12 };
        let reuse = |prompt: &[u32]| {
            let Reuse { kept, lost } = held.reuse(prompt, 6);
            (kept, lost)
        };
        let all: Vec<u32> = (0..20).collect();
        assert_eq!(reuse(&all), (10, 0));
        assert_eq!(reuse(&all[..10]), (9, 0), "the last row runs");
        assert_eq!(reuse(&all[..7]), (6, 0));
        assert_eq!(reuse(&all[..6]), (0, 5), "the column of position 3 is that of 11 now");
        assert_eq!(reuse(&[0, 1, 2, 3, 4, 5, 9, 7]), (6, 0));
        assert_eq!(reuse(&[9]), (0, 0));
    }
}
