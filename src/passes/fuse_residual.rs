//! `fuse-residual`: the addition to the residual stream into the epilogue of what makes the addend: a dense matrix product,
//! the weighted sum over experts, or the sum over ranks.
//!
//! Needs: nothing; runs after the passes that put prologues before those products. Leaves: `matmul+residual`,
//! `shortconv+matmul+residual`, `combine+residual`, `expert+combine+residual`,
//! `blocksum+residual`.

use crate::ir::{BinaryFn, Graph, OpKind, Operand, Stage, Users};
use crate::passes::view::{View, only_result};
use crate::passes::{PassContext, Patch, Rewrite};

/// The pass.
pub struct FuseResidual;

impl Rewrite for FuseResidual {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let view = View::new(graph, users);
        let op = view.op(at);
        let (OpKind::Binary(BinaryFn::Add), [Operand::Value(x), Operand::Value(y)]) = (&op.kind, &op.operands[..])
        else {
            return None;
        };
        let sum = only_result(op);
        if x == y || !view.same_type(*x, sum) || !view.same_type(*y, sum) {
            return None;
        }
        // The addend is made last: the stream was there before.
        let (product, stages) = [*x, *y]
            .into_iter()
            .filter_map(|addend| view.epilogue_of(addend.into(), at))
            .filter(|(_, stages)| matches!(stages.last(), Some(Stage::Matmul | Stage::Combine | Stage::BlockSum)))
            .max_by_key(|(at, _)| *at)?;
        view.fuse(&[product, at], [stages, vec![Stage::Residual]].concat())
    }
}
