//! `fuse-combine-norm`: the RMSNorm of the residual stream into the step that adds a layer's experts to it, which has each row whole.
//!
//! Needs: `fuse-residual`, and a norm that stands by itself, as where rows are many. Leaves: `combine+residual+norm`, which makes
//! both the stream and its norm.

use crate::ir::{Graph, OpKind, Stage, Users};
use crate::passes::view::View;
use crate::passes::{PassContext, Patch, Rewrite};

/// The pass.
pub struct FuseCombineNorm;

impl Rewrite for FuseCombineNorm {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let view = View::new(graph, users);
        let op = view.op(at);
        let (OpKind::RmsNorm { .. }, [x, weight]) = (&op.kind, &op.operands[..]) else { return None };
        if view.graph.weight(weight.weight()?).ty.last()? != view.graph.ty(x.value()?).last()? {
            return None;
        }
        let sum = view.producer(*x)?;
        if view.stages(sum) != [Stage::Combine, Stage::Residual] {
            return None;
        }
        let patch = view.fuse(&[sum, at], vec![Stage::Combine, Stage::Residual, Stage::Norm])?;
        // Most of it is the experts'; the norm is of the next layer.
        Some(patch.in_scope(&view.op(sum).scope))
    }
}
