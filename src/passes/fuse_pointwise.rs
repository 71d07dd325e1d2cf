//! Elementwise operators as one generated kernel.
//!
//! Needs nothing; comes after the other fusions, which know better what to do with theirs. Leaves no two elementwise operators
//! of one result shape next to each other that could be one: each connected group is a fused operator whose body is
//! the expression. Operands may be broadcast; a group has as many results as others need of it.

use std::collections::BTreeSet;

use crate::ir::{Dim, Graph, Op, OpKind, Stage, Users};
use crate::passes::order::is_convex;
use crate::passes::{PassContext, Patch, Rewrite};

/// See the module.
pub struct FusePointwise;

impl Rewrite for FusePointwise {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let shape = pointwise_shape(graph, &graph.ops[at])?;
        let mut group = BTreeSet::from([at]);
        // A neighbour that would close a circle through an outsider may fit once that outsider is a member too.
        while let Some(next) = neighbours(graph, users, &group).into_iter().find(|&next| {
            pointwise_shape(graph, &graph.ops[next]) == Some(shape)
                && is_convex(graph, users, &group.iter().copied().chain([next]).collect())
        }) {
            group.insert(next);
        }
        if group.len() < 2 {
            return None;
        }
        let positions: Vec<usize> = group.into_iter().collect();
        Patch::fuse(graph, users, &positions, vec![Stage::Pointwise])
    }
}

/// The shape of an elementwise operator's result, or of all results of a group of them.
fn pointwise_shape<'a>(graph: &'a Graph, op: &Op) -> Option<&'a [Dim]> {
    let is_group = matches!(&op.kind, OpKind::Fused(stages) if stages[..] == [Stage::Pointwise]);
    let all = op.primitives().iter().all(|inner| inner.kind.is_pointwise());
    let result = *op.results.first()?;
    ((is_group || op.kind.is_pointwise()) && all).then(|| &graph.ty(result).shape[..])
}

/// Operators outside the group that define what it uses or use what it defines, in program order.
fn neighbours(graph: &Graph, users: &Users, group: &BTreeSet<usize>) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    for op in group.iter().map(|&at| &graph.ops[at]) {
        found.extend(op.uses().filter_map(|value| users.definition(value)));
        found.extend(op.results.iter().flat_map(|&result| users.of(result)));
    }
    &found - group
}
