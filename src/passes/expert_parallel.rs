//! `expert-parallel`: a mixture of experts whose experts are spread over the ranks of a group, or of a stage of one, each with rows of its own.
//!
//! - The rows that experts read, their weights and their choices are gathered of all ranks: `ranks * T` rows, in the order of the ranks.
//! - Each rank runs those rows through the experts that it has. A choice of another rank's expert becomes none (-1), which products
//!   and weighted sums leave out, so that extents do not depend on what was chosen. Of an expert that several ranks have, each runs
//!   some of the rows: which ones, a row's weights say ([`OpKind::LocalExperts`]).
//! - Every rank gets the partial sums of its own rows back, one of each rank, and adds them in the order of the ranks: the same bits
//!   in every run, whoever was first.
//!
//! Weights of experts become those of this rank's experts; which these are, [`PassContext::experts`] says.
//!
//! Needs: products by expert as built, or merged; runs after the passes that lay out weights, and before rows are sorted by expert, which
//! is then done with the gathered rows. Leaves: primitive operators. Does nothing for a rank that has all experts, nor in layers that are
//! another stage's.

use std::collections::HashMap;

use crate::ir::{Dim, Graph, Layout, Op, OpKind, Operand, Type, Users, ValueId, Weight};
use crate::passes::context::ExpertShare;
use crate::passes::pipeline_parallel::layer;
use crate::passes::view::row_wise;
use crate::passes::{PassContext, Patch, Rewrite};

/// The pass.
pub struct ExpertParallel;

impl Rewrite for ExpertParallel {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, context: &PassContext) -> Option<Patch> {
        let share = context.experts.as_ref().filter(|share| share.ranks > 1)?;
        let op = &graph.ops[at];
        let (OpKind::ExpertMatmul, [x, _, chosen]) = (&op.kind, &op.operands[..]) else { return None };
        let (x, chosen) = (x.value()?, chosen.value()?);
        let stage =
            context.layers.as_ref().and_then(|layers| Some((layers.stage(), layers.stage_of(layer(&op.scope)?)?)));
        if stage.is_some_and(|(own, found)| own != found) {
            return None;
        }
        let made_by = users.definition(chosen).map(|at| &graph.ops[at].kind);
        if graph.ty(x).shape.len() != 2 || matches!(made_by, Some(OpKind::LocalExperts { .. })) {
            return None;
        }
        Spreading::new(graph, share, x, chosen, &op.scope)?.patch()
    }
}

/// The operators between a selection and the weighted sum over it, in terms of the rows of all ranks.
struct Spreading<'a> {
    graph: &'a Graph,
    share: &'a ExpertShare,
    /// What is gathered, by the value of this rank's own rows.
    gathered: HashMap<ValueId, ValueId>,
    x: ValueId,
    chosen: ValueId,
    local: ValueId,
    /// For each value between, that of all ranks' rows.
    all: HashMap<ValueId, ValueId>,
    patch: Patch,
}

