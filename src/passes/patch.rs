//! What a rewrite proposes, and how the driver applies it.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::ir::outside_operands;
use crate::ir::{Graph, Layout, Op, OpKind, Operand, Stage, Type, Users, Value, ValueId, Weight, WeightId};
use crate::passes::PassContext;
use crate::passes::order::{is_convex, sort_stably};

/// A rewriting pass: looks at one operator at a time and may propose a patch around it. The driver calls it on every
/// operator in program order until it proposes nothing more.
pub trait Rewrite: Sync {
    /// A patch around the operator at position `at`, or nothing.
    fn propose(&self, graph: &Graph, users: &Users, at: usize, context: &PassContext) -> Option<Patch>;
}

/// A change of the graph. Values and weights that it adds get the ids that follow those of the graph it was made for.
#[derive(Clone, PartialEq, Debug)]
pub struct Patch {
    first_value: usize,
    first_weight: usize,
    values: Vec<Value>,
    weights: Vec<Weight>,
    remove: BTreeSet<usize>,
    insert: Vec<Op>,
    layouts: Vec<(WeightId, Layout)>,
    replace: HashMap<ValueId, Operand>,
    /// Of the graph afterwards, where they become others.
    states: Option<Vec<ValueId>>,
    outputs: Option<Vec<ValueId>>,
}

impl Patch {
    /// A patch that changes nothing yet.
    pub fn new(graph: &Graph) -> Self {
        Patch {
            first_value: graph.values.len(),
            first_weight: graph.weights.len(),
            values: vec![],
            weights: vec![],
            remove: BTreeSet::new(),
            insert: vec![],
            layouts: vec![],
            replace: HashMap::new(),
            states: None,
            outputs: None,
        }
    }

    /// Makes these the graph's states, and these what it returns: values of the graph, or of the patch. What is replaced is so here too.
    #[must_use]
    pub fn with_ends(mut self, states: Vec<ValueId>, outputs: Vec<ValueId>) -> Self {
        (self.states, self.outputs) = (Some(states), Some(outputs));
        self
    }

    /// Adds a value; its name is made unique when the patch is applied.
    pub fn value(&mut self, name: &str, ty: Type) -> ValueId {
        self.values.push(Value { name: name.to_owned(), ty });
        ValueId::new(self.first_value + self.values.len() - 1)
    }

    /// Adds a weight, or finds the one that is the same; if its name stands for another weight, a number makes it unique.
    pub fn weight(&mut self, graph: &Graph, weight: Weight) -> WeightId {
        let mut unique = weight.clone();
        let mut n = 0;
        while let Some(at) = graph.weights.iter().chain(&self.weights).position(|w| w.name == unique.name) {
            let found = graph.weights.get(at).unwrap_or_else(|| &self.weights[at - self.first_weight]);
            if found.ty == weight.ty && found.layout == weight.layout {
                return WeightId::new(at);
            }
            n += 1;
            unique.name = format!("{}.{n}", weight.name);
        }
        self.weights.push(unique);
        WeightId::new(self.first_weight + self.weights.len() - 1)
    }

    /// Gives a weight of the graph another layout, for all its users: these must be in the patch or not depend on it.
    pub fn lay_out(mut self, weight: WeightId, layout: Layout) -> Self {
        self.layouts.push((weight, layout));
        self
    }

    /// Removes the operator at a position.
    pub fn remove(mut self, at: usize) -> Self {
        self.remove.insert(at);
        self
    }

    /// Adds an operator. Where it goes in program order follows from its operands.
    pub fn insert(mut self, op: Op) -> Self {
        self.insert.push(op);
        self
    }

    /// Makes every remaining use of a value, the graph's results included, use an operand instead.
    pub fn replace(mut self, value: ValueId, with: Operand) -> Self {
        self.replace.insert(value, with);
        self
    }

