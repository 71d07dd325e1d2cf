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
fn a_residual_lies_beside_a_chain() {
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
    let mut pending = schedule.steps[to].after.clone();
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
                !to_the_end && accesses.iter().all(|&step| step < other.first && reaches(&schedule, step, other.first))
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
