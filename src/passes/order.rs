//! Program order: whether it holds, how to restore it, and which operators may become one.
//!
//! An operator depends on those that define what it uses, and one that updates a state also on those that read the
//! version it replaces.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

use crate::ir::{Graph, Op, Users, ValueId};

/// True if the members could be one operator: nothing outside them both depends on one of them and is depended on by one.
/// The operators must be in program order.
pub(crate) fn is_convex(graph: &Graph, users: &Users, members: &BTreeSet<usize>) -> bool {
    let (Some(&first), Some(&last)) = (members.first(), members.last()) else { return true };
    // Outsiders between the first and the last member that depend on a member.
    let mut downstream = vec![false; last + 1 - first];
    for at in first..=last {
        let op = &graph.ops[at];
        let is_member = members.contains(&at);
        let depends = |on: usize| {
            on >= first
                && on < at
                && if is_member { downstream[on - first] } else { downstream[on - first] || members.contains(&on) }
        };
        let through_value = op.uses().filter_map(|value| users.definition(value)).any(depends);
        let through_state =
            || op.state_updates().iter().any(|(old, _)| users.of(*old).iter().any(|&reader| depends(reader)));
        if through_value || through_state() {
            if is_member {
                return false;
            }
            downstream[at - first] = true;
        }
    }
    true
}

/// Puts operators into an order in which each follows what it depends on, changing as little as possible; false if there is
/// none.
pub(crate) fn sort_stably(graph: &mut Graph) -> bool {
    if is_sorted(graph) {
        return true;
    }
    let users = graph.users();
    let Some(order) = stable_order(graph, &users) else { return false };
    let mut ops: Vec<Option<Op>> = std::mem::take(&mut graph.ops).into_iter().map(Some).collect();
    graph.ops = order.into_iter().filter_map(|at| ops[at].take()).collect();
    true
}

/// True if the operators are in an order that their dependencies allow. Most patches leave it so, and this is cheaper than
/// sorting.
fn is_sorted(graph: &Graph) -> bool {
    const INPUT: u8 = 0;
    const PENDING: u8 = 1;
    const READY: u8 = 2;
    const OVERWRITTEN: u8 = 3;
    let mut values = vec![INPUT; graph.values.len()];
    for result in graph.ops.iter().flat_map(|op| &op.results) {
        values[result.index()] = PENDING;
    }
    for op in &graph.ops {
        if op.uses().any(|value| matches!(values[value.index()], PENDING | OVERWRITTEN)) {
            return false;
        }
        for (old, _) in op.state_updates() {
            values[old.index()] = OVERWRITTEN;
        }
        for result in &op.results {
            values[result.index()] = READY;
        }
    }
    true
}

/// Positions in an order that the dependencies allow, the lowest ready position first; none if they form a circle.
fn stable_order(graph: &Graph, users: &Users) -> Option<Vec<usize>> {
    let mut updaters: HashMap<ValueId, Vec<usize>> = HashMap::new();
    let mut waiting = vec![0usize; graph.ops.len()];
    for (at, op) in graph.ops.iter().enumerate() {
        for (old, _) in op.state_updates() {
            updaters.entry(old).or_default().push(at);
            waiting[at] += users.of(old).iter().filter(|&&reader| reader != at).count();
        }
        for &result in &op.results {
            if users.definition(result) == Some(at) {
                users.of(result).iter().for_each(|&user| waiting[user] += 1);
            }
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        (0..waiting.len()).filter(|&at| waiting[at] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(waiting.len());
    while let Some(Reverse(at)) = ready.pop() {
        order.push(at);
        let op = &graph.ops[at];
        let mut release = |next: usize| {
            waiting[next] -= 1;
            if waiting[next] == 0 {
                ready.push(Reverse(next));
            }
        };
        for &result in op.results.iter().filter(|&&result| users.definition(result) == Some(at)) {
            users.of(result).iter().for_each(|&user| release(user));
        }
        let used: BTreeSet<ValueId> = op.uses().filter(|value| updaters.contains_key(value)).collect();
        for updater in used.iter().flat_map(|value| &updaters[value]) {
            if *updater != at {
                release(*updater);
            }
        }
    }
    (order.len() == waiting.len()).then_some(order)
}

#[cfg(test)]
mod tests {
    use petgraph::algo::{has_path_connecting, is_cyclic_directed};
    use petgraph::graph::NodeIndex;
    use petgraph::visit::EdgeRef;
    use proptest::prelude::*;

    use super::*;
    use crate::ir::Operand;
    use crate::ir::testing::graphs;

    /// Convex as defined: contracting the members into one leaves no circle.
    fn contracts(graph: &Graph, members: &BTreeSet<usize>) -> bool {
        let mut contracted = petgraph::graph::DiGraph::<(), ()>::new();
        let nodes: Vec<_> = graph.ops.iter().map(|_| contracted.add_node(())).collect();
        let group = contracted.add_node(());
        let dag = graph.dependencies();
        for edge in dag.edge_references() {
            let place = |at: usize| if members.contains(&at) { group } else { nodes[at] };
            let (from, to) = (place(edge.source().index()), place(edge.target().index()));
            if from != to {
                contracted.add_edge(from, to, ());
            }
        }
        !is_cyclic_directed(&contracted)
    }

    fn respects_dependencies(graph: &Graph) -> bool {
        graph.dependencies().edge_references().all(|edge| edge.source() < edge.target())
    }

    proptest! {
        #[test]
        fn convex_is_contractible(graph in graphs(), choice in prop::collection::vec(any::<prop::sample::Index>(), 1..5)) {
            if graph.ops.is_empty() {
                return Ok(());
            }
            let members: BTreeSet<usize> = choice.iter().map(|index| index.index(graph.ops.len())).collect();
            prop_assert_eq!(is_convex(&graph, &graph.users(), &members), contracts(&graph, &members));
        }

        #[test]
        fn sorting_restores_an_order(graph in graphs(), keys in prop::collection::vec(any::<u32>(), 64)) {
            prop_assert!(is_sorted(&graph));
            let mut shuffled = graph.clone();
            let mut order: Vec<usize> = (0..graph.ops.len()).collect();
            order.sort_by_key(|&at| keys[at % keys.len()]);
            shuffled.ops = order.iter().map(|&at| graph.ops[at].clone()).collect();
            prop_assert_eq!(is_sorted(&shuffled), respects_dependencies(&shuffled));
            prop_assert!(sort_stably(&mut shuffled));
            prop_assert!(respects_dependencies(&shuffled));
            prop_assert_eq!(shuffled.ops.len(), graph.ops.len());
            let again = shuffled.ops.clone();
            prop_assert!(sort_stably(&mut shuffled));
            prop_assert_eq!(shuffled.ops, again);
        }

        #[test]
        fn a_circle_has_no_order(graph in graphs(), from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>()) {
            let count = graph.ops.len();
            if count == 0 {
                return Ok(());
            }
            let (from, to) = (from.index(count), to.index(count));
            let nodes = (NodeIndex::new(from), NodeIndex::new(to));
            let mut closed = graph.clone();
            let added = graph.ops[to].results.first().copied();
            closed.ops[from].operands.extend(added.map(Operand::Value));
            let circle = added.is_some() && has_path_connecting(&graph.dependencies(), nodes.0, nodes.1, None);
            let sorted = sort_stably(&mut closed);
            prop_assert!(!(circle && sorted));
            prop_assert_eq!(sorted, !is_cyclic_directed(&closed.dependencies()));
            prop_assert!(!sorted || respects_dependencies(&closed));
        }
    }
}
