//! Schedule: steps in an order that keeps little memory live, and the dependency edges between them.
//!
//! The order is one of two: program order, or the one that always takes the ready operator which adds least to the live
//! bytes (ties by program order). Whichever has the lower peak is taken; program order if they are equal. Operators that
//! depend on a graph input with rows `R` come last in both, as the head.
//!
//! Where a rank sends to another, and receives of it, the order is the program's, one step at a time: it is that of time on all ranks, and what
//! waits for another rank beside other steps would take the device from them.

use std::collections::{BTreeMap, BTreeSet};

use petgraph::Direction::{Incoming, Outgoing};
use petgraph::algo::tred;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::IntoNeighbors;

use crate::ir::{DType, Extents, Graph, OpKind, Sym, ValueId};

/// Sizes for comparing orders. All equal, as in a decode bucket: only the ratio of row data to the few arrays of constant
/// size depends on the bucket, and one order serves all buckets of a graph.
const NOMINAL: Extents = Extents { tokens: 64, sequences: 64, rows: 64 };

/// The steps in execution order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// One step for each operator.
    pub steps: Vec<ScheduledStep>,
    /// The first step of the head: all that depends on a graph input with rows `R`. The number of steps if there is none, or
    /// if some of it updates a state, so that it cannot run again.
    pub head: usize,
}

/// One step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScheduledStep {
    /// Position in [`Graph::ops`].
    pub op: usize,
    /// Steps that must be done before; ascending, without those that follow from others.
    pub after: Vec<usize>,
}

/// Where a value lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// In io: a graph input, written by the host.
    Input,
    /// In the state region: a version of this state.
    State(ValueId),
    /// In io: an i32 result of the graph, read by the host.
    Io,
    /// In the arena: any other result of an operator.
    Arena,
}

/// Where each value lives that has storage; one inside a fused operator has none.
pub fn storage(graph: &Graph) -> BTreeMap<ValueId, Storage> {
    let states = graph.state_roots();
    let mut storage: BTreeMap<ValueId, Storage> = graph.inputs.iter().map(|&input| (input, Storage::Input)).collect();
    storage.extend(graph.states.iter().map(|&state| (state, Storage::State(state))));
    for &result in graph.ops.iter().flat_map(|op| &op.results) {
        let place = match states.get(&result) {
            Some(&root) => Storage::State(root),
            None if graph.ty(result).dtype == DType::I32 && graph.outputs.contains(&result) => Storage::Io,
            None => Storage::Arena,
        };
        storage.insert(result, place);
    }
    storage
}

/// Orders the operators of a verified graph.
///
/// # Panics
/// If operators depend on each other in a circle, which the verifier refuses.
pub fn schedule(graph: &Graph) -> Schedule {
    if graph.ops.iter().any(|op| matches!(op.kind, OpKind::Send { .. } | OpKind::Receive { .. })) {
        return schedule_in_sequence(graph);
    }
    let dag = graph.dependencies();
    let head = head_ops(graph, &dag);
    let (in_program_order, program_peak) = order(graph, &dag, &head, false);
    let (greedy, greedy_peak) = order(graph, &dag, &head, true);
    let order = if greedy_peak < program_peak { greedy } else { in_program_order };

    let mut step_of = vec![0; order.len()];
    for (step, &op) in order.iter().enumerate() {
        step_of[op] = step;
    }
    let direct =
        |&op: &usize| dag.neighbors_directed(NodeIndex::new(op), Incoming).map(|op| step_of[op.index()]).collect();
    let after = reduce(&order.iter().map(direct).collect::<Vec<BTreeSet<usize>>>());
    let head = order.iter().position(|&op| head[op]).unwrap_or(order.len());
    let steps = order.into_iter().zip(after).map(|(op, after)| ScheduledStep { op, after }).collect();
    Schedule { steps, head }
}

/// Program order with the head last, each step after the one before: what is left without this pass.
///
/// # Panics
/// As [`schedule`].
pub fn schedule_in_sequence(graph: &Graph) -> Schedule {
    let dag = graph.dependencies();
    let head = head_ops(graph, &dag);
    let (order, _) = order(graph, &dag, &head, false);
    let head = order.iter().position(|&op| head[op]).unwrap_or(order.len());
    let after = |step: usize| step.checked_sub(1).into_iter().collect();
    let steps = order.into_iter().enumerate().map(|(step, op)| ScheduledStep { op, after: after(step) }).collect();
    Schedule { steps, head }
}

