//! `fuse-swiglu`: `silu(gate) * up` into the epilogue of the matrix product, dense or of experts, that makes both halves.
//!
//! Needs: gate and up projections merged, else there is no one product to join. Leaves: `matmul+swiglu` or
//! `norm+matmul+swiglu`, `expert+swiglu`.

use crate::ir::{BinaryFn, Graph, OpKind, Stage, UnaryFn, Users};
use crate::passes::view::{View, other_operand};
use crate::passes::{PassContext, Patch, Rewrite};

/// The pass.
pub struct FuseSwiglu;

impl Rewrite for FuseSwiglu {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let view = View::new(graph, users);
        let op = view.op(at);
        let silu_of =
            |operand| view.private_producer(operand, at).filter(|(_, op)| op.kind == OpKind::Unary(UnaryFn::Silu));
        let (silu, activation) = op.operands.iter().find_map(|&operand| silu_of(operand))?;
        let up = other_operand(op, BinaryFn::Mul, (*activation.results.first()?).into())?;
        let (split, parts) = view.private_producer(*activation.operands.first()?, silu)?;
        let ([first, second], OpKind::Split { sizes, .. }) = (&parts.results[..], &parts.kind) else { return None };
        let is_pair = activation.operands[0] == (*first).into() && up == (*second).into() && sizes[0] == sizes[1];
        if !is_pair || view.users.only(*second) != Some(at) {
            return None;
        }
        let (product, stages) = view.epilogue_of(*parts.operands.first()?, split)?;
        if !matches!(stages.last(), Some(Stage::Matmul | Stage::ExpertMatmul)) {
            return None;
        }
        view.fuse(&[product, split, silu, at], [stages, vec![Stage::Swiglu]].concat())
    }
}
