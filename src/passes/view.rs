//! Questions that the fusion passes ask about the neighbourhood of an operator.

use std::collections::HashMap;

use crate::ir::{BinaryFn, Graph, Op, OpKind, Operand, Stage, Users, ValueId};
use crate::passes::Patch;

/// A graph with its uses.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub graph: &'a Graph,
    pub users: &'a Users,
}

impl<'a> View<'a> {
    pub fn new(graph: &'a Graph, users: &'a Users) -> Self {
        View { graph, users }
    }

    pub fn op(self, at: usize) -> &'a Op {
        &self.graph.ops[at]
    }

    /// Position of the operator that makes an operand.
    pub fn producer(self, operand: Operand) -> Option<usize> {
        self.users.definition(operand.value()?)
    }

    /// The primitive that makes an operand which only the operator at `user` takes.
    pub fn private_producer(self, operand: Operand, user: usize) -> Option<(usize, &'a Op)> {
        let at = self.producer(operand)?;
        let op = self.op(at);
        (op.body.is_empty() && self.users.only(operand.value()?) == Some(user)).then_some((at, op))
    }

    /// What a kernel that begins or ends with this operator is called; empty where fusions have no name for it.
    pub fn stages(self, at: usize) -> Vec<Stage> {
        match &self.op(at).kind {
            OpKind::Fused(stages) => stages.clone(),
            OpKind::Matmul => vec![Stage::Matmul],
            OpKind::ExpertMatmul | OpKind::GroupedMatmul | OpKind::GroupedMatmulGather { .. } => {
                vec![Stage::ExpertMatmul]
            }
            OpKind::WeightedSum | OpKind::GroupedWeightedSum => vec![Stage::Combine],
            OpKind::BlockSum { .. } => vec![Stage::BlockSum],
            _ => vec![],
        }
    }

    /// The operator whose last stage makes a value that only the operator at `user` takes: what an epilogue can be added to.
    pub fn epilogue_of(self, operand: Operand, user: usize) -> Option<(usize, Vec<Stage>)> {
        let value = operand.value()?;
        let at = self.producer(operand)?;
        let makes_it_last = self.op(at).primitives().last()?.results == [value];
        (makes_it_last && self.users.only(value) == Some(user)).then(|| (at, self.stages(at)))
    }

    /// The stages of an operator that begins with a matrix product of rows `x` and takes them nowhere else: what a prologue
    /// can be put before.
    pub fn prologue_of(self, at: usize, x: ValueId) -> Option<Vec<Stage>> {
        let stages = self.stages(at);
        let mut takers = self.op(at).primitives().iter().filter(|op| op.operands.contains(&x.into()));
        let first = takers.next()?;
        let is_product_of_x = first.kind == OpKind::Matmul && first.operands[0] == x.into();
        let begins_with_it = matches!(stages.first(), Some(Stage::Matmul | Stage::Router));
        (is_product_of_x && begins_with_it && takers.next().is_none()).then_some(stages)
    }

    /// True if the operator is `x + bias` with the result's type that of `x`, a weight along the last axis being the bias.
    pub fn adds_bias(self, at: usize, x: ValueId) -> bool {
        let op = self.op(at);
        let Some(Operand::Weight(bias)) = other_operand(op, BinaryFn::Add, x.into()) else { return false };
        self.graph.weight(bias).ty.shape.len() == 1 && self.same_type(x, only_result(op))
    }

    pub fn same_type(self, x: ValueId, y: Option<ValueId>) -> bool {
        y.is_some_and(|y| self.graph.ty(x) == self.graph.ty(y))
    }

    pub fn fuse(self, positions: &[usize], stages: Vec<Stage>) -> Option<Patch> {
        Patch::fuse(self.graph, self.users, positions, stages)
    }
}

/// The operands of an operator that does the same to each row, with other values for all that it takes; `None` if it is another
/// operator, or takes something else.
pub(super) fn row_wise(op: &Op, others: &HashMap<ValueId, ValueId>) -> Option<Vec<Operand>> {
    if !matches!(op.kind, OpKind::Split { .. } | OpKind::Unary(_) | OpKind::Binary(_) | OpKind::Cast) {
        return None;
    }
    let other = |operand: &Operand| match operand {
        Operand::Value(value) => others.get(value).map(|&other| other.into()),
        Operand::Const(_) => Some(*operand),
        Operand::Weight(_) => None,
    };
    op.operands.iter().map(other).collect()
}

/// The result of an operator that has one.
pub(super) fn only_result(op: &Op) -> Option<ValueId> {
    match op.results[..] {
        [one] => Some(one),
        _ => None,
    }
}

/// For `function(x, y)` or, if it commutes, `function(y, x)`: y.
pub(super) fn other_operand(op: &Op, function: BinaryFn, x: Operand) -> Option<Operand> {
    match op.operands[..] {
        _ if op.kind != OpKind::Binary(function) => None,
        [a, b] if a == x => Some(b),
        [a, b] if b == x && function.commutes() => Some(a),
        _ => None,
    }
}
