//! The graph: values, weights and operators in program order.
//!
//! A value is defined once and used after its definition (SSA). State is a value too: an operator that updates it gives
//! its next version as a result, so that order between readers and writers is an ordinary dependency. A fused operator holds
//! its primitive operators as a body; values inside keep their ids, operands list what the body takes from outside and
//! results what the outside takes from it.

use std::collections::{BTreeSet, HashMap, HashSet};

use petgraph::graph::{DiGraph, NodeIndex};

use crate::ir::{DType, OpKind, Type, ValueId, WeightId};

/// A decoder, or any other dataflow graph, for all sizes of its symbols.
#[derive(Clone, PartialEq, Debug)]
pub struct Graph {
    /// Its name, without the `@`.
    pub name: String,
    /// The parameters, in signature order.
    pub inputs: Vec<ValueId>,
    /// The persistent state, in declaration order.
    pub states: Vec<ValueId>,
    /// All values ever made; a rewrite may leave some without a definition, which then are not printed.
    pub values: Vec<Value>,
    /// All weights; parts of a laid-out weight come before it.
    pub weights: Vec<Weight>,
    /// Operators in program order.
    pub ops: Vec<Op>,
    /// What the graph returns.
    pub outputs: Vec<ValueId>,
    names: Names,
}

/// The value names that are taken, each with the next number to try behind it; covers the first `known` values.
/// A cache: it takes no part in comparisons.
#[derive(Clone, Default, Debug)]
struct Names {
    next: HashMap<String, u32>,
    known: usize,
}

impl PartialEq for Names {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Names {
    /// Learns what was added to `values` since the last call.
    fn follow(&mut self, values: &[Value]) {
        if self.known > values.len() {
            *self = Names::default();
        }
        for value in &values[self.known..] {
            self.next.entry(value.name.clone()).or_insert(1);
        }
        self.known = values.len();
    }

    /// The name itself, or if it is taken, with the first number that makes it unique.
    fn unique(&mut self, name: &str) -> String {
        let Some(&first) = self.next.get(name) else { return name.to_owned() };
        let mut n = first;
        let mut unique = format!("{name}.{n}");
        while self.next.contains_key(&unique) {
            n += 1;
            unique = format!("{name}.{n}");
        }
        self.next.insert(name.to_owned(), n + 1);
        unique
    }
}

/// A value's name, without the `%`, and type.
#[derive(Clone, PartialEq, Debug)]
pub struct Value {
    /// Unique in its graph.
    pub name: String,
    /// Element type and shape.
    pub ty: Type,
}

/// A weight as it lies in the pool.
#[derive(Clone, PartialEq, Debug)]
pub struct Weight {
    /// Unique in its graph, without the `@`; for a checkpoint tensor, the tensor's name.
    pub name: String,
    /// Element type in the pool, and shape (constants only).
    pub ty: Type,
    /// Where its contents come from.
    pub layout: Layout,
}

/// What a weight is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Layout {
    /// The checkpoint tensor of the weight's name.
    Tensor,
    /// Other weights joined along an axis; taken in turn, `block` indices of that axis at a time, if `block` is given.
    Concat {
        /// The axis.
        axis: u64,
        /// Interleaving; the parts then have one size and `block` divides it.
        block: Option<u64>,
        /// The parts, each a [`Layout::Tensor`].
        parts: Vec<WeightId>,
    },
    /// Some indices of another weight's first axis, in this order.
    Take {
        /// The other weight, no [`Layout::Take`].
        of: WeightId,
        /// Which.
        indices: Vec<u64>,
    },
}

impl Layout {
    /// The weights that it is made of.
    pub fn parts(&self) -> &[WeightId] {
        match self {
            Layout::Tensor => &[],
            Layout::Concat { parts, .. } => parts,
            Layout::Take { of, .. } => std::slice::from_ref(of),
        }
    }
}

/// One operator.
#[derive(Clone, PartialEq, Debug)]
pub struct Op {
    /// What it computes.
    pub kind: OpKind,
    /// Its operands.
    pub operands: Vec<Operand>,
    /// Its results.
    pub results: Vec<ValueId>,
    /// Where it belongs in the model, such as `layers.3.conv`; empty where it belongs nowhere in particular.
    pub scope: String,
    /// For [`OpKind::Fused`], the primitive operators in program order; else empty.
    pub body: Vec<Op>,
}

/// An operand.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Operand {
    /// A value.
    Value(ValueId),
    /// A weight.
    Weight(WeightId),
    /// A number.
    Const(f64),
}

impl Operand {
    /// The value, if it is one.
    pub fn value(self) -> Option<ValueId> {
        match self {
            Operand::Value(id) => Some(id),
            _ => None,
        }
    }

    /// The weight, if it is one.
    pub fn weight(self) -> Option<WeightId> {
        match self {
            Operand::Weight(id) => Some(id),
            _ => None,
        }
    }
}

impl From<ValueId> for Operand {
    fn from(id: ValueId) -> Self {
        Operand::Value(id)
    }
}

impl From<WeightId> for Operand {
    fn from(id: WeightId) -> Self {
        Operand::Weight(id)
    }
}

impl Op {
    /// A primitive operator.
    pub fn new(kind: OpKind, operands: Vec<Operand>, results: Vec<ValueId>, scope: &str) -> Self {
        Op { kind, operands, results, scope: scope.to_owned(), body: vec![] }
    }

