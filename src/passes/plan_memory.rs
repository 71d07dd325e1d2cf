//! Plan-memory: a byte offset for every buffer of the arena.
//!
//! A buffer may take the bytes of another only if every access to that other one happens before its own definition, over
//! the dependency edges: steps without a path between them may run at the same time. What the graph returns and what the
//! head reads of the steps before it live to the end, because the head may run again.
//!
//! Where that costs more memory than the order of the steps would (5 % and 64 KiB above the lower bound), the buffers are
//! placed by the order instead, and the schedule gets the edges that this needs.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use fixedbitset::FixedBitSet;

use crate::ir::{Extents, Graph, ValueId};
use crate::passes::schedule::{Schedule, Storage, reduce, storage};

/// More tries at a placement above the lower bound.
const MAX_RETRIES: usize = 64;

/// Where every value of the arena lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// The buffers, by the step that defines them, then by the operator's result.
    pub buffers: Vec<PlacedBuffer>,
    /// Bytes of the arena that are used at all; a multiple of the alignment.
    pub bytes: u64,
    /// The largest sum of live bytes at one step of the order, each rounded to the alignment: no placement needs less.
    pub lower_bound: u64,
}

/// A buffer of the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlacedBuffer {
    /// What it holds.
    pub value: ValueId,
    /// Offset in the arena.
    pub offset: u64,
    /// Size of the value.
    pub bytes: u64,
    /// The step that defines it.
    pub first: usize,
    /// The last step in order that needs it.
    pub last: usize,
}

/// Places the arena's buffers for one bucket; may add edges to the schedule.
///
/// # Errors
/// The sizes overflow.
pub fn plan_memory(
    graph: &Graph,
    schedule: &mut Schedule,
    extents: &Extents,
    alignment: u64,
) -> Result<Placement, String> {
    let live = lifetimes(graph, schedule, extents, alignment)?;
    let lower_bound = lower_bound(&live, schedule.steps.len()).ok_or("the arena's size overflows")?;
    let ancestors = ancestors(schedule);
    let concurrent = conflicts(&live, |a, b| a.before(b, &ancestors));
    let mut placed = place(&live, &concurrent, lower_bound).ok_or("the arena's size overflows")?;
    if placed.bytes > lower_bound.saturating_add((lower_bound / 20).max(64 << 10)) {
        let by_order = conflicts(&live, |a, b| !a.pinned && a.last < b.first);
        let tighter = place(&live, &by_order, lower_bound).ok_or("the arena's size overflows")?;
        if tighter.bytes < placed.bytes {
            placed = tighter;
            serialize(schedule, &live, &placed.offsets);
        }
    }
    let buffers = live.iter().zip(&placed.offsets).map(|(live, &offset)| {
        let Live { value, bytes, first, last, .. } = *live;
        PlacedBuffer { value, offset, bytes, first, last }
    });
    Ok(Placement { buffers: buffers.collect(), bytes: placed.bytes, lower_bound })
}

/// Every buffer in bytes of its own, in the order of the steps: what is left without this pass.
///
/// # Errors
/// The sizes overflow.
pub fn place_apart(graph: &Graph, schedule: &Schedule, extents: &Extents, alignment: u64) -> Result<Placement, String> {
    let live = lifetimes(graph, schedule, extents, alignment)?;
    let overflow = "the arena's size overflows";
    let mut bytes = 0u64;
    let mut buffers = Vec::with_capacity(live.len());
    for Live { value, bytes: size, room, first, last, .. } in &live {
        buffers.push(PlacedBuffer { value: *value, offset: bytes, bytes: *size, first: *first, last: *last });
        bytes = bytes.checked_add(*room).ok_or(overflow)?;
    }
    Ok(Placement { buffers, bytes, lower_bound: lower_bound(&live, schedule.steps.len()).ok_or(overflow)? })
}

/// A buffer before it has a place.
struct Live {
    value: ValueId,
    bytes: u64,
    /// `bytes`, rounded up to the alignment.
    room: u64,
    first: usize,
    last: usize,
    /// The steps that define or use it.
    accesses: FixedBitSet,
    /// Lives to the end.
    pinned: bool,
}

impl Live {
    /// True if all accesses to this one happen before the definition of the other.
    fn before(&self, other: &Live, ancestors: &[FixedBitSet]) -> bool {
        !self.pinned && self.accesses.is_subset(&ancestors[other.first])
    }
}

fn lifetimes(graph: &Graph, schedule: &Schedule, extents: &Extents, alignment: u64) -> Result<Vec<Live>, String> {
    let storage = storage(graph);
    let users = graph.users();
    let steps = schedule.steps.len();
    let mut step_of = vec![0; graph.ops.len()];
    for (at, step) in schedule.steps.iter().enumerate() {
        step_of[step.op] = at;
    }
    let mut live = vec![];
    for (first, step) in schedule.steps.iter().enumerate() {
        for &value in &graph.ops[step.op].results {
            if storage.get(&value) != Some(&Storage::Arena) {
                continue;
            }
            let overflow = || format!("the size of %{} overflows: {}", graph.value(value).name, graph.ty(value));
            let bytes = graph.ty(value).bytes(extents).ok_or_else(overflow)?;
            let room = bytes.max(1).checked_next_multiple_of(alignment).ok_or_else(overflow)?;
            let mut accesses = FixedBitSet::with_capacity(steps);
            accesses.insert(first);
            accesses.extend(users.of(value).iter().map(|&op| step_of[op]));
            let last_use = accesses.maximum().unwrap_or(first);
            let pinned = users.is_output(value) || (first < schedule.head && last_use >= schedule.head);
            let last = if pinned { steps - 1 } else { last_use };
            live.push(Live { value, bytes, room, first, last, accesses, pinned });
        }
    }
    Ok(live)
}

