//! Matmuls of one input as one matmul.
//!
//! Needs weights as the checkpoint has them. Where two or more matmuls (or matmuls with a token's experts) of one scope read
//! the same value and give the same element type, their weights, if nothing else reads these, become one joined weight, and a
//! split of the one product gives the old results. The join is a layout of the pool: loading writes each tensor to its rows.
//! A router's matmul stays alone: it gives f32.

use std::collections::HashSet;

use crate::ir::{Dim, Graph, Layout, Op, OpKind, Operand, Type, Users, Weight, WeightId};
use crate::passes::weights::{joined_name, used_at_most};
use crate::passes::{PassContext, Patch, Rewrite};

/// See the module.
pub struct MergeProjections;

impl Rewrite for MergeProjections {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
        let leader = projection(graph, at)?;
        let mut seen = HashSet::new();
        let siblings: Vec<usize> = users
            .of(leader.input)
            .iter()
            .copied()
            .filter(|&sibling| projection(graph, sibling).is_some_and(|other| other.merges_with(&leader)))
            .collect();
        if siblings.len() < 2 {
            return None;
        }
        let group: Vec<usize> = siblings
            .into_iter()
            .filter(|&sibling| {
                projection(graph, sibling).is_some_and(|p| seen.insert(p.weight) && used_at_most(graph, p.weight, 1))
            })
            .collect();
        if group.len() < 2 || group[0] != at {
            return None;
        }
        merged(graph, &group, &leader)
    }
}

/// A matmul that could be merged.
struct Projection<'a> {
    op: &'a Op,
    input: crate::ir::ValueId,
    weight: WeightId,
    weight_type: &'a Type,
    result_type: &'a Type,
    /// The axis of the weight that gives the columns of the product.
    axis: usize,
}

fn projection(graph: &Graph, at: usize) -> Option<Projection<'_>> {
    let op = &graph.ops[at];
    let axis = match op.kind {
        OpKind::Matmul => 0,
        OpKind::ExpertMatmul => 1,
        _ => return None,
    };
    let &[Operand::Value(input), Operand::Weight(weight), ..] = &op.operands[..] else { return None };
    let weight_type = &graph.weight(weight).ty;
    let result_type = graph.ty(*op.results.first()?);
    (graph.weight(weight).layout == Layout::Tensor).then_some(Projection {
        op,
        input,
        weight,
        weight_type,
        result_type,
        axis,
    })
}

impl Projection<'_> {
    fn merges_with(&self, other: &Projection) -> bool {
        self.op.kind == other.op.kind
            && self.op.operands[2..] == other.op.operands[2..]
            && self.input == other.input
            && self.op.scope == other.op.scope
            && self.weight_type.dtype == other.weight_type.dtype
            && self.result_type.dtype == other.result_type.dtype
    }

    fn columns(&self) -> Option<u64> {
        self.weight_type.shape.get(self.axis)?.as_fixed()
    }
}

fn merged(graph: &Graph, group: &[usize], leader: &Projection) -> Option<Patch> {
    let parts: Vec<Projection> = group.iter().filter_map(|&at| projection(graph, at)).collect();
    let sizes: Vec<u64> = parts.iter().map(Projection::columns).collect::<Option<_>>()?;
    let columns = Dim::fixed(sizes.iter().try_fold(0u64, |sum, &n| sum.checked_add(n))?);
    let results: Vec<_> = parts.iter().map(|part| part.op.results[0]).collect();

    let mut weight_type = leader.weight_type.clone();
    weight_type.shape[leader.axis] = columns;
    let mut product_type = leader.result_type.clone();
    *product_type.shape.last_mut()? = columns;

    let weight_names: Vec<&str> = parts.iter().map(|part| graph.weight(part.weight).name.as_str()).collect();
    let value_names: Vec<&str> = results.iter().map(|&result| graph.value(result).name.as_str()).collect();
    let layout =
        Layout::Concat { axis: leader.axis as u64, block: None, parts: parts.iter().map(|part| part.weight).collect() };

    let mut patch = Patch::new(graph);
    let joined = patch.weight(graph, Weight { name: joined_name(&weight_names), ty: weight_type, layout });
    let product = patch.value(&joined_name(&value_names), product_type);
    let mut operands = leader.op.operands.clone();
    operands[1] = joined.into();
    let scope = &leader.op.scope;
    let patch = group.iter().fold(patch, |patch, &at| patch.remove(at));
    Some(patch.insert(Op::new(leader.op.kind.clone(), operands, vec![product], scope)).insert(Op::new(
        OpKind::Split { sizes, block: None },
        vec![product.into()],
        results,
        scope,
    )))
}
