//! The part of a graph that is drawn: which operators, what they take from outside, what leaves them.

use std::collections::{HashMap, HashSet};

use crate::cli::draw::DotOptions;
use crate::ir::{Attribute, Graph, Op, OpKind, Operand, ValueId, stage_list};

/// The drawn part of a graph.
pub struct View<'g> {
    /// The whole graph.
    pub graph: &'g Graph,
    /// Positions of the drawn operators in [`Graph::ops`], ascending.
    pub ops: Vec<usize>,
    /// What the drawn operators take and none of them makes: inputs, then states, then what earlier layers made, each in
    /// the order of definition.
    pub sources: Vec<(ValueId, Source)>,
    /// What leaves the drawn operators: graph outputs, and what operators outside the drawing take.
    pub leaving: Vec<ValueId>,
    /// The state that a value is a version of.
    pub state_roots: HashMap<ValueId, ValueId>,
    /// For each graph input and state, the number of operators in the whole graph that take it.
    pub takers: HashMap<ValueId, usize>,
}

/// Where a value from outside comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// A parameter of the graph.
    Input,
    /// Persistent state.
    State,
    /// An operator that is not drawn.
    Earlier,
}

impl<'g> View<'g> {
    /// Selects the operators that `options` ask for.
    pub fn new(graph: &'g Graph, options: &DotOptions) -> Self {
        let wanted = |op: &Op| match &options.layers {
            None => true,
            Some(range) => layer(&op.scope).is_some_and(|layer| range.contains(&layer)),
        };
        let ops: Vec<usize> = (0..graph.ops.len()).filter(|&at| wanted(&graph.ops[at])).collect();
        let drawn: HashSet<usize> = ops.iter().copied().collect();
        let made: HashSet<ValueId> = ops.iter().flat_map(|&at| graph.ops[at].results.iter().copied()).collect();
        let mut taken: HashSet<ValueId> = HashSet::new();
        let mut taken_elsewhere: HashSet<ValueId> = graph.outputs.iter().copied().collect();
        let mut takers: HashMap<ValueId, usize> = HashMap::new();
        for (at, op) in graph.ops.iter().enumerate() {
            let uses: HashSet<ValueId> = op.uses().collect();
            for &value in &uses {
                *takers.entry(value).or_default() += 1;
            }
            if drawn.contains(&at) { taken.extend(uses) } else { taken_elsewhere.extend(uses) }
        }
        let all = options.layers.is_none();
        let mut sources = vec![];
        sources.extend(graph.inputs.iter().filter(|v| all || taken.contains(v)).map(|&v| (v, Source::Input)));
        sources.extend(graph.states.iter().filter(|v| all || taken.contains(v)).map(|&v| (v, Source::State)));
        let outside = (0..graph.ops.len()).filter(|at| !drawn.contains(at));
        let earlier = outside.flat_map(|at| &graph.ops[at].results).filter(|value| taken.contains(value));
        sources.extend(earlier.map(|&value| (value, Source::Earlier)));
        let results = ops.iter().flat_map(|&at| graph.ops[at].results.iter().copied());
        let mut leaving: Vec<ValueId> = results.filter(|value| taken_elsewhere.contains(value)).collect();
        if all {
            leaving.extend(graph.outputs.iter().filter(|value| !made.contains(value)));
            let mut seen = HashSet::new();
            leaving.retain(|value| seen.insert(*value));
        }
        View { graph, ops, sources, leaving, state_roots: graph.state_roots(), takers }
    }

    /// True for a state or a later version of one.
    pub fn is_state(&self, value: ValueId) -> bool {
        self.state_roots.contains_key(&value)
    }
}

/// The layer of a scope such as `layers.3.conv`.
pub fn layer(scope: &str) -> Option<u64> {
    scope.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

/// The part of a layer that a scope names: `conv` in `layers.3.conv`; of a scope outside of layers, all of it.
pub fn part(scope: &str) -> &str {
    if layer(scope).is_none() {
        return scope;
    }
    scope.splitn(3, '.').nth(2).unwrap_or("")
}

/// What a box says on top: the mnemonic, or the stages of a fused operator.
pub fn title(op: &Op) -> String {
    match &op.kind {
        OpKind::Fused(stages) if !stages.is_empty() => stage_list(stages),
        kind => kind.mnemonic().to_owned(),
    }
}

/// The attributes worth reading, and constants among the operands: `eps 1e-5`. What the types say already is left out.
pub fn details(op: &Op) -> String {
    let constants = op.operands.iter().filter_map(|operand| match operand {
        Operand::Const(x) => Some(number(*x)),
        _ => None,
    });
    let attributes = op.kind.attributes();
    let attributes = attributes.iter().filter(|(name, _)| *name != "sizes").map(|(name, value)| match value {
        Attribute::Float(x) => format!("{name} {}", number(*x)),
        other => format!("{name} {other}"),
    });
    constants.chain(attributes).collect::<Vec<_>>().join(", ")
}

/// Up to four significant digits: `1e-5`, `0.7979`.
fn number(x: f64) -> String {
    let exact = format!("{x:?}");
    let short = if x == 0.0 || (1e-3..1e4).contains(&x.abs()) { format!("{x:.4}") } else { format!("{x:.3e}") };
    let short = match short.split_once('e') {
        Some((digits, power)) => format!("{}e{power}", trim_zeros(digits)),
        None => trim_zeros(&short).to_owned(),
    };
    if short.len() < exact.len() { short } else { exact }
}

fn trim_zeros(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_taken_apart() {
        let both = |scope| (layer(scope), part(scope));
        assert_eq!(both("layers.3.conv"), (Some(3), "conv"));
        assert_eq!(both("layers.12.ffn.experts"), (Some(12), "ffn.experts"));
        assert_eq!(both("layers.12"), (Some(12), ""));
        assert_eq!(both("layers.x.conv"), (None, "layers.x.conv"));
        assert_eq!(both("head"), (None, "head"));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(1e-5), "1e-5");
        assert_eq!(number(1e6), "1e6");
        assert_eq!(number(0.797_884_560_802_865_4), "0.7979");
        assert_eq!(number(2.5), "2.5");
        assert_eq!(number(0.0), "0");
        assert_eq!(number(1.0), "1");
    }
}
