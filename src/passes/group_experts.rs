//! `group-experts`: what a mixture of experts is made of, as steps whose launches do not depend on what the router chose.
//!
//! - The gate's product, scores, selection and weights become one operator, `router`.
//! - Where [`tactics::group_experts`] says so, rows are sorted by expert: products with the expert of each row become
//!   grouped ones over `[T*k, ..]` rows, the sum over a token's experts finds them by place, and extents are the worst case.
//!   The first product gathers its rows, or a step before it does: see [`tactics::gather_apart`].
//!   The sort joins the router (`router+group`) where [`tactics::group_with_router`] says so, or, where experts are spread over ranks,
//!   the look-up of this rank's (`local+group`).
//! - Elsewhere the weighted sum joins the last product, `expert+combine`.
//!
//! Needs: to run first of the passes for a bucket, because it changes types inside what they fuse; each of them knows both
//! forms. Leaves: primitive grouped operators, and the fused operators named above.

use std::collections::HashMap;

use crate::ir::{BinaryFn, Graph, Op, OpKind, Operand, Stage, Type, UnaryFn, Users, ValueId};
use crate::passes::tactics::{self, Experts, Gathered};
use crate::passes::view::{View, only_result, other_operand, row_wise};
use crate::passes::{PassContext, Patch, Rewrite};

/// The pass.
pub struct GroupExperts;

impl Rewrite for GroupExperts {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, context: &PassContext) -> Option<Patch> {
        let view = View::new(graph, users);
        match view.op(at).kind {
            OpKind::TopK { .. } => router(view, at),
            OpKind::ExpertMatmul => Regrouping::new(graph, at)?.patch(context),
            OpKind::GroupRows { .. } => join_local(view, at)
                .or_else(|| tactics::group_with_router(context).then(|| join_router(view, at)).flatten()),
            OpKind::WeightedSum => join_product(view, at),
            _ => None,
        }
    }
}

/// Fuses the selection at `at` with the product of the gate before it and the weights after it.
fn router(view: View, at: usize) -> Option<Patch> {
    let select = view.op(at);
    let chosen = only_result(select)?;
    let mut members = vec![at];
    let (mut score, mut scoring) = view.producer(*select.operands.first()?).map(|score| (score, view.op(score)))?;
    if let OpKind::Binary(BinaryFn::Add) = scoring.kind {
        view.private_producer(select.operands[0], at)?;
        let biased = scoring.operands.iter().find_map(|operand| operand.value())?;
        other_operand(scoring, BinaryFn::Add, biased.into())?.weight()?;
        members.push(score);
        score = view.users.definition(biased)?;
        scoring = view.op(score);
    }
    if scoring.kind != OpKind::Unary(UnaryFn::Sigmoid) {
        return None;
    }
    let scores = only_result(scoring)?;
    let (gate, mut stages) = view.epilogue_of(scoring.operands[0], score)?;
    if stages.pop() != Some(Stage::Matmul) {
        return None;
    }
    let picks = |op: &Op| op.kind == OpKind::GatherColumns && op.operands == [scores.into(), chosen.into()];
    let pick = view.users.of(chosen).iter().copied().find(|&user| picks(view.op(user)))?;
    members.extend([gate, score, pick]);
    if view.users.is_output(scores) || view.users.of(scores).iter().any(|user| !members.contains(user)) {
        return None;
    }
    let mut weights = only_result(view.op(pick))?;
    if let Some(division) = normalisation(view, weights) {
        weights = only_result(view.op(division[0]))?;
        members.extend(division);
    }
    if let Some(scaling) = view.users.only(weights)
        && let Some(Operand::Const(_)) = other_operand(view.op(scaling), BinaryFn::Mul, weights.into())
    {
        members.push(scaling);
    }
    stages.push(Stage::Router);
    view.fuse(&members, stages)
}

/// Positions of the operators of `weights / (row_sum(weights) + constant)`, the division first.
fn normalisation(view: View, weights: ValueId) -> Option<Vec<usize>> {
    let [a, b] = view.users.of(weights)[..] else { return None };
    let (sum, division) = if view.op(a).kind == OpKind::RowSum { (a, b) } else { (b, a) };
    if view.op(sum).kind != OpKind::RowSum || view.users.is_output(weights) {
        return None;
    }
    let mut members = vec![division, sum];
    let mut divisor = only_result(view.op(sum))?;
    let next = view.users.only(divisor)?;
    if next != division {
        let Operand::Const(_) = other_operand(view.op(next), BinaryFn::Add, divisor.into())? else { return None };
        members.push(next);
        divisor = only_result(view.op(next))?;
        view.users.only(divisor).filter(|&user| user == division)?;
    }
    (other_operand(view.op(division), BinaryFn::Div, weights.into()) == Some(divisor.into())).then_some(members)
}