    /// A patch that makes one fused operator of the operators at `positions`, with `stages` as its label. Operators that are
    /// fused already contribute their bodies. `None` if the result would depend on itself, or if there is nothing to fuse.
    pub fn fuse(graph: &Graph, users: &Users, positions: &[usize], stages: Vec<Stage>) -> Option<Patch> {
        let members: BTreeSet<usize> = positions.iter().copied().collect();
        if members.is_empty() || !is_convex(graph, users, &members) {
            return None;
        }
        let mut patch = Patch::new(graph);
        patch.insert.push(fuse_ops(graph, users, &members, stages));
        patch.remove = members;
        Some(patch)
    }

    /// The same with what it inserts in that scope, where members are of several.
    #[must_use]
    pub fn in_scope(mut self, scope: &str) -> Patch {
        self.insert.iter_mut().for_each(|op| scope.clone_into(&mut op.scope));
        self
    }

    /// The operator that the patch makes of others, if it does nothing else.
    pub fn fused(&self) -> Option<&Op> {
        match &self.insert[..] {
            [op] if !op.body.is_empty() && self.values.is_empty() && self.weights.is_empty() => Some(op),
            _ => None,
        }
    }

    /// The first position that the patch touches, if it removes anything.
    pub fn first_removed(&self) -> Option<usize> {
        self.remove.first().copied()
    }

    /// Applies the patch. False, with the graph in an unspecified state, if operators would then depend on each other in a
    /// circle, or if the graph would return something that is no value.
    ///
    /// # Panics
    /// If the patch was made for another graph.
    pub fn apply(self, graph: &mut Graph) -> bool {
        let made_for = (self.first_value, self.first_weight);
        assert_eq!(made_for, (graph.values.len(), graph.weights.len()), "the patch was made for another graph");
        for value in &self.values {
            graph.add_value(&value.name, value.ty.clone());
        }
        graph.weights.extend(self.weights.iter().cloned());
        for (weight, layout) in &self.layouts {
            graph.weights[weight.index()].layout = layout.clone();
        }
        if let Some(states) = &self.states {
            graph.states.clone_from(states);
        }
        if let Some(outputs) = &self.outputs {
            graph.outputs.clone_from(outputs);
        }
        if !self.replace.is_empty() {
            for op in &mut graph.ops {
                self.substitute(op);
            }
            for output in &mut graph.outputs {
                match self.replacement(*output) {
                    None => {}
                    Some(Operand::Value(with)) => *output = with,
                    Some(_) => return false,
                }
            }
        }
        self.splice(graph);
        drop_unused_results(graph);
        sort_stably(graph)
    }

    /// Takes the removed operators out and puts the new ones in: where the first removed one was, or else before the
    /// first that uses one of their results.
    fn splice(mut self, graph: &mut Graph) {
        let mut insert = std::mem::take(&mut self.insert);
        for op in &mut insert {
            self.substitute(op);
        }
        let made: HashSet<ValueId> = insert.iter().flat_map(|op| op.results.iter().copied()).collect();
        let place = self.first_removed().or_else(|| {
            let uses_made = |op: &Op| op.uses().any(|value| made.contains(&value));
            graph.ops.iter().position(uses_made)
        });
        let mut ops: Vec<Op> = Vec::with_capacity(graph.ops.len() + insert.len());
        for (at, op) in std::mem::take(&mut graph.ops).into_iter().enumerate() {
            if Some(at) == place {
                ops.append(&mut insert);
            }
            if !self.remove.contains(&at) {
                ops.push(op);
            }
        }
        ops.append(&mut insert);
        graph.ops = ops;
    }

    /// What stands for a value after the patch, if that is something else; follows replacements of replacements.
    fn replacement(&self, value: ValueId) -> Option<Operand> {
        let mut with = *self.replace.get(&value)?;
        for _ in 0..self.replace.len() {
            match with.value().and_then(|value| self.replace.get(&value)) {
                Some(next) => with = *next,
                None => break,
            }
        }
        Some(with)
    }

