//! Removes what nothing uses.
//!
//! Needs nothing. Leaves no operator whose results nothing uses, except those that update a state, and no inner
//! operator of a fused one that its results do not need. A primitive operator with one used result keeps the others: they
//! are part of its kind.

use std::collections::{BTreeSet, HashSet};

use crate::ir::{Graph, Op, Users, ValueId, outside_operands};
use crate::passes::{PassContext, Patch, Rewrite};

/// See the module.
pub struct Dce;

impl Rewrite for Dce {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let op = &graph.ops[at];
        if is_dead(users, op, &BTreeSet::new()) {
            return Some(dead_with_producers(graph, users, at).into_iter().fold(Patch::new(graph), Patch::remove));
        }
        let trimmed = trimmed(op)?;
        Some(Patch::new(graph).remove(at).insert(trimmed))
    }
}

/// True if only operators that go use the results.
fn is_dead(users: &Users, op: &Op, gone: &BTreeSet<usize>) -> bool {
    let unused = |&result: &ValueId| !users.is_output(result) && users.of(result).iter().all(|at| gone.contains(at));
    op.results.iter().all(unused) && op.state_updates().is_empty()
}

/// A dead operator and all that only it kept alive.
fn dead_with_producers(graph: &Graph, users: &Users, dead: usize) -> BTreeSet<usize> {
    let mut gone = BTreeSet::from([dead]);
    let mut look = vec![dead];
    while let Some(at) = look.pop() {
        for producer in graph.ops[at].uses().filter_map(|value| users.definition(value)) {
            if !gone.contains(&producer) && is_dead(users, &graph.ops[producer], &gone) {
                gone.insert(producer);
                look.push(producer);
            }
        }
    }
    gone
}

/// A fused operator without the inner operators that none of its results needs, if there are any.
fn trimmed(op: &Op) -> Option<Op> {
    let mut needed: HashSet<ValueId> = op.results.iter().copied().collect();
    let mut body: Vec<Op> = vec![];
    for inner in op.body.iter().rev() {
        if inner.results.iter().any(|result| needed.contains(result)) || inner.kind.state_update().is_some() {
            needed.extend(inner.uses());
            body.push(inner.clone());
        }
    }
    body.reverse();
    (body.len() < op.body.len()).then(|| Op { operands: outside_operands(&body), body, ..op.clone() })
}
