//! Gate and up channels side by side.
//!
//! Needs merge-projections. Where the product of a weight joined of two equal parts is only split into the two, and these only
//! become `silu(gate) * up`, the rows of the two parts are taken in turn, [`CHANNELS`] at a time, in the weight and so in the
//! split. Whoever computes that product then has both halves of a channel at hand, and can apply the SwiGLU before it writes.
//! Runs once: the pool holds each weight in one layout, which serves all buckets.

use crate::ir::{BinaryFn, Graph, Layout, Op, OpKind, Operand, UnaryFn, Users, ValueId};
use crate::passes::weights::used_at_most;
use crate::passes::{PassContext, Patch, Rewrite};

/// Channels of one part before the other's turn. Eight is the unit of tensor core fragments in both directions: a thread that
/// holds accumulator column `c` (row `r`, if weights are the left operand) of one group of eight also holds `c` (`r`) of the next.
/// With groups gate, up, gate, up, ... both halves of a channel are in registers of one thread. In a matrix-vector
/// product, where a warp owns a run of rows, sixteen rows are eight whole channels, one 16-byte store of bf16.
const CHANNELS: u64 = 8;

/// See the module.
pub struct LayoutWeights;

impl Rewrite for LayoutWeights {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let split = &graph.ops[at];
        let OpKind::Split { sizes, block: None } = &split.kind else { return None };
        let (&[x, y], &[width, other]) = (&split.results[..], &sizes[..]) else { return None };
        // Odd widths keep the parts one after the other, which is as right, and slower.
        if width != other || width % CHANNELS != 0 || !(is_swiglu(graph, users, x, y) || is_swiglu(graph, users, y, x))
        {
            return None;
        }
        let product = split.operands.first()?.value()?;
        if users.only(product) != Some(at) {
            return None;
        }
        let matmul = &graph.ops[users.definition(product)?];
        if !matches!(matmul.kind, OpKind::Matmul | OpKind::ExpertMatmul) {
            return None;
        }
        let weight = matmul.operands.get(1)?.weight()?;
        let Layout::Concat { axis, block: None, parts } = &graph.weight(weight).layout else { return None };
        if parts.len() != 2 || !used_at_most(graph, weight, 1) {
            return None;
        }
        let block = Some(CHANNELS);
        let split = Op { kind: OpKind::Split { sizes: sizes.clone(), block }, ..split.clone() };
        let layout = Layout::Concat { axis: *axis, block, parts: parts.clone() };
        Some(Patch::new(graph).remove(at).insert(split).lay_out(weight, layout))
    }
}

/// True if all that becomes of the two values is `silu(gate) * up`.
fn is_swiglu(graph: &Graph, users: &Users, gate: ValueId, up: ValueId) -> bool {
    let activated = users.only(gate).map(|at| &graph.ops[at]);
    let Some(Op { kind: OpKind::Unary(UnaryFn::Silu), results, .. }) = activated else { return false };
    let Some(mul) = users.only(up) else { return false };
    let factors = &graph.ops[mul].operands;
    graph.ops[mul].kind == OpKind::Binary(BinaryFn::Mul)
        && users.only(results[0]) == Some(mul)
        && factors.contains(&Operand::Value(up))
        && factors.contains(&Operand::Value(results[0]))
}
