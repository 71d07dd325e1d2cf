//! Ids, names, types and weights: invariants 1 to 5 and 14.

use std::collections::HashMap;

use super::Faults;
use crate::ir::lexer::is_name;
use crate::ir::{Dim, Graph, Layout, Location, Op, OpKind, Operand, Type, ValueId, Weight, WeightId};

/// Ids, and bodies only where they may be; the other checks rely on these.
pub(super) fn check_ids(graph: &Graph, faults: &mut Faults) {
    let ids = Ids { values: graph.values.len(), weights: graph.weights.len() };
    for (at, &id) in graph.inputs.iter().enumerate() {
        ids.value(id, Location::Input(at), faults);
    }
    for (at, &id) in graph.states.iter().enumerate() {
        ids.value(id, Location::State(at), faults);
    }
    for (at, weight) in graph.weights.iter().enumerate() {
        weight.layout.parts().iter().for_each(|&id| ids.weight(id, Location::Weight(at), faults));
    }
    for (at, op) in graph.ops.iter().enumerate() {
        ids.op(op, Location::Op(at), faults);
        let fused = matches!(op.kind, OpKind::Fused(_));
        match (&op.kind, op.body.is_empty()) {
            (OpKind::Fused(_), true) => faults.add(Location::Op(at), "a fused operator needs a body"),
            (OpKind::Fused(stages), false) if stages.is_empty() => {
                faults.add(Location::Op(at), "a fused operator needs at least one stage");
            }
            (kind, false) if !fused => {
                faults.add(Location::Op(at), format!("`{}` has a body, but only `fused` may", kind.mnemonic()));
            }
            _ => {}
        }
        for (inner_at, inner) in op.body.iter().enumerate() {
            let location = Location::Body(at, inner_at);
            ids.op(inner, location, faults);
            if matches!(inner.kind, OpKind::Fused(_)) || !inner.body.is_empty() {
                faults.add(location, "fused operators do not nest");
            }
        }
    }
    for &id in &graph.outputs {
        ids.value(id, Location::Return, faults);
    }
}

struct Ids {
    values: usize,
    weights: usize,
}

impl Ids {
    fn op(&self, op: &Op, location: Location, faults: &mut Faults) {
        op.results.iter().for_each(|&id| self.value(id, location, faults));
        for operand in &op.operands {
            match *operand {
                Operand::Value(id) => self.value(id, location, faults),
                Operand::Weight(id) => self.weight(id, location, faults),
                Operand::Const(_) => {}
            }
        }
    }

    fn value(&self, id: ValueId, location: Location, faults: &mut Faults) {
        if id.index() >= self.values {
            faults.add(location, format!("{id} is not among the graph's {} values", self.values));
        }
    }

    fn weight(&self, id: WeightId, location: Location, faults: &mut Faults) {
        if id.index() >= self.weights {
            faults.add(location, format!("{id} is not among the graph's {} weights", self.weights));
        }
    }
}

/// Names, types and weights.
pub(super) fn check(graph: &Graph, faults: &mut Faults) {
    name(&graph.name, Location::Graph, faults);
    values(graph, faults);
    let mut names: HashMap<&str, usize> = HashMap::new();
    for (at, weight) in graph.weights.iter().enumerate() {
        let location = Location::Weight(at);
        name(&weight.name, location, faults);
        if names.insert(&weight.name, at).is_some() {
            faults.add(location, format!("another weight is called `@{}`", weight.name));
        }
        if !weight.ty.dtype.is_float() {
            faults.add(location, format!("expected a float type, found {}", weight.ty));
        }
        constant(&weight.ty, "weight", location, faults);
        if weight.ty.shape.is_empty() {
            faults.add(location, "a weight has at least one dimension");
        }
        sizes(&weight.ty, location, faults);
        let laid_out = match &weight.layout {
            Layout::Tensor => Ok(()),
            Layout::Concat { axis, block, parts } => concat(graph, at, *axis, *block, parts),
            Layout::Take { of, indices } => taken(graph, at, *of, indices),
        };
        if let Err(fault) = laid_out {
            faults.add(location, fault);
        }
    }
}

/// Names and types of the values that the graph defines.
fn values(graph: &Graph, faults: &mut Faults) {
    let mut owners: HashMap<&str, ValueId> = HashMap::new();
    let mut value = |id: ValueId, location: Location, faults: &mut Faults| {
        let value = graph.value(id);
        match owners.insert(&value.name, id) {
            None => {
                name(&value.name, location, faults);
                sizes(&value.ty, location, faults);
            }
            Some(other) if other != id => faults.add(location, format!("another value is called `%{}`", value.name)),
            Some(_) => {}
        }
    };
    for (at, &id) in graph.inputs.iter().enumerate() {
        value(id, Location::Input(at), faults);
    }
    for (at, &id) in graph.states.iter().enumerate() {
        value(id, Location::State(at), faults);
        constant(graph.ty(id), "state", Location::State(at), faults);
    }
    for (at, op) in graph.ops.iter().enumerate() {
        scope(op, Location::Op(at), faults);
        op.results.iter().for_each(|&id| value(id, Location::Op(at), faults));
        for (inner_at, inner) in op.body.iter().enumerate() {
            scope(inner, Location::Body(at, inner_at), faults);
            inner.results.iter().for_each(|&id| value(id, Location::Body(at, inner_at), faults));
        }
    }
}

