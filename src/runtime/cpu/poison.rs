//! Which bytes of the arena hold something that a later step needs. The rest may be filled with NaN at any time: a step
//! that reads what nobody wrote for it then shows.

use super::{CpuExecutor, span};
use crate::plan::{Bucket, Buffer, Ref};

/// Every element type reads this as NaN, or as -1.
pub(super) const POISON: u8 = 0xff;

/// When each buffer of a bucket's arena is live.
#[derive(Debug)]
pub(super) struct Liveness {
    /// Start and end in bytes, the step that first writes it, and the last step that needs it.
    buffers: Vec<(usize, usize, usize, usize)>,
}

impl Liveness {
    /// The lifetimes, from the steps in order. What the head reads from before it, and what the bucket returns, live on.
    pub(super) fn new(bucket: &Bucket) -> Self {
        let head = bucket.head as usize;
        let count = bucket.buffers.len();
        let arena =
            |place: &Ref| if let Ref::Arena(i) = *place { Some(i as usize) } else { None }.filter(|&i| i < count);
        let mut written = vec![usize::MAX; count];
        let mut needed = vec![0; count];
        for (at, step) in bucket.steps.iter().enumerate() {
            for i in step.reads.iter().filter_map(arena) {
                needed[i] = if at >= head && written[i] < head { usize::MAX } else { needed[i].max(at) };
            }
            for i in step.writes.iter().filter_map(arena) {
                written[i] = written[i].min(at);
            }
        }
        for i in bucket.outputs.iter().filter_map(|(_, place)| arena(place)) {
            needed[i] = usize::MAX;
        }
        let lifetimes = written.into_iter().zip(needed);
        let buffers = bucket.buffers.iter().zip(lifetimes).map(|(&Buffer(_, offset, bytes), (written, needed))| {
            (offset as usize, offset.saturating_add(bytes) as usize, written, needed)
        });
        let buffers = buffers.collect();
        Liveness { buffers }
    }

    /// Fills what no step from `step` on needs of what steps before it wrote.
    pub(super) fn poison(&self, step: usize, arena: &mut [u8]) {
        let room = arena.len();
        let live = self.buffers.iter().filter(|(_, _, written, needed)| *written < step && step <= *needed);
        let mut spans: Vec<(usize, usize)> = live.map(|&(start, end, ..)| (start.min(room), end.min(room))).collect();
        spans.sort_unstable();
        let mut at = 0;
        for (start, end) in spans {
            if at < start {
                arena[at..start].fill(POISON);
            }
            at = at.max(end);
        }
        if at < arena.len() {
            arena[at..].fill(POISON);
        }
    }
}

impl CpuExecutor {
    /// Fills what a step of the plan needs not, if that is wanted.
    pub(super) fn poison_before(&mut self, bucket: usize, step: usize) {
        let Some(liveness) = self.poison.as_ref().and_then(|list| list.get(bucket)) else { return };
        let program = &self.manifest.ranks[self.rank];
        let regions = self.pool.split();
        liveness.poison(step, regions.arena);
        let found = &program.buckets[bucket].steps[step];
        for &place in found.writes.iter().filter(|place| !found.reads.contains(place)) {
            if let Ref::Io(i) = place
                && let Some(io) = program.io.get(i as usize)
            {
                regions.io[span(io.offset, io.bytes)].fill(POISON);
            }
        }
    }
}
