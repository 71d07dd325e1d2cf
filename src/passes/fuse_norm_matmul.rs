//! `fuse-norm-matmul`: an RMSNorm over whole rows into the prologue of the matrix product that reads it, with the selection
//! of its rows before it if there is one; and a bias into the product that it is added to.
//!
//! Needs: nothing; works best after `group-experts`, which makes a router of the gate's product. Leaves: `norm+matmul`,
//! `gather+norm+matmul`, `norm+router`; where [`tactics::norm_in_prologue`] says no, `norm` stays and a gather joins it.
//! Readers of the norm beside the product take it from the fused operator, so that it is computed once. Norms of several
//! products (unmerged projections) stay, and so do norms of heads.

use crate::ir::{Graph, OpKind, Stage, Users};
use crate::passes::view::{View, only_result};
use crate::passes::{PassContext, Patch, Rewrite, tactics};

/// The pass.
pub struct FuseNormMatmul;

impl Rewrite for FuseNormMatmul {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, context: &PassContext) -> Option<Patch> {
        let view = View::new(graph, users);
        match view.op(at).kind {
            OpKind::RmsNorm { .. } => norm(view, at, context),
            _ => bias(view, at),
        }
    }
}

fn norm(view: View, at: usize, context: &PassContext) -> Option<Patch> {
    let op = view.op(at);
    let [x, weight] = op.operands[..] else { return None };
    let normed = only_result(op)?;
    if view.graph.weight(weight.weight()?).ty.last()? != view.graph.ty(x.value()?).last()? {
        return None;
    }
    let gather = view.private_producer(x, at).filter(|(_, op)| op.kind == OpKind::GatherRows).map(|(at, _)| at);
    let mut positions: Vec<usize> = gather.into_iter().chain([at]).collect();
    let mut stages = if gather.is_some() { vec![Stage::Gather, Stage::Norm] } else { vec![Stage::Norm] };
    let mut products = view.users.of(normed).iter().filter_map(|&user| Some((user, view.prologue_of(user, normed)?)));
    match (products.next(), products.next()) {
        (Some((product, rest)), None) if tactics::norm_in_prologue(context) => {
            positions.push(product);
            stages.extend(rest);
        }
        _ if gather.is_some() => {}
        _ => return None,
    }
    view.fuse(&positions, stages)
}

fn bias(view: View, at: usize) -> Option<Patch> {
    let stages = view.stages(at);
    let product = view.op(at).primitives().last().and_then(only_result)?;
    let add = view.users.only(product)?;
    (stages.last() == Some(&Stage::Matmul) && view.adds_bias(add, product)).then(|| view.fuse(&[at, add], stages))?
}
