//! Questions about weights that several passes ask.

use crate::ir::{Graph, Operand, WeightId};

/// True if at most `allowed` operands of the graph's operators and no laid-out weight are this weight.
pub(crate) fn used_at_most(graph: &Graph, weight: WeightId, allowed: usize) -> bool {
    let operands = graph.ops.iter().flat_map(|op| &op.operands);
    let uses = operands.filter(|operand| **operand == Operand::Weight(weight)).count();
    uses <= allowed && !graph.weights.iter().any(|other| other.layout.parts().contains(&weight))
}

/// The name of several joined: what their dotted names share at both ends, and between that the distinct rest joined by `+`:
/// `a.q.weight` and `a.k.weight` give `a.q+k.weight`.
pub(crate) fn joined_name(names: &[&str]) -> String {
    let split: Vec<Vec<&str>> = names.iter().map(|name| name.split('.').collect()).collect();
    let shortest = split.iter().map(Vec::len).min().unwrap_or(0);
    let shared = |same: &dyn Fn(usize) -> bool, most: usize| (0..most).take_while(|&i| same(i)).count();
    let head = shared(&|i| split.iter().all(|name| name[i] == split[0][i]), shortest.saturating_sub(1));
    let from_end = |name: &[&'_ str], i: usize| name[name.len() - 1 - i].to_owned();
    let tail = shared(
        &|i| split.iter().all(|name| from_end(name, i) == from_end(&split[0], i)),
        shortest.saturating_sub(head + 1),
    );
    let Some(first) = split.first() else { return String::new() };
    let middle: Vec<String> = split.iter().map(|name| name[head..name.len() - tail].join(".")).collect();
    let middle = middle.join("+");
    [&first[..head], &[middle.as_str()], &first[first.len() - tail..]].concat().join(".")
}

#[cfg(test)]
mod tests {
    use super::joined_name;

    #[test]
    fn joins_what_differs() {
        assert_eq!(joined_name(&["l.2.q_proj.weight", "l.2.k_proj.weight"]), "l.2.q_proj+k_proj.weight");
        assert_eq!(joined_name(&["w1", "w3", "w5"]), "w1+w3+w5");
        assert_eq!(joined_name(&["m.a", "m.b.a"]), "m.a+b.a");
        assert_eq!(joined_name(&["a.b", "c"]), "a.b+c");
    }
}