fn name(name: &str, location: Location, faults: &mut Faults) {
    if !is_name(name) {
        faults.add(location, format!("{name:?} is no name: expected letters, digits and `_.-+/`"));
    }
}

fn scope(op: &Op, location: Location, faults: &mut Faults) {
    if !op.scope.is_empty() && !is_name(&op.scope) {
        faults.add(location, format!("{:?} is no scope: expected letters, digits and `_.-+/`", op.scope));
    }
}

fn constant(ty: &Type, what: &str, location: Location, faults: &mut Faults) {
    if ty.shape.iter().any(|dim| dim.as_fixed().is_none()) {
        faults.add(location, format!("a {what} has constant dimensions, found {ty}"));
    }
}

fn sizes(ty: &Type, location: Location, faults: &mut Faults) {
    if ty.shape.iter().any(|dim| dim.factor == 0) {
        faults.add(location, format!("dimensions must be positive, found {ty}"));
    } else if ty.shape.iter().try_fold(ty.dtype.bytes(), |bytes, dim| bytes.checked_mul(dim.factor)).is_none() {
        faults.add(location, format!("the size of {ty} in bytes does not fit 64 bits"));
    }
}

fn concat(graph: &Graph, at: usize, axis: u64, block: Option<u64>, parts: &[WeightId]) -> Result<(), String> {
    let whole = &graph.weights[at].ty;
    let rank = whole.shape.len();
    let axis = usize::try_from(axis).ok().filter(|&axis| axis < rank);
    let axis = axis.ok_or_else(|| format!("`axis` must be below the rank, {rank}"))?;
    if parts.is_empty() {
        return Err("`concat` needs parts".into());
    }
    let mut sum = 0u64;
    let mut first = None;
    for &id in parts {
        let size = part(graph, at, axis, id)?;
        let name = &graph.weight(id).name;
        sum = sum.checked_add(size).ok_or("the sizes of the parts overflow")?;
        if let Some(block) = block {
            if block == 0 || size % block != 0 {
                return Err(format!("`block = {block}` does not divide the size of `@{name}`, {size}"));
            }
            let expected = *first.get_or_insert(size);
            if size != expected {
                return Err(format!("parts taken in turn are of one size: expected {expected}, `@{name}` has {size}"));
            }
        }
    }
    let found = whole.shape[axis];
    if found != Dim::fixed(sum) {
        return Err(format!("the parts make {sum} along axis {axis}, found {found}"));
    }
    Ok(())
}

/// Checks a weight that is some indices of another.
fn taken(graph: &Graph, at: usize, of: WeightId, indices: &[u64]) -> Result<(), String> {
    let whole = graph.weight(of);
    if of.index() >= at {
        return Err(format!("`@{}` must be declared before", whole.name));
    }
    if matches!(whole.layout, Layout::Take { .. }) {
        return Err(format!("`@{}` takes indices itself", whole.name));
    }
    let (ty, first) = (&graph.weights[at].ty, whole.ty.shape.first().and_then(|dim| dim.as_fixed()).unwrap_or(0));
    if let Some(index) = indices.iter().find(|&&index| index >= first) {
        return Err(format!("`indices`: expected some below {first}, found {index}"));
    }
    let mut expected = whole.ty.clone();
    expected.shape[0] = Dim::fixed(indices.len() as u64);
    if *ty == expected { Ok(()) } else { Err(format!("expected {expected}, found {ty}")) }
}

/// Checks one part of the weight at position `at`; its size along the axis.
fn part(graph: &Graph, at: usize, axis: usize, id: WeightId) -> Result<u64, String> {
    let whole = &graph.weights[at].ty;
    let Weight { name, ty, layout } = graph.weight(id);
    if id.index() >= at {
        return Err(format!("part `@{name}` must be declared before"));
    }
    if *layout != Layout::Tensor {
        return Err(format!("part `@{name}` is not a tensor of the checkpoint"));
    }
    if ty.dtype != whole.dtype {
        return Err(format!("part `@{name}`: expected element type {}, found {}", whole.dtype, ty.dtype));
    }
    let others = |ty: &Type| -> Vec<Dim> {
        ty.shape.iter().enumerate().filter(|(i, _)| *i != axis).map(|(_, &dim)| dim).collect()
    };
    if ty.shape.len() != whole.shape.len() || others(ty) != others(whole) {
        return Err(format!("part `@{name}` of type {ty} does not join to {whole} along axis {axis}"));
    }
    ty.shape[axis].as_fixed().ok_or_else(|| format!("part `@{name}` has no constant size"))
}
