//! The border of fused operators: invariants 15 and 16, as far as definitions do not cover them.

use super::Faults;
use crate::ir::{Graph, Location, OpKind, Operand, outside_operands};

pub(super) fn check(graph: &Graph, faults: &mut Faults) {
    let mut home = vec![None; graph.values.len()];
    for (at, op) in graph.ops.iter().enumerate() {
        for id in op.body.iter().flat_map(|inner| &inner.results) {
            home[id.index()] = Some(at);
        }
    }
    let mut leaves = vec![false; graph.values.len()];
    for (at, op) in graph.ops.iter().enumerate() {
        for id in op.primitives().iter().flat_map(|primitive| primitive.uses()) {
            leaves[id.index()] |= home[id.index()] != Some(at);
        }
    }
    graph.outputs.iter().for_each(|id| leaves[id.index()] = true);
    for (at, op) in graph.ops.iter().enumerate() {
        if !matches!(op.kind, OpKind::Fused(_)) {
            continue;
        }
        let expected = outside_operands(&op.body);
        if op.operands != expected {
            let list = operand_list(graph, &expected);
            faults.add(Location::Op(at), format!("expected the operands {list}: what the body takes, in that order"));
        }
        for &id in &op.results {
            if home[id.index()] == Some(at) && !leaves[id.index()] {
                let name = &graph.value(id).name;
                faults.add(Location::Op(at), format!("result `%{name}` is neither used outside nor returned"));
            }
        }
    }
}

fn operand_list(graph: &Graph, operands: &[Operand]) -> String {
    let names = operands.iter().map(|operand| match operand {
        Operand::Value(id) => format!("%{}", graph.value(*id).name),
        Operand::Weight(id) => format!("@{}", graph.weight(*id).name),
        Operand::Const(x) => format!("{x:?}"),
    });
    format!("`{}`", names.collect::<Vec<_>>().join(", "))
}
