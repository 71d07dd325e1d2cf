//! Definitions, uses and operands: invariants 6 to 10.

use std::collections::HashSet;

use super::{Faults, primitives};
use crate::ir::{Attribute, DType, Graph, Location, Op, OpKind, Operand, Type, ValueId, shape};

pub(super) fn check(graph: &Graph, faults: &mut Faults) {
    definitions(graph, faults);
    for (location, op) in primitives(graph) {
        operand_kinds(op, location, faults);
        for (name, value) in op.kind.attributes() {
            if let Attribute::Float(x) = value
                && !x.is_finite()
            {
                faults.add(location, format!("`{name}` must be finite, found {x}"));
            }
        }
        let operands: Vec<Type> = op.operands.iter().map(|operand| operand_type(graph, *operand)).collect();
        let results: Vec<Type> = op.results.iter().map(|&id| graph.ty(id).clone()).collect();
        for fault in shape::check(&op.kind, &operands, &results) {
            faults.add(location, fault);
        }
    }
}

fn operand_type(graph: &Graph, operand: Operand) -> Type {
    match operand {
        Operand::Value(id) => graph.ty(id).clone(),
        Operand::Weight(id) => graph.weight(id).ty.clone(),
        Operand::Const(_) => Type { dtype: DType::F32, shape: vec![] },
    }
}

/// What is known of a value at a place of the program.
#[derive(Clone, Copy, PartialEq)]
enum Known {
    No,
    Everywhere,
    /// Only in the body of the operator at this position.
    Inside(usize),
}

struct Scan<'a> {
    graph: &'a Graph,
    known: Vec<Known>,
    /// Values with a definition anywhere.
    defined: HashSet<ValueId>,
}

fn definitions(graph: &Graph, faults: &mut Faults) {
    let results = primitives(graph).flat_map(|(_, op)| op.results.iter());
    let defined = graph.inputs.iter().chain(&graph.states).chain(results).copied().collect();
    let mut scan = Scan { graph, known: vec![Known::No; graph.values.len()], defined };
    for (at, &id) in graph.inputs.iter().enumerate() {
        scan.define(id, Known::Everywhere, Location::Input(at), faults);
    }
    for (at, &id) in graph.states.iter().enumerate() {
        scan.define(id, Known::Everywhere, Location::State(at), faults);
    }
    for (at, op) in graph.ops.iter().enumerate() {
        if op.body.is_empty() {
            scan.uses(op, None, Location::Op(at), faults);
            for &id in &op.results {
                scan.define(id, Known::Everywhere, Location::Op(at), faults);
            }
            continue;
        }
        for (inner_at, inner) in op.body.iter().enumerate() {
            let location = Location::Body(at, inner_at);
            scan.uses(inner, Some(at), location, faults);
            for &id in &inner.results {
                scan.define(id, Known::Inside(at), location, faults);
            }
        }
        let mut listed = HashSet::new();
        for &id in &op.results {
            let again = !listed.insert(id);
            if scan.known[id.index()] == Known::Inside(at) {
                scan.known[id.index()] = Known::Everywhere;
            } else {
                let name = &graph.value(id).name;
                let message = if again { "is listed twice" } else { "is not defined in the body" };
                faults.add(Location::Op(at), format!("result `%{name}` {message}"));
            }
        }
    }
    let mut returned = HashSet::new();
    for &id in &graph.outputs {
        scan.use_of(id, None, Location::Return, faults);
        if !returned.insert(id) {
            faults.add(Location::Return, format!("`%{}` is returned twice", graph.value(id).name));
        }
    }
}

impl Scan<'_> {
    fn define(&mut self, id: ValueId, known: Known, location: Location, faults: &mut Faults) {
        if self.known[id.index()] != Known::No {
            faults.add(location, format!("`%{}` is defined a second time", self.graph.value(id).name));
        }
        self.known[id.index()] = known;
    }

    fn uses(&self, op: &Op, body: Option<usize>, location: Location, faults: &mut Faults) {
        let mut seen = HashSet::new();
        for id in op.uses().filter(|id| seen.insert(*id)) {
            self.use_of(id, body, location, faults);
        }
    }

    fn use_of(&self, id: ValueId, body: Option<usize>, location: Location, faults: &mut Faults) {
        let name = &self.graph.value(id).name;
        match self.known[id.index()] {
            Known::Everywhere => {}
            Known::Inside(at) if body == Some(at) => {}
            Known::Inside(_) => {
                faults.add(location, format!("`%{name}` is inside a fused operator that does not give it as a result"));
            }
            Known::No if self.defined.contains(&id) => {
                faults.add(location, format!("`%{name}` is used before its definition"));
            }
            Known::No => faults.add(location, format!("`%{name}` is not defined")),
        }
    }
}

/// The operand that must be a weight, if the operator takes one.
fn weight_operand(kind: &OpKind) -> Option<usize> {
    match kind {
        OpKind::Embed
        | OpKind::RmsNorm { .. }
        | OpKind::Matmul
        | OpKind::Conv1dCausal
        | OpKind::ExpertMatmul
        | OpKind::GroupedMatmulGather { .. }
        | OpKind::GroupedMatmul => Some(1),
        _ => None,
    }
}

fn operand_kinds(op: &Op, location: Location, faults: &mut Faults) {
    let mut numbers = 0;
    for (i, operand) in op.operands.iter().enumerate() {
        let needs_weight = weight_operand(&op.kind) == Some(i);
        match operand {
            Operand::Value(_) if needs_weight => faults.add(location, format!("operand {i} must be a weight")),
            Operand::Weight(_) if !needs_weight && !op.kind.is_pointwise() => {
                faults.add(location, format!("operand {i} must not be a weight"));
            }
            Operand::Const(x) => {
                numbers += 1;
                if !matches!(op.kind, OpKind::Binary(_)) {
                    faults.add(location, format!("operand {i} must not be a number"));
                } else if numbers == 2 {
                    faults.add(location, "at least one operand must not be a number");
                }
                if !x.is_finite() {
                    faults.add(location, format!("operand {i} must be finite, found {x}"));
                }
            }
            _ => {}
        }
    }
}