/// The transitive reduction: for each step, those of its earlier steps `after` that do not follow from others.
pub(crate) fn reduce(after: &[BTreeSet<usize>]) -> Vec<Vec<usize>> {
    let mut dag: DiGraph<(), ()> = DiGraph::new();
    let nodes: Vec<NodeIndex> = after.iter().map(|_| dag.add_node(())).collect();
    for (step, earlier) in after.iter().enumerate() {
        for &from in earlier {
            dag.add_edge(nodes[from], nodes[step], ());
        }
    }
    let (list, _) = tred::dag_to_toposorted_adjacency_list::<_, u32>(&dag, &nodes);
    let (reduced, _) = tred::dag_transitive_reduction_closure(&list);
    let mut result = vec![vec![]; after.len()];
    for from in reduced.node_indices() {
        for step in reduced.neighbors(from) {
            result[step as usize].push(from as usize);
        }
    }
    result
}

/// For each operator, true if it is part of the head.
fn head_ops(graph: &Graph, dag: &DiGraph<usize, ValueId>) -> Vec<bool> {
    let is_rows = |value: &ValueId| graph.ty(*value).shape.iter().any(|dim| dim.sym == Some(Sym::R));
    let rows: BTreeSet<ValueId> = graph.inputs.iter().copied().filter(is_rows).collect();
    let mut head = vec![false; graph.ops.len()];
    let mut pending: Vec<usize> =
        (0..graph.ops.len()).filter(|&at| graph.ops[at].uses().any(|value| rows.contains(&value))).collect();
    while let Some(at) = pending.pop() {
        if !std::mem::replace(&mut head[at], true) {
            pending.extend(dag.neighbors_directed(NodeIndex::new(at), Outgoing).map(|next| next.index()));
        }
    }
    let updates = graph.ops.iter().zip(&head).any(|(op, &head)| head && !op.state_updates().is_empty());
    if updates { vec![false; graph.ops.len()] } else { head }
}

/// A topological order, the head last, and its peak of live bytes. Among ready operators, the one that adds least to the
/// live bytes if `greedy`, then the first in the program.
fn order(graph: &Graph, dag: &DiGraph<usize, ValueId>, head: &[bool], greedy: bool) -> (Vec<usize>, i128) {
    let neighbors = |op: usize, direction| dag.neighbors_directed(NodeIndex::new(op), direction);
    let mut waiting: Vec<usize> = (0..head.len()).map(|op| neighbors(op, Incoming).count()).collect();
    let mut ready: BTreeSet<usize> = (0..head.len()).filter(|&op| waiting[op] == 0).collect();
    let mut live = Live::new(graph, head);
    let mut order = Vec::with_capacity(head.len());
    while let Some(op) =
        ready.iter().copied().min_by_key(|&op| (head[op], if greedy { live.added(&graph.ops[op]) } else { 0 }, op))
    {
        ready.remove(&op);
        live.run(&graph.ops[op]);
        order.push(op);
        for next in neighbors(op, Outgoing) {
            waiting[next.index()] -= 1;
            if waiting[next.index()] == 0 {
                ready.insert(next.index());
            }
        }
    }
    assert_eq!(order.len(), head.len(), "operators of @{} depend on each other in a circle", graph.name);
    (order, live.peak)
}

/// Live bytes of the arena at [`NOMINAL`] sizes while operators run one after the other.
struct Live {
    /// For each value, its bytes; 0 outside the arena.
    bytes: Vec<i128>,
    /// For each value, the uses to come; one more for what lives to the end.
    uses: Vec<usize>,
    now: i128,
    peak: i128,
}

impl Live {
    fn new(graph: &Graph, head: &[bool]) -> Self {
        let mut live = Live { bytes: vec![0; graph.values.len()], uses: vec![0; graph.values.len()], now: 0, peak: 0 };
        for (value, place) in storage(graph) {
            if place == Storage::Arena {
                live.bytes[value.index()] = graph.ty(value).bytes(&NOMINAL).unwrap_or(u64::MAX).into();
            }
        }
        let users = graph.users();
        for at in 0..graph.values.len() {
            let value = ValueId::new(at);
            let feeds_head =
                users.definition(value).is_some_and(|op| !head[op]) && users.of(value).iter().any(|&op| head[op]);
            live.uses[at] = users.of(value).len() + usize::from(feeds_head || users.is_output(value));
        }
        live
    }

    /// Bytes made by an operator, and bytes no longer needed after it.
    fn change(&self, op: &crate::ir::Op) -> (i128, i128) {
        let made = op.results.iter().map(|value| self.bytes[value.index()]).sum();
        let taken: BTreeSet<ValueId> = op.uses().collect();
        let last_use = taken.iter().filter(|value| self.uses[value.index()] == 1);
        let unused = op.results.iter().filter(|value| self.uses[value.index()] == 0);
        (made, last_use.chain(unused).map(|value| self.bytes[value.index()]).sum())
    }

    fn added(&self, op: &crate::ir::Op) -> i128 {
        let (made, freed) = self.change(op);
        made - freed
    }