    fn substitute(&self, op: &mut Op) {
        let mut changed = false;
        for operand in &mut op.operands {
            if let Operand::Value(value) = operand
                && let Some(with) = self.replacement(*value)
            {
                *operand = with;
                changed = true;
            }
        }
        if changed && !op.body.is_empty() {
            for inner in &mut op.body {
                self.substitute(inner);
            }
            op.operands = outside_operands(&op.body);
        }
    }
}

/// Takes from fused operators the results that nothing uses any more: results are what the outside takes.
fn drop_unused_results(graph: &mut Graph) {
    let mut used = vec![false; graph.values.len()];
    for value in graph.ops.iter().flat_map(Op::uses).chain(graph.outputs.iter().copied()) {
        used[value.index()] = true;
    }
    for op in graph.ops.iter_mut().filter(|op| !op.body.is_empty()) {
        op.results.retain(|result| used[result.index()]);
    }
}

/// One fused operator of the members' primitives.
fn fuse_ops(graph: &Graph, users: &Users, members: &BTreeSet<usize>, stages: Vec<Stage>) -> Op {
    let body: Vec<Op> = members.iter().flat_map(|&at| graph.ops[at].primitives().to_vec()).collect();
    let used_outside =
        |result: ValueId| users.is_output(result) || users.of(result).iter().any(|user| !members.contains(user));
    let results = members.iter().flat_map(|&at| graph.ops[at].results.iter().copied());
    Op {
        operands: outside_operands(&body),
        results: results.filter(|&result| used_outside(result)).collect(),
        kind: OpKind::Fused(stages),
        scope: common_scope(members.iter().map(|&at| graph.ops[at].scope.as_str())),
        body,
    }
}