/// Fuses the sort at `at` with the look-up of this rank's experts, if these are but some.
fn join_local(view: View, at: usize) -> Option<Patch> {
    let (local, op) = view.private_producer(*view.op(at).operands.first()?, at)?;
    let OpKind::LocalExperts { .. } = op.kind else { return None };
    view.fuse(&[local, at], vec![Stage::Local, Stage::Group])
}

/// Fuses the sort at `at` with the router that makes its operand.
fn join_router(view: View, at: usize) -> Option<Patch> {
    let router = view.producer(*view.op(at).operands.first()?)?;
    let mut stages = view.stages(router);
    if stages.last() != Some(&Stage::Router) {
        return None;
    }
    stages.push(Stage::Group);
    view.fuse(&[router, at], stages)
}

/// Fuses the weighted sum at `at` with the ungrouped product before it.
fn join_product(view: View, at: usize) -> Option<Patch> {
    let (product, mut stages) = view.epilogue_of(*view.op(at).operands.first()?, at)?;
    if stages != [Stage::ExpertMatmul] {
        return None;
    }
    stages.push(Stage::Combine);
    view.fuse(&[product, at], stages)
}

/// The operators between a selection and the weighted sum over it, in terms of rows sorted by expert.
struct Regrouping<'a> {
    graph: &'a Graph,
    chosen: ValueId,
    k: u64,
    patch: Patch,
    pairs: ValueId,
    places: ValueId,
    offsets: ValueId,
    /// For each value `[T,k,N]`, its rows `[T*k,N]`.
    rows: HashMap<ValueId, ValueId>,
    /// For each value `[T,N]` whose rows a step of its own gathers, these.
    gathered: HashMap<ValueId, ValueId>,
    /// Number of experts, and bytes of one in each product's weight.
    experts: Option<u64>,
    bytes_each: u64,
}

impl<'a> Regrouping<'a> {
    /// For the selection that the product at `at` goes by.
    fn new(graph: &'a Graph, at: usize) -> Option<Self> {
        let op = &graph.ops[at];
        let [_, weight, chosen] = op.operands[..] else { return None };
        let chosen = chosen.value()?;
        let experts = graph.weight(weight.weight()?).ty.shape.first()?.as_fixed()?;
        let ty = graph.ty(chosen);
        let k = ty.last()?;
        let mut patch = Patch::new(graph);
        let count = ty.shape.first()?.times(k)?;
        let pairs = patch.value("pairs", Type::new(ty.dtype, [count]));
        let places = patch.value("places", ty.clone());
        let offsets = patch.value("offsets", Type::new(ty.dtype, [experts.checked_add(1)?]));
        let sort = OpKind::GroupRows { experts };
        let patch = patch.insert(Op::new(sort, vec![chosen.into()], vec![pairs, places, offsets], &op.scope));
        let experts = Some(experts);
        Some(Regrouping {
            graph,
            chosen,
            k,
            patch,
            pairs,
            places,
            offsets,
            rows: HashMap::new(),
            gathered: HashMap::new(),
            experts,
            bytes_each: 0,
        })
    }

    fn patch(mut self, context: &PassContext) -> Option<Patch> {
        let mut summed = false;
        let tokens = self.graph.ty(self.chosen).shape.first()?.size(&context.bucket.extents)?;
        let local = self.experts?;
        // Of a rank's own experts, all of which others select from.
        let spread = self.graph.ops.iter().find_map(|op| match op.kind {
            OpKind::LocalExperts { of, .. } if op.results == [self.chosen] => Some(of),
            _ => None,
        });
        let count = spread.unwrap_or(local);
        for (at, op) in self.graph.ops.iter().enumerate() {
            let starts = op.kind == OpKind::ExpertMatmul && op.operands[2] == self.chosen.into();
            if starts || op.uses().any(|value| self.rows.contains_key(&value)) {
                self.convert(at, op, context, (tokens, count))?;
                summed |= op.kind == OpKind::WeightedSum;
            }
        }
        if !summed || self.graph.outputs.iter().any(|output| self.rows.contains_key(output)) {
            return None;
        }
        let experts = Experts { rows: tokens, k: self.k, count, local, bytes_each: self.bytes_each };
        tactics::group_experts(context, &experts).then_some(self.patch)
    }