impl<'a> Spreading<'a> {
    fn new(
        graph: &'a Graph,
        share: &'a ExpertShare,
        x: ValueId,
        chosen: ValueId,
        scope: &str,
    ) -> Option<Spreading<'a>> {
        let mut patch = Patch::new(graph);
        let local = patch.value("local", all_rows(graph.ty(chosen), share.ranks)?);
        let mut spreading =
            Spreading { graph, share, gathered: HashMap::new(), x, chosen, local, all: HashMap::new(), patch };
        let weights = graph.ops.iter().find_map(|op| match (&op.kind, &op.operands[..]) {
            (OpKind::WeightedSum, [_, weights, by]) if *by == chosen.into() => weights.value(),
            _ => None,
        })?;
        let own = [x, weights, chosen];
        let all: Vec<ValueId> = own.iter().map(|&value| spreading.of_all(value)).collect::<Option<_>>()?;
        spreading.gathered = own.into_iter().zip(all.iter().copied()).collect();
        let operands = own.map(Operand::Value).to_vec();
        spreading.insert(OpKind::AllGather { ranks: share.ranks }, operands, all.clone(), scope);
        let parts = share.parts.get(scope).cloned().unwrap_or_default();
        let kind = OpKind::LocalExperts { of: share.of, experts: share.local.clone(), parts };
        // The weights say whose turn it is to run an expert that several ranks have.
        let parted = matches!(&kind, OpKind::LocalExperts { parts, .. } if !parts.is_empty());
        let operands = [all[2], all[1]][..if parted { 2 } else { 1 }].iter().map(|&value| value.into()).collect();
        spreading.insert(kind, operands, vec![local], scope);
        Some(spreading)
    }

    fn patch(mut self) -> Option<Patch> {
        let mut summed = false;
        for (at, op) in self.graph.ops.iter().enumerate() {
            let starts = op.kind == OpKind::ExpertMatmul && op.operands[2] == self.chosen.into();
            if starts || op.uses().any(|value| self.all.contains_key(&value)) {
                self.convert(op)?;
                self.patch = std::mem::replace(&mut self.patch, Patch::new(self.graph)).remove(at);
                summed |= op.kind == OpKind::WeightedSum;
            }
        }
        let returned = self.graph.outputs.iter().any(|output| self.all.contains_key(output));
        (summed && !returned).then_some(self.patch)
    }

    /// Adds the operator on all ranks' rows that stands for one on this rank's; `None` if there is no such.
    fn convert(&mut self, op: &Op) -> Option<()> {
        match (&op.kind, &op.operands[..]) {
            (OpKind::ExpertMatmul, [x, weight, chosen]) if *chosen == self.chosen.into() => {
                let x = x.value()?;
                let rows = *if x == self.x { self.gathered.get(&x) } else { self.all.get(&x) }?;
                let weight = self.local_weight(*weight)?;
                let operands = vec![rows.into(), weight, self.local.into()];
                self.insert_like(op, operands)
            }
            (OpKind::WeightedSum, [y, weights, chosen]) if *chosen == self.chosen.into() => {
                let (y, weights) = (self.all.get(&y.value()?)?, self.gathered.get(&weights.value()?)?);
                self.sum(op, vec![(*y).into(), (*weights).into(), self.local.into()])
            }
            _ => {
                let operands = row_wise(op, &self.all)?;
                self.insert_like(op, operands)
            }
        }
    }

    /// Adds a weighted sum of all ranks' rows, the exchange of the partial sums, and the sum of those of this rank's rows.
    fn sum(&mut self, op: &Op, operands: Vec<Operand>) -> Option<()> {
        let &[result] = &op.results[..] else { return None };
        let ranks = self.share.ranks;
        let ty = all_rows(self.graph.ty(result), ranks)?;
        let (partial, own) = (self.patch.value("partial", ty.clone()), self.patch.value("partial.own", ty));
        self.insert(op.kind.clone(), operands, vec![partial], &op.scope);
        self.insert(OpKind::AllToAll { ranks }, vec![partial.into()], vec![own], &op.scope);
        self.insert(OpKind::BlockSum { blocks: ranks }, vec![own.into()], vec![result], &op.scope);
        Some(())
    }

    /// This rank's experts of a weight of all.
    fn local_weight(&mut self, weight: Operand) -> Option<Operand> {
        let id = weight.weight()?;
        let Weight { name, ty, .. } = self.graph.weight(id);
        if ty.shape.first()?.as_fixed()? != self.share.of {
            return None;
        }
        let mut ty = ty.clone();
        ty.shape[0] = Dim::fixed(self.share.local.len() as u64);
        let layout = Layout::Take { of: id, indices: self.share.local.clone() };
        let local = Weight { name: format!("{name}.local"), ty, layout };
        Some(self.patch.weight(self.graph, local).into())
    }

    /// Adds the same operator for all ranks' rows.
    fn insert_like(&mut self, op: &Op, operands: Vec<Operand>) -> Option<()> {
        let mut results = vec![];
        for &result in &op.results {
            let all = self.of_all(result)?;
            self.all.insert(result, all);
            results.push(all);
        }
        self.insert(op.kind.clone(), operands, results, &op.scope);
        Some(())
    }

    /// A value for what all ranks have of one.
    fn of_all(&mut self, value: ValueId) -> Option<ValueId> {
        let value = self.graph.value(value);
        let ty = all_rows(&value.ty, self.share.ranks)?;
        Some(self.patch.value(&format!("{}.all", value.name), ty))
    }

    fn insert(&mut self, kind: OpKind, operands: Vec<Operand>, results: Vec<ValueId>, scope: &str) {
        let patch = std::mem::replace(&mut self.patch, Patch::new(self.graph));
        self.patch = patch.insert(Op::new(kind, operands, results, scope));
    }
}

/// The type of so many ranks' rows.
fn all_rows(ty: &Type, ranks: u64) -> Option<Type> {
    let (rows, inner) = ty.shape.split_first()?;
    let mut shape = vec![rows.times(ranks)?];
    shape.extend(inner);
    Some(Type { dtype: ty.dtype, shape })
}
