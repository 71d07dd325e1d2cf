//! What a rewrite proposes, and how the driver applies it.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

use crate::ir::{Graph, Op, OpKind, Operand, Stage, Type, Users, Value, ValueId, Weight, WeightId, outside_operands};
use crate::passes::PassContext;

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
    replace: HashMap<ValueId, Operand>,
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
            replace: HashMap::new(),
        }
    }

    /// Adds a value; its name is made unique when the patch is applied.
    pub fn value(&mut self, name: &str, ty: Type) -> ValueId {
        self.values.push(Value { name: name.to_owned(), ty });
        ValueId::new(self.first_value + self.values.len() - 1)
    }

    /// Adds a weight, or finds the one of that name.
    pub fn weight(&mut self, graph: &Graph, weight: Weight) -> WeightId {
        if let Some(at) = graph.weights.iter().chain(&self.weights).position(|w| w.name == weight.name) {
            return WeightId::new(at);
        }
        self.weights.push(weight);
        WeightId::new(self.first_weight + self.weights.len() - 1)
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
        let scope = common_scope(members.iter().map(|&at| graph.ops[at].scope.as_str()));
        let mut fused = fuse_ops(graph, users, &members, stages)?;
        fused.scope = scope;
        let mut patch = Patch::new(graph);
        patch.remove = members;
        patch.insert.push(fused);
        let mut trial = graph.clone();
        patch.apply(&mut trial).then_some(patch)
    }

    /// Applies the patch; false, with the graph in an unspecified state, if operators would then depend on each other in a circle.
    pub fn apply(&self, graph: &mut Graph) -> bool {
        assert_eq!(self.first_value, graph.values.len(), "the patch was made for another graph");
        for value in &self.values {
            graph.add_value(&value.name, value.ty.clone());
        }
        graph.weights.extend(self.weights.iter().cloned());
        let place = self.remove.first().copied();
        let mut ops: Vec<Op> = Vec::with_capacity(graph.ops.len() + self.insert.len());
        for (at, op) in std::mem::take(&mut graph.ops).into_iter().enumerate() {
            if Some(at) == place {
                ops.extend(self.insert.iter().cloned());
            }
            if !self.remove.contains(&at) {
                ops.push(op);
            }
        }
        if self.remove.is_empty() {
            ops.extend(self.insert.iter().cloned());
        }
        if !self.replace.is_empty() {
            for op in &mut ops {
                self.substitute(op);
            }
            for output in &mut graph.outputs {
                if let Some(Operand::Value(with)) = self.replace.get(output) {
                    *output = *with;
                }
            }
        }
        graph.ops = ops;
        sort_stably(graph)
    }

    fn substitute(&self, op: &mut Op) {
        for operand in &mut op.operands {
            if let Operand::Value(value) = operand
                && let Some(with) = self.replace.get(value)
            {
                *operand = *with;
            }
        }
        for inner in &mut op.body {
            self.substitute(inner);
        }
        if !op.body.is_empty() {
            op.operands = outside_operands(&op.body);
        }
    }
}

/// One fused operator of the members' primitives.
fn fuse_ops(graph: &Graph, users: &Users, members: &BTreeSet<usize>, stages: Vec<Stage>) -> Option<Op> {
    if members.is_empty() {
        return None;
    }
    let body: Vec<Op> = members.iter().flat_map(|&at| graph.ops[at].primitives().to_vec()).collect();
    let operands = outside_operands(&body);
    let mut results = vec![];
    for &at in members {
        for &result in &graph.ops[at].results {
            let used_outside = users.is_output(result) || users.of(result).iter().any(|user| !members.contains(user));
            if used_outside {
                results.push(result);
            }
        }
    }
    Some(Op { kind: OpKind::Fused(stages), operands, results, scope: String::new(), body })
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

/// Puts operators into an order in which each follows what it depends on, changing as little as possible; false if there is
/// none.
fn sort_stably(graph: &mut Graph) -> bool {
    let dag = graph.dependencies();
    let mut waiting: Vec<usize> = vec![0; graph.ops.len()];
    for edge in dag.edge_indices() {
        let (_, to) = dag.edge_endpoints(edge).expect("the edge is in the graph");
        waiting[to.index()] += 1;
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        waiting.iter().enumerate().filter(|(_, n)| **n == 0).map(|(at, _)| Reverse(at)).collect();
    let mut order = Vec::with_capacity(graph.ops.len());
    while let Some(Reverse(at)) = ready.pop() {
        order.push(at);
        for next in dag.neighbors(petgraph::graph::NodeIndex::new(at)) {
            waiting[next.index()] -= 1;
            if waiting[next.index()] == 0 {
                ready.push(Reverse(next.index()));
            }
        }
    }
    if order.len() != graph.ops.len() {
        return false;
    }
    let mut ops: Vec<Option<Op>> = std::mem::take(&mut graph.ops).into_iter().map(Some).collect();
    graph.ops = order.into_iter().map(|at| ops[at].take().expect("each position once")).collect();
    true
}