    /// The primitive operators it stands for: its body, or itself.
    pub fn primitives(&self) -> &[Op] {
        if self.body.is_empty() { std::slice::from_ref(self) } else { &self.body }
    }

    /// The values it takes.
    pub fn uses(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.operands.iter().filter_map(|operand| operand.value())
    }
}

/// What a body takes from outside, each once, in order of first use; constants stay inside.
pub fn outside_operands(body: &[Op]) -> Vec<Operand> {
    let inside: HashSet<ValueId> = body.iter().flat_map(|op| op.results.iter().copied()).collect();
    let (mut values, mut weights) = (HashSet::new(), HashSet::new());
    let first_use_outside = |operand: &Operand| match operand {
        Operand::Value(value) => !inside.contains(value) && values.insert(*value),
        Operand::Weight(weight) => weights.insert(*weight),
        Operand::Const(_) => false,
    };
    body.iter().flat_map(|op| op.operands.iter().copied()).filter(first_use_outside).collect()
}

impl Graph {
    /// An empty graph.
    pub fn new(name: &str) -> Self {
        Graph {
            name: name.to_owned(),
            inputs: vec![],
            states: vec![],
            values: vec![],
            weights: vec![],
            ops: vec![],
            outputs: vec![],
            names: Names::default(),
        }
    }

    /// The value of an id.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// The type of a value.
    pub fn ty(&self, id: ValueId) -> &Type {
        &self.values[id.index()].ty
    }

    /// The type of an operand; of a constant, `f32[]`.
    pub fn operand_type(&self, operand: &Operand) -> Type {
        match operand {
            Operand::Value(id) => self.ty(*id).clone(),
            Operand::Weight(id) => self.weight(*id).ty.clone(),
            Operand::Const(_) => Type { dtype: DType::F32, shape: vec![] },
        }
    }

    /// The weight of an id.
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.index()]
    }

    /// Adds a value; the name is made unique by a number if it is taken.
    pub fn add_value(&mut self, name: &str, ty: Type) -> ValueId {
        self.names.follow(&self.values);
        let name = self.names.unique(name);
        self.values.push(Value { name, ty });
        ValueId::new(self.values.len() - 1)
    }

    /// Adds a weight, or returns the one of that name if it is the same.
    ///
    /// # Panics
    /// If the name stands for another weight: two layouts of one name would be a bug of the pass that made them.
    pub fn add_weight(&mut self, weight: Weight) -> WeightId {
        if let Some(at) = self.weights.iter().position(|w| w.name == weight.name) {
            assert_eq!(self.weights[at], weight, "two weights are called @{}", weight.name);
            return WeightId::new(at);
        }
        self.weights.push(weight);
        WeightId::new(self.weights.len() - 1)
    }

    /// The dependency graph over positions in [`Graph::ops`]: an edge from the operator that defines a value to each that
    /// uses it, and from each reader of a state to the operator that makes its next version.
    pub fn dependencies(&self) -> DiGraph<usize, ValueId> {
        let mut dag = DiGraph::with_capacity(self.ops.len(), self.ops.len() * 2);
        for at in 0..self.ops.len() {
            dag.add_node(at);
        }
        let users = self.users();
        for (at, op) in self.ops.iter().enumerate() {
            for value in op.uses().collect::<BTreeSet<_>>() {
                if let Some(from) = users.definition(value) {
                    dag.add_edge(NodeIndex::new(from), NodeIndex::new(at), value);
                }
            }
            for (old, _) in op.state_updates() {
                for &reader in users.of(old) {
                    if reader != at {
                        dag.add_edge(NodeIndex::new(reader), NodeIndex::new(at), old);
                    }
                }
            }
        }
        dag
    }

    /// The version-less state each value stands for: itself for a state, the state it was made from for an updated one.
    pub fn state_roots(&self) -> HashMap<ValueId, ValueId> {
        let mut roots: HashMap<ValueId, ValueId> = self.states.iter().map(|&s| (s, s)).collect();
        for op in &self.ops {
            for (old, new) in op.state_updates() {
                if let Some(&root) = roots.get(&old) {
                    roots.insert(new, root);
                }
            }
        }
        roots
    }
}

impl Op {
    /// The states it updates, as (version taken, version made).
    pub fn state_updates(&self) -> Vec<(ValueId, ValueId)> {
        self.primitives()
            .iter()
            .filter_map(|op| {
                let (operand, result) = op.kind.state_update()?;
                Some((op.operands.get(operand)?.value()?, *op.results.get(result)?))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_names_are_made_unique() {
        let mut graph = Graph::new("g");
        let ty = Type::new(crate::ir::DType::F32, [1u64]);
        graph.values.push(Value { name: "a.2".into(), ty: ty.clone() });
        for name in ["a", "a", "a", "a.1", "a.1"] {
            graph.add_value(name, ty.clone());
        }
        graph.values.push(Value { name: "b".into(), ty: ty.clone() });
        graph.add_value("b", ty.clone());
        let names = |graph: &Graph| graph.values.iter().map(|value| value.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&graph), ["a.2", "a", "a.1", "a.3", "a.1.1", "a.1.2", "b", "b.1"]);
        graph.values.truncate(1);
        graph.add_value("b", ty);
        assert_eq!(names(&graph), ["a.2", "b"]);
    }
}
