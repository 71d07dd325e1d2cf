//! Where an entity of a graph stands in its text.

use crate::ir::{Graph, OpKind};

/// An entity of a graph, by its position.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Location {
    /// The graph itself.
    Graph,
    /// An input, by position in [`Graph::inputs`].
    Input(usize),
    /// A state, by position in [`Graph::states`].
    State(usize),
    /// A weight, by position in [`Graph::weights`].
    Weight(usize),
    /// An operator, by position in [`Graph::ops`].
    Op(usize),
    /// An operator in the body of a fused one: position of the fused one, position in its body.
    Body(usize, usize),
    /// The list of outputs.
    Return,
}

/// The line of each entity in a text, counted from 1.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SourceMap {
    pub(crate) graph: usize,
    pub(crate) inputs: Vec<usize>,
    pub(crate) states: Vec<usize>,
    pub(crate) weights: Vec<usize>,
    pub(crate) ops: Vec<OpLines>,
    pub(crate) outputs: usize,
}

/// The lines of one operator.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct OpLines {
    pub(crate) line: usize,
    pub(crate) body: Vec<usize>,
}

impl SourceMap {
    /// The line of an entity; none if the text has no such entity.
    pub fn line(&self, location: Location) -> Option<usize> {
        match location {
            Location::Graph => Some(self.graph),
            Location::Input(at) => self.inputs.get(at).copied(),
            Location::State(at) => self.states.get(at).copied(),
            Location::Weight(at) => self.weights.get(at).copied(),
            Location::Op(at) => self.ops.get(at).map(|op| op.line),
            Location::Body(at, inner) => self.ops.get(at)?.body.get(inner).copied(),
            Location::Return => Some(self.outputs),
        }
    }

    /// The lines of a graph as it is printed.
    pub fn of_printed(graph: &Graph) -> Self {
        let mut next = 1;
        let mut line = || {
            next += 1;
            next - 1
        };
        let first = line();
        let states: Vec<usize> = graph.states.iter().map(|_| line()).collect();
        let weights: Vec<usize> = graph.weights.iter().map(|_| line()).collect();
        if !states.is_empty() || !weights.is_empty() {
            line();
        }
        let mut ops = Vec::with_capacity(graph.ops.len());
        for op in &graph.ops {
            let mut lines = OpLines { line: line(), body: vec![] };
            if matches!(op.kind, OpKind::Fused(_)) {
                lines.body = op.body.iter().map(|_| line()).collect();
                line();
            }
            ops.push(lines);
        }
        SourceMap { graph: first, inputs: vec![first; graph.inputs.len()], states, weights, ops, outputs: line() }
    }
}
