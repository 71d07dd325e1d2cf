//! `fuse-shortconv`: split, gate, causal convolution with state, bias if there is one, and second gate as one operator; then
//! that into one of the two matrix products beside it: the epilogue of the one that makes its rows, or else the prologue of the
//! one that reads its result.
//!
//! Both at once would be one kernel with two products. The epilogue goes first where [`tactics::shortconv_in_epilogue`] says so,
//! by the order in which the driver looks at operators: it is proposed at the convolution, the prologue at the product behind.
//! What is refused there, because no kernel runs it or because tactics want it apart, leaves the convolution to that product.
//!
//! Needs: nothing; runs after `fuse-norm-matmul`, whose products it takes as they are. Leaves: `norm+matmul+shortconv`,
//! `shortconv+matmul`; where [`tactics::shortconv_in_prologue`] says no as well, `shortconv`.

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
            _ if view.stages(at) == [Stage::ShortConv] => {
                tactics::shortconv_in_epilogue(context).then(|| epilogue(view, at)).flatten()
            }
            _ => tactics::shortconv_in_prologue(context).then(|| prologue(view, at)).flatten(),
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

/// The convolution at `at`, behind the product that makes its rows.
fn epilogue(view: View, at: usize) -> Option<Patch> {
    let rows = *view.op(at).body.first()?.operands.first()?;
    let (product, stages) = view.epilogue_of(rows, at)?;
    (stages.last() == Some(&Stage::Matmul))
        .then(|| view.fuse(&[product, at], [stages, vec![Stage::ShortConv]].concat()))?
}

/// The product at `at`, behind the convolution that makes its rows.
fn prologue(view: View, at: usize) -> Option<Patch> {
    let rows = view.op(at).primitives().first()?.operands.first()?.value()?;
    let stages = view.prologue_of(at, rows)?;
    let (conv, before) = view.epilogue_of(rows.into(), at)?;
    (before == [Stage::ShortConv]).then(|| view.fuse(&[conv, at], [before, stages].concat()))?
}
