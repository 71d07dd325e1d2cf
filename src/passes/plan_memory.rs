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
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::ir::{BinaryFn, DType, Dim, Op, OpKind, Operand, Sym, Type};
    use crate::passes::schedule::schedule;

    /// Places `[first,last] = size -> offset  why`, a line for each buffer, and compares the offsets.
    fn check(golden: &str) {
        let number = |text: &str| text.trim().parse::<u64>().expect("a number");
        let mut expected = vec![];
        let mut live = vec![];
        for line in golden.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (lifetime, rest) = line.split_once('=').expect("=");
            let (size, rest) = rest.split_once("->").expect("->");
            let (first, last) = lifetime.trim().trim_matches(['[', ']']).split_once(',').expect(",");
            expected.push(number(rest.split_whitespace().next().expect("an offset")));
            let (first, last, room) = (number(first) as usize, number(last) as usize, number(size));
            let (value, accesses) = (ValueId::new(live.len()), FixedBitSet::new());
            live.push(Live { value, bytes: room, room, first, last, accesses, pinned: false });
        }
        let bound = lower_bound(&live, 100).expect("no overflow");
        let placed = place(&live, &conflicts(&live, |a, b| a.last < b.first), bound).expect("no overflow");
        assert_eq!(placed.offsets, expected, "{golden}");
    }

    #[test]
    fn a_chain_needs_two_places() {
        check(
            "[0,1] = 1024 -> 0      the first of three equal ones goes to the bottom
             [1,2] = 1024 -> 1024   is read while the first is: next to it
             [2,3] = 1024 -> 0      the first is dead",
        );
    }

    #[test]
    fn a_residual_keeps_its_place_under_a_chain() {
        check(
            "[0,4] = 1024 -> 4096   the residual lives through all: above the two large ones
             [1,2] = 2048 -> 0      of the largest the first, at the bottom
             [2,3] = 2048 -> 2048   alive with the one before
             [3,4] = 512  -> 0      where that one was",
        );
    }

    #[test]
    fn the_smallest_gap_is_taken() {
        check(
            "[0,9] = 4096 -> 0      the largest lies at the bottom
             [0,2] = 3072 -> 4096   leaves a gap of 3072 from step 3 on
             [0,9] = 2048 -> 7168   alive with both
             [0,2] = 1024 -> 9216   leaves a gap of 1024 from step 3 on
             [0,9] = 512  -> 10240  alive with all
             [3,9] = 1024 -> 9216   fits both gaps, takes the smaller
             [3,9] = 3072 -> 4096   and leaves the larger to this",
        );
    }

    /// Operators of one result each: operands by index among what is defined before it, columns of the result, whether the
    /// operator takes the `R` input too, whether its result is returned.
    type Spec = Vec<(Vec<Index>, u64, bool, bool)>;

    fn build(spec: &Spec) -> Graph {
        let mut graph = Graph::new("random");
        for (name, sym) in [("x", Sym::T), ("rows", Sym::R)] {
            let input = graph.add_value(name, Type::new(DType::F32, [Dim::from(sym)]));
            graph.inputs.push(input);
        }
        for (operands, columns, rows, output) in spec {
            let defined: Vec<ValueId> = graph.ops.iter().flat_map(|op| op.results.clone()).collect();
            let mut uses: Vec<Operand> = vec![graph.inputs[0].into()];
            if !defined.is_empty() {
                uses.extend(operands.iter().map(|index| Operand::from(*index.get(&defined))));
            }
            uses.extend(rows.then_some(Operand::from(graph.inputs[1])));
            let ty = Type::new(DType::F32, [Dim::from(Sym::T), Dim::fixed(*columns)]);
            let result = graph.add_value("v", ty);
            graph.ops.push(Op::new(OpKind::Binary(BinaryFn::Add), uses, vec![result], ""));
            if *output {
                graph.outputs.push(result);
            }
        }
        graph
    }

    fn random_graphs() -> impl Strategy<Value = Spec> {
        let op = (
            prop::collection::vec(any::<Index>(), 0..4),
            1..400u64,
            prop::bool::weighted(0.05),
            prop::bool::weighted(0.05),
        );
        prop::collection::vec(op, 1..60)
    }

    /// True if a path of `after` edges leads from one step to a later one.
    fn reaches(schedule: &Schedule, from: usize, to: usize) -> bool {
        schedule.steps[to].after.iter().any(|&step| step == from || (step > from && reaches_slow(schedule, from, step)))
    }

    fn reaches_slow(schedule: &Schedule, from: usize, to: usize) -> bool {
        let mut pending = vec![to];
        let mut seen = BTreeSet::new();
        while let Some(step) = pending.pop() {
            if step == from {
                return true;
            }
            if step > from && seen.insert(step) {
                pending.extend(&schedule.steps[step].after);
            }
        }
        false
    }

    fn uses(graph: &Graph, schedule: &Schedule, value: ValueId) -> Vec<usize> {
        let touches = |op: &Op| op.results.contains(&value) || op.uses().any(|used| used == value);
        (0..schedule.steps.len()).filter(|&step| touches(&graph.ops[schedule.steps[step].op])).collect()
    }

    fn assert_sound(graph: &Graph, alignment: u64) {
        let mut schedule = schedule(graph);
        for (at, step) in schedule.steps.iter().enumerate() {
            for used in graph.ops[step.op].uses().filter(|used| !graph.inputs.contains(used)) {
                let definition = uses(graph, &schedule, used)[0];
                assert!(reaches(&schedule, definition, at), "step {at} does not wait for {used}");
            }
        }
        let extents = Extents { tokens: 3, sequences: 1, rows: 1 };
        let placement = plan_memory(graph, &mut schedule, &extents, alignment).expect("small sizes");
        assert_eq!(placement.buffers.len(), graph.ops.len());
        let end = schedule.steps.len();
        let mut top = 0;
        for a in &placement.buffers {
            assert_eq!(a.offset % alignment, 0);
            assert_eq!(Some(a.bytes), graph.ty(a.value).bytes(&extents));
            top = top.max((a.offset + a.bytes).next_multiple_of(alignment));
            for b in &placement.buffers {
                let share = a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
                if a.value >= b.value || !share {
                    continue;
                }
                let before = |one: &PlacedBuffer, other: &PlacedBuffer| {
                    let accesses = uses(graph, &schedule, one.value);
                    let to_the_end = graph.outputs.contains(&one.value)
                        || (one.first < schedule.head && accesses.iter().any(|&step| step >= schedule.head));
                    !to_the_end
                        && accesses.iter().all(|&step| step < other.first && reaches(&schedule, step, other.first))
                };
                assert!(before(a, b) || before(b, a), "{a:?} and {b:?} share bytes, {end} steps:\n{graph}");
            }
        }
        assert_eq!(placement.bytes, top);
        assert!(placement.bytes >= placement.lower_bound);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        #[test]
        fn nothing_live_shares_bytes(spec in random_graphs(), log2_alignment in 0..9u32) {
            assert_sound(&build(&spec), 1 << log2_alignment);
        }
    }

    #[test]
    fn buffers_beside_each_other_wait_only_where_memory_would_suffer() {
        // Sixteen independent chains of two: at once they need sixteen large buffers, in order one.
        let op = |operand: Option<usize>, columns: u64| (operand, columns);
        let chains = |columns: u64| -> Graph {
            let mut graph = build(&vec![]);
            for chain in 0..16 {
                for (operand, columns) in [op(None, columns), op(Some(2 * chain), 1)] {
                    let input = graph.inputs[0];
                    let used = operand.map_or(input, |at| graph.ops[at].results[0]);
                    let result = graph.add_value("v", Type::new(DType::F32, [columns]));
                    graph.ops.push(Op::new(OpKind::Binary(BinaryFn::Add), vec![used.into()], vec![result], ""));
                }
            }
            graph.outputs = graph.ops.iter().skip(1).step_by(2).map(|op| op.results[0]).collect();
            graph
        };
        let extents = Extents { tokens: 1, sequences: 1, rows: 1 };
        let plan = |columns: u64| {
            let graph = chains(columns);
            let mut schedule = schedule(&graph);
            let placement = plan_memory(&graph, &mut schedule, &extents, 256).expect("small sizes");
            (placement, schedule.steps.iter().filter(|step| step.after.is_empty()).count())
        };
        let (small, roots) = plan(64);
        assert_eq!((small.bytes, roots), (32 * 256, 16), "within 64 KiB: the chains stay independent");
        let (large, roots) = plan(1 << 20);
        assert_eq!(large.bytes, large.lower_bound, "one large buffer at a time");
        assert_eq!(roots, 1, "each chain waits for the one before");
    }
}
