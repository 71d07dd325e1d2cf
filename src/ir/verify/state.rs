//! State versions: invariants 11 to 13.

use std::collections::{HashMap, HashSet};

use super::{Faults, primitives};
use crate::ir::{Graph, Location, ValueId};

pub(super) fn check(graph: &Graph, faults: &mut Faults) {
    // The state that each version is one of, and the operator that replaced a version by the next.
    let mut roots: HashMap<ValueId, ValueId> = graph.states.iter().map(|&id| (id, id)).collect();
    let mut replaced: HashSet<ValueId> = HashSet::new();
    let mut last: HashMap<ValueId, ValueId> = HashMap::new();
    for (location, op) in primitives(graph) {
        let update = op.kind.state_update();
        for (i, operand) in op.operands.iter().enumerate() {
            let Some(id) = operand.value() else { continue };
            if replaced.contains(&id) {
                let message = if update.is_some_and(|(state, _)| state == i) {
                    format!("`%{}` was updated before; update its latest version", graph.value(id).name)
                } else {
                    format!("`%{}` was updated before this reads it", graph.value(id).name)
                };
                faults.add(location, message);
            }
        }
        let Some((operand, result)) = update else { continue };
        // Too few operands or results, and weights or numbers in this place, are faults of their own.
        let (Some(Some(old)), Some(&new)) = (op.operands.get(operand).map(|o| o.value()), op.results.get(result))
        else {
            continue;
        };
        match roots.get(&old).copied() {
            Some(root) => {
                roots.insert(new, root);
                last.insert(root, new);
            }
            None => {
                let name = &graph.value(old).name;
                faults
                    .add(location, format!("operand {operand}: expected a state or a version of one, found `%{name}`"));
            }
        }
        replaced.insert(old);
    }
    for &id in &graph.outputs {
        if replaced.contains(&id) {
            let name = &graph.value(id).name;
            faults.add(Location::Return, format!("`%{name}` was updated; return its latest version"));
        }
    }
    let returned: HashSet<ValueId> = graph.outputs.iter().copied().collect();
    for (at, id) in graph.states.iter().enumerate() {
        if let Some(latest) = last.get(id)
            && !returned.contains(latest)
        {
            let name = &graph.value(*latest).name;
            faults.add(Location::State(at), format!("its latest version, `%{name}`, is not returned"));
        }
    }
}