/// The longest scope that all share, in whole segments.
fn common_scope<'a>(mut scopes: impl Iterator<Item = &'a str>) -> String {
    let Some(first) = scopes.next() else { return String::new() };
    let mut common: Vec<&str> = first.split('.').collect();
    for scope in scopes {
        let shared = common.iter().zip(scope.split('.')).take_while(|(a, b)| **a == *b).count();
        common.truncate(shared);
    }
    common.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{UnaryFn, parse};

    fn graph(body: &str) -> Graph {
        parse(&format!("graph @g (%x: f32[T,8]) {{\n{body}\n}}")).expect("the text is a graph").graph
    }

    fn applied(patch: Patch, mut graph: Graph) -> String {
        assert!(patch.apply(&mut graph));
        graph.to_string()
    }

    fn exp(operand: ValueId, result: ValueId) -> Op {
        Op::new(OpKind::Unary(UnaryFn::Exp), vec![operand.into()], vec![result], "")
    }

    #[test]
    fn names_and_order_follow_from_what_is_there() {
        let graph = graph("%a = tanh %x : f32[T,8]\n%b = neg %x : f32[T,8]\n%c = mul %b, %a : f32[T,8]\nreturn %c");
        let (x, a) = (graph.inputs[0], graph.ops[0].results[0]);
        let mut patch = Patch::new(&graph);
        let ty = graph.ty(x).clone();
        let first = patch.value("a", ty.clone());
        let second = patch.value("a", ty);
        let b = graph.ops[1].results[0];
        let text =
            applied(patch.remove(0).insert(exp(first, second)).insert(exp(b, first)).replace(a, second.into()), graph);
        assert_eq!(
            text,
            "graph @g (%x: f32[T,8]) {\n  %b = neg %x : f32[T,8]\n  %a.1 = exp %b : f32[T,8]\n  %a.2 = exp %a.1 : f32[T,8]\n  \
             %c = mul %b, %a.2 : f32[T,8]\n  return %c\n}\n"
        );
    }

    #[test]
    fn replacements_chain_reach_bodies_and_outputs() {
        let graph = graph(
            "%a = tanh %x : f32[T,8]\n%b = cast %a : f32[T,8]\n%c = fused[pointwise] %b, %a : f32[T,8] {\n\
             %d = neg %b : f32[T,8]\n%c = add %d, %a : f32[T,8]\n}\nreturn %c, %b",
        );
        let (x, a, b) = (graph.inputs[0], graph.ops[0].results[0], graph.ops[1].results[0]);
        let patch = Patch::new(&graph).remove(0).remove(1).replace(b, a.into()).replace(a, x.into());
        assert_eq!(
            applied(patch, graph),
            "graph @g (%x: f32[T,8]) {\n  %c = fused[pointwise] %x : f32[T,8] {\n    %d = neg %x : f32[T,8]\n    \
             %c = add %d, %x : f32[T,8]\n  }\n  return %c, %x\n}\n"
        );
    }

    #[test]
    fn a_fused_operator_gives_only_what_is_still_used() {
        let graph = graph(
            "%a, %b = fused[pointwise] %x : f32[T,8], f32[T,8] {\n%a = tanh %x : f32[T,8]\n%b = neg %a : f32[T,8]\n}\n\
             %c = exp %b : f32[T,8]\nreturn %a",
        );
        let text = applied(Patch::new(&graph).remove(1), graph);
        assert!(text.contains("  %a = fused[pointwise] %x : f32[T,8] {\n"), "{text}");
    }

    #[test]
    fn an_output_cannot_become_a_number() {
        let mut graph = graph("%a = tanh %x : f32[T,8]\nreturn %a");
        let patch = Patch::new(&graph).remove(0).replace(graph.ops[0].results[0], Operand::Const(1.0));
        assert!(!patch.apply(&mut graph));
    }

    #[test]
    fn an_operator_without_a_place_goes_before_its_first_user() {
        let graph = graph("%a = tanh %x : f32[T,8]\n%b = neg %a : f32[T,8]\n%c = abs %a : f32[T,8]\nreturn %b, %c");
        let mut patch = Patch::new(&graph);
        let made = patch.value("made", graph.ty(graph.inputs[0]).clone());
        let patch = patch.insert(exp(graph.inputs[0], made)).replace(graph.ops[0].results[0], made.into());
        let text = applied(patch, graph);
        let order: Vec<&str> =
            text.lines().filter_map(|line| line.trim().split(" = ").nth(1)?.split(' ').next()).collect();
        assert_eq!(order, ["tanh", "exp", "neg", "abs"]);
    }

    #[test]
    fn weights_are_found_by_contents_and_named_apart() {
        let graph = graph("weight @w : f32[8]\n%a = mul %x, @w : f32[T,8]\nreturn %a");
        let mut patch = Patch::new(&graph);
        let same = patch.weight(&graph, graph.weights[0].clone());
        let joined = Layout::Concat { axis: 0, block: None, parts: vec![same, same] };
        let other = Weight { name: "w".into(), ty: Type::new(graph.weights[0].ty.dtype, [16u64]), layout: joined };
        let first = patch.weight(&graph, other.clone());
        assert_eq!((same, first, patch.weight(&graph, other)), (WeightId(0), WeightId(1), WeightId(1)));
        let mut graph = graph;
        assert!(patch.apply(&mut graph));
        assert_eq!(graph.weights[1].name, "w.1");
    }

    #[test]
    fn fusing_nothing_or_around_an_outsider_is_refused() {
        let graph = graph("%a = tanh %x : f32[T,8]\n%b = neg %a : f32[T,8]\n%c = mul %a, %b : f32[T,8]\nreturn %c");
        let users = graph.users();
        let fuse = |positions: &[usize]| Patch::fuse(&graph, &users, positions, vec![Stage::Pointwise]);
        assert!(fuse(&[]).is_none() && fuse(&[0, 2]).is_none());
        assert!(fuse(&[2, 1, 0]).is_some());
    }
}