    fn run(&mut self, op: &crate::ir::Op) {
        let (made, freed) = self.change(op);
        self.peak = self.peak.max(self.now + made);
        self.now += made - freed;
        for value in op.uses().collect::<BTreeSet<_>>() {
            self.uses[value.index()] -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{BinaryFn, Dim, Op, Operand, Type, UnaryFn};

    /// A graph of elementwise operators over f32 `[T, columns]`: for each, its operands (values by position; the inputs
    /// `%x [T,8]` and `%rows [R,8]` are 0 and 1) and its result's columns. Shapes are not those of the operators' rules,
    /// which order does not depend on.
    fn graph(ops: &[(&[u32], u64)], outputs: &[u32]) -> Graph {
        let mut graph = Graph::new("test");
        for (name, sym) in [("x", Sym::T), ("rows", Sym::R)] {
            let id = graph.add_value(name, Type::new(DType::F32, [Dim::from(sym), Dim::fixed(8)]));
            graph.inputs.push(id);
        }
        for (operands, columns) in ops {
            let ty = Type::new(DType::F32, [Dim::from(Sym::T), Dim::fixed(*columns)]);
            let result = graph.add_value("v", ty);
            let kind = if operands.len() == 1 { OpKind::Unary(UnaryFn::Neg) } else { OpKind::Binary(BinaryFn::Add) };
            let operands = operands.iter().map(|&at| Operand::Value(ValueId(at))).collect();
            graph.ops.push(Op::new(kind, operands, vec![result], ""));
        }
        graph.outputs = outputs.iter().map(|&at| ValueId(at)).collect();
        graph
    }

    fn ops(schedule: &Schedule) -> Vec<usize> {
        schedule.steps.iter().map(|step| step.op).collect()
    }

    #[test]
    fn finishes_a_branch_before_it_starts_the_next() {
        // Three wide values, each narrowed at once in the better order; program order makes all three first.
        let wide_first = graph(
            &[(&[0], 100), (&[0], 100), (&[0], 100), (&[2], 1), (&[3], 1), (&[4], 1), (&[5, 6], 1), (&[8, 7], 1)],
            &[9],
        );
        assert_eq!(ops(&schedule(&wide_first)), [0, 3, 1, 4, 6, 2, 5, 7]);
    }

    #[test]
    fn keeps_program_order_where_nothing_is_gained() {
        let diamond = graph(&[(&[0], 4), (&[2], 4), (&[2], 4), (&[3, 4], 4)], &[5]);
        let schedule = schedule(&diamond);
        assert_eq!(ops(&schedule), [0, 1, 2, 3]);
        let after: Vec<_> = schedule.steps.iter().map(|step| step.after.clone()).collect();
        assert_eq!(after, [vec![], vec![0], vec![0], vec![1, 2]]);
        assert_eq!(schedule.head, 4, "nothing uses rows");
    }

    #[test]
    fn head_is_last_and_edges_are_reduced() {
        // 2 = x; 3 = 2 + rows (head); 4 = 2; 5 = 3 + 2 (head; its edge from the first step follows from 3's).
        let schedule = schedule(&graph(&[(&[0], 4), (&[2, 1], 4), (&[2], 4), (&[3, 2], 4)], &[4, 5]));
        assert_eq!(ops(&schedule), [0, 2, 1, 3]);
        assert_eq!(schedule.head, 2);
        assert_eq!(schedule.steps[3].after, [2]);
    }

    #[test]
    fn readers_of_a_state_come_before_its_update() {
        let mut graph = graph(&[(&[0], 8)], &[]);
        let state = graph.add_value("kv", Type::new(DType::F32, [1u64, 2, 1, 4, 8]));
        let next = graph.add_value("kv.next", Type::new(DType::F32, [1u64, 2, 1, 4, 8]));
        let read = graph.add_value("read", Type::new(DType::I32, [Dim::from(Sym::T)]));
        graph.states = vec![state];
        let reads: Vec<Operand> = vec![ValueId(2).into(), state.into()];
        graph.ops.push(Op::new(OpKind::Binary(BinaryFn::Add), reads, vec![read], ""));
        let writes: Vec<Operand> = [0, 0, 3, 0, 0, 0].map(|at| Operand::Value(ValueId(at))).to_vec();
        graph.ops.push(Op::new(OpKind::KvWrite, writes, vec![next], ""));
        graph.outputs = vec![next, read];
        let schedule = schedule(&graph);
        assert_eq!(ops(&schedule), [0, 1, 2]);
        assert_eq!(schedule.steps[2].after, [1]);
        let places = storage(&graph);
        assert_eq!(places[&state], Storage::State(state));
        assert_eq!(places[&next], Storage::State(state));
        assert_eq!(places[&read], Storage::Io);
        assert_eq!(places[&ValueId(0)], Storage::Input);
        assert_eq!(places[&ValueId(2)], Storage::Arena);
    }
}