    /// Replaces an operator by one on sorted rows; `None` if there is no such. So many tokens select from so many experts.
    fn convert(&mut self, at: usize, op: &Op, context: &PassContext, (tokens, count): (u64, u64)) -> Option<()> {
        let (kind, operands) = match (&op.kind, &op.operands[..]) {
            (OpKind::ExpertMatmul, [x, weight, chosen]) if *chosen == self.chosen.into() => {
                self.count_weight(*weight)?;
                match x.value().and_then(|x| self.rows.get(&x)) {
                    Some(&rows) => (OpKind::GroupedMatmul, vec![rows.into(), *weight, self.offsets.into()]),
                    None if self.graph.ty(x.value()?).shape.len() != 2 => return None,
                    None if tactics::gather_apart(context, &self.product(x.value()?, *weight, tokens, count)?) => {
                        let rows = self.gather(x.value()?, op)?;
                        (OpKind::GroupedMatmul, vec![rows.into(), *weight, self.offsets.into()])
                    }
                    None => (
                        OpKind::GroupedMatmulGather { k: self.k },
                        vec![*x, *weight, self.pairs.into(), self.offsets.into()],
                    ),
                }
            }
            (OpKind::WeightedSum, [y, weights, chosen]) if *chosen == self.chosen.into() => {
                let y = *self.rows.get(&y.value()?)?;
                (OpKind::GroupedWeightedSum, vec![y.into(), *weights, self.places.into()])
            }
            _ => (op.kind.clone(), row_wise(op, &self.rows)?),
        };
        let results = match op.kind {
            OpKind::WeightedSum => op.results.clone(),
            _ => op.results.iter().map(|&result| self.sorted(result)).collect::<Option<_>>()?,
        };
        let patch = std::mem::replace(&mut self.patch, Patch::new(self.graph));
        self.patch = patch.remove(at).insert(Op::new(kind, operands, results, &op.scope));
        Some(())
    }

    /// The first product, of so many tokens `x` that select from so many experts, with the experts of this weight.
    fn product(&self, x: ValueId, weight: Operand, tokens: u64, count: u64) -> Option<Gathered> {
        let ty = &self.graph.weight(weight.weight()?).ty;
        let [experts, columns, depth] = ty.shape[..] else { return None };
        let (rows, experts) = (tokens.checked_mul(self.k)?, experts.as_fixed()?);
        Some(Gathered {
            rows,
            expected: rows.checked_mul(experts)?.checked_div(count)?,
            experts,
            columns: columns.as_fixed()?,
            depth: depth.as_fixed()?,
            dtypes: [self.graph.ty(x).dtype, ty.dtype],
        })
    }

    /// Sorted rows of a value `[T,N]`, by a step of its own, one for all products.
    fn gather(&mut self, x: ValueId, product: &Op) -> Option<ValueId> {
        if let Some(&rows) = self.gathered.get(&x) {
            return Some(rows);
        }
        let old = self.graph.value(x);
        let count = old.ty.shape.first()?.times(self.k)?;
        let rows = self.patch.value(&format!("{}.rows", old.name), Type::new(old.ty.dtype, [count, old.ty.shape[1]]));
        let patch = std::mem::replace(&mut self.patch, Patch::new(self.graph));
        let kind = OpKind::GatherPairs { k: self.k };
        self.patch = patch.insert(Op::new(kind, vec![x.into(), self.pairs.into()], vec![rows], &product.scope));
        self.gathered.insert(x, rows);
        Some(rows)
    }

    /// The value of sorted rows for one of `[T,k,N]`.
    fn sorted(&mut self, value: ValueId) -> Option<ValueId> {
        let old = self.graph.value(value);
        let [tokens, k, width] = old.ty.shape[..] else { return None };
        let ty = Type::new(old.ty.dtype, [tokens.times(k.as_fixed()?)?, width]);
        let rows = self.patch.value(&format!("{}.rows", old.name), ty);
        self.rows.insert(value, rows);
        Some(rows)
    }

    fn count_weight(&mut self, weight: Operand) -> Option<()> {
        let ty = &self.graph.weight(weight.weight()?).ty;
        let [experts, n, k] = ty.shape[..] else { return None };
        if experts.as_fixed() != self.experts {
            return None;
        }
        let bytes = ty.dtype.bytes().checked_mul(n.as_fixed()?)?.checked_mul(k.as_fixed()?)?;
        self.bytes_each = self.bytes_each.checked_add(bytes)?;
        Some(())
    }
}