fn lower_bound(live: &[Live], steps: usize) -> Option<u64> {
    let at = |step| live.iter().filter(move |b| b.first <= step && step <= b.last);
    (0..steps).try_fold(0, |most: u64, step| {
        Some(most.max(at(step).try_fold(0u64, |sum, buffer| sum.checked_add(buffer.room))?))
    })
}

/// For each step, the steps that happen before it.
fn ancestors(schedule: &Schedule) -> Vec<FixedBitSet> {
    let mut ancestors: Vec<FixedBitSet> = Vec::with_capacity(schedule.steps.len());
    for step in &schedule.steps {
        let mut before = FixedBitSet::with_capacity(schedule.steps.len());
        for &earlier in &step.after {
            before.union_with(&ancestors[earlier]);
            before.insert(earlier);
        }
        ancestors.push(before);
    }
    ancestors
}

/// For each buffer, those that may not share bytes with it.
fn conflicts(live: &[Live], before: impl Fn(&Live, &Live) -> bool) -> Vec<FixedBitSet> {
    let mut conflicts = vec![FixedBitSet::with_capacity(live.len()); live.len()];
    for (a, one) in live.iter().enumerate() {
        for (b, other) in live.iter().enumerate().skip(a + 1) {
            if !before(one, other) && !before(other, one) {
                conflicts[a].insert(b);
                conflicts[b].insert(a);
            }
        }
    }
    conflicts
}

struct Placed {
    offsets: Vec<u64>,
    bytes: u64,
}

/// The best of several greedy placements: by size, by size and lifetime together, by lifetime, by start. Then, while it is
/// above the lower bound, more tries, each with the buffers that reached the top in the last one moved to the front, also
/// where that one was worse: only so does it leave a local minimum.
fn place(live: &[Live], conflicts: &[FixedBitSet], lower_bound: u64) -> Option<Placed> {
    let lifetime = |at: usize| live[at].last - live[at].first + 1;
    let sorted = |key: &dyn Fn(usize) -> (u128, u128)| {
        let mut order: Vec<usize> = (0..live.len()).collect();
        order.sort_by_key(|&at| (Reverse(key(at)), at));
        order
    };
    let room = |at: usize| u128::from(live[at].room);
    let orders = [
        sorted(&|at| (room(at), lifetime(at) as u128)),
        sorted(&|at| (room(at) * lifetime(at) as u128, 0)),
        sorted(&|at| (lifetime(at) as u128, room(at))),
        sorted(&|_| (0, 0)),
    ];
    let mut best: Option<(Placed, Vec<usize>)> = None;
    for order in orders {
        let placed = best_fit(live, conflicts, &order)?;
        if best.as_ref().is_none_or(|(best, _)| placed.bytes < best.bytes) {
            best = Some((placed, order));
        }
    }
    let (mut best, mut order) = best?;
    let mut tops = top(live, &best);
    for _ in 0..MAX_RETRIES {
        if best.bytes <= lower_bound {
            break;
        }
        order.sort_by_key(|&at| !tops.contains(at));
        let placed = best_fit(live, conflicts, &order)?;
        tops = top(live, &placed);
        if placed.bytes < best.bytes {
            best = placed;
        }
    }
    Some(best)
}

/// The buffers that reach the highest byte.
fn top(live: &[Live], placed: &Placed) -> FixedBitSet {
    (0..live.len()).filter(|&at| placed.offsets[at] + live[at].room == placed.bytes).collect()
}

/// Places buffers in the given order, each into the smallest gap between its conflicting neighbours that holds it.
fn best_fit(live: &[Live], conflicts: &[FixedBitSet], order: &[usize]) -> Option<Placed> {
    let mut offsets = vec![0u64; live.len()];
    let mut bytes = 0;
    let mut by_offset: Vec<usize> = Vec::with_capacity(live.len());
    for &at in order {
        let room = live[at].room;
        let (mut end, mut gap) = (0u64, None::<(u64, u64)>);
        for &other in by_offset.iter().filter(|&&other| conflicts[at][other]) {
            let space = offsets[other].saturating_sub(end);
            if space >= room && gap.is_none_or(|(smallest, _)| space < smallest) {
                gap = Some((space, end));
            }
            end = end.max(offsets[other] + live[other].room);
        }
        offsets[at] = gap.map_or(end, |(_, start)| start);
        bytes = bytes.max(offsets[at].checked_add(room)?);
        let place = by_offset.partition_point(|&other| offsets[other] <= offsets[at]);
        by_offset.insert(place, at);
    }
    Some(Placed { offsets, bytes })
}

/// Adds the edges that make buffers which share bytes wait for each other, in the order of the steps.
fn serialize(schedule: &mut Schedule, live: &[Live], offsets: &[u64]) {
    let mut after: Vec<BTreeSet<usize>> =
        schedule.steps.iter().map(|step| step.after.iter().copied().collect()).collect();
    for (a, one) in live.iter().enumerate() {
        for (b, other) in live.iter().enumerate() {
            let share = offsets[a] < offsets[b] + other.room && offsets[b] < offsets[a] + one.room;
            if share && one.last < other.first {
                after[other.first].extend(one.accesses.ones());
            }
        }
    }
    for (step, after) in schedule.steps.iter_mut().zip(reduce(&after)) {
        step.after = after;
    }
}

#[cfg(test)]
mod tests;
