//! Equal operators as one.
//!
//! Needs nothing; finds more after canonicalize. Leaves no two primitive operators of one kind with the same operands and
//! result types, except those that update a state, and those whose results the graph returns: its results keep their names.

use crate::ir::{Graph, Op, OpKind, Operand, Users};
use crate::passes::{PassContext, Patch, Rewrite};

/// See the module.
pub struct Cse;

impl Rewrite for Cse {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let op = &graph.ops[at];
        let excluded = matches!(op.kind, OpKind::Fused(_)) || op.kind.state_update().is_some();
        if excluded || op.results.iter().any(|&result| users.is_output(result)) {
            return None;
        }
        let first = match op.uses().min_by_key(|&value| users.of(value).len()) {
            Some(value) => earlier(graph, users.of(value).iter().copied(), at),
            None => earlier(graph, 0..at, at),
        }?;
        let replacements = op.results.iter().zip(&graph.ops[first].results);
        let patch = replacements.fold(Patch::new(graph), |patch, (&old, &new)| patch.replace(old, new.into()));
        Some(patch.remove(at))
    }
}

fn earlier(graph: &Graph, candidates: impl Iterator<Item = usize>, at: usize) -> Option<usize> {
    candidates.take_while(|&candidate| candidate < at).find(|&first| is_equal(graph, &graph.ops[first], &graph.ops[at]))
}

fn is_equal(graph: &Graph, a: &Op, b: &Op) -> bool {
    let types = |op: &Op| op.results.iter().map(|&result| graph.ty(result).clone()).collect::<Vec<_>>();
    a.kind == b.kind && same_operands(&a.kind, &a.operands, &b.operands) && types(a) == types(b)
}

fn same_operands(kind: &OpKind, a: &[Operand], b: &[Operand]) -> bool {
    match (kind, a, b) {
        (OpKind::Binary(function), [x, y], [u, v]) if function.commutes() => {
            (same(x, u) && same(y, v)) || (same(x, v) && same(y, u))
        }
        _ => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
    }
}

/// Equality that tells 0.0 from -0.0.
fn same(a: &Operand, b: &Operand) -> bool {
    match (a, b) {
        (Operand::Const(a), Operand::Const(b)) => a.to_bits() == b.to_bits(),
        _ => a == b,
    }
}
