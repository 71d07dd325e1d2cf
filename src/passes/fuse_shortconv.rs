//! `fuse-shortconv`: split, gate, causal convolution with state, bias if there is one, and second gate as one operator; then
//! that into the prologue of the matrix product that reads it.
//!
//! Needs: nothing. Leaves: `shortconv+matmul`; where [`tactics::shortconv_in_prologue`] says no, `shortconv`.

use crate::ir::{BinaryFn, Graph, OpKind, Stage, Users};
use crate::passes::view::{View, only_result, other_operand};
use crate::passes::{PassContext, Patch, Rewrite, tactics};

/// The pass.
pub struct FuseShortconv;

impl Rewrite for FuseShortconv {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, context: &PassContext) -> Option<Patch> {
        let view = View::new(graph, users);
        match &view.op(at).kind {
            OpKind::Conv1dCausal => gates(view, at),
            OpKind::Fused(stages) if stages[..] == [Stage::ShortConv] && tactics::shortconv_in_prologue(context) => {
                product(view, at)
            }
            _ => None,
        }
    }
}

/// `split -> b, c, x; c * conv(b * x)`, with nothing in between used elsewhere.
fn gates(view: View, at: usize) -> Option<Patch> {
    let conv = view.op(at);
    let (gate_in, gate) = view.private_producer(*conv.operands.first()?, at)?;
    let (split, parts) = view.private_producer(*gate.operands.first()?, gate_in)?;
    let ([b, c, x], OpKind::Split { sizes, block: None }) = (&parts.results[..], &parts.kind) else { return None };
    let private = view.users.only(*b) == Some(gate_in) && view.users.only(*x) == Some(gate_in);
    let equal = sizes.iter().all(|size| *size == sizes[0]);
    if !private || !equal || other_operand(gate, BinaryFn::Mul, (*b).into()) != Some((*x).into()) {
        return None;
    }
    let mut members = vec![split, gate_in, at];
    let mut y = *conv.results.first()?;
    let mut next = view.users.only(y)?;
    if view.adds_bias(next, y) {
        members.push(next);
        y = only_result(view.op(next))?;
        next = view.users.only(y)?;
    }
    members.push(next);
    let gated = other_operand(view.op(next), BinaryFn::Mul, y.into()) == Some((*c).into());
    (gated && view.users.only(*c) == Some(next)).then(|| view.fuse(&members, vec![Stage::ShortConv]))?
}

fn product(view: View, at: usize) -> Option<Patch> {
    let gated = view.op(at).body.last().and_then(only_result)?;
    let product = view.users.only(gated)?;
    let stages = view.prologue_of(product, gated)?;
    view.fuse(&[at, product], [vec![Stage::ShortConv], stages].concat())
}
