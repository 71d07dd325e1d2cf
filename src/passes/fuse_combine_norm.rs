//! `fuse-combine-norm`: the RMSNorm of the residual stream into the step that adds a layer's experts to it, which has each row whole.
//!
//! Needs: `fuse-residual`, and a norm that stands by itself, as where rows are many. Leaves: `combine+residual+norm`, or where ranks have
//! parts of the sum `blocksum+residual+norm`, which make both the stream and its norm.

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
        let mut stages = view.stages(sum);
        if !matches!(stages[..], [Stage::Combine | Stage::BlockSum, Stage::Residual]) {
            return None;
        }
        stages.push(Stage::Norm);
        let patch = view.fuse(&[sum, at], stages)?;
        // Most of it is the experts'; the norm is of the next layer.
        Some(patch.in_scope(&view.op(sum).scope))
    }
}
