use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::ir::testing::graphs;

const EXAMPLE: &str = "\
graph @example (%tokens: i32[T], %pos: i32[T], %slot: i32[T]) {
  state %conv : bf16[4,8,16]
  weight @a : bf16[8,16]
  weight @b : bf16[8,16]
  weight @ab : bf16[16,16] = concat(@a, @b) {axis = 0, block = 4}
  weight @c : bf16[16,3]

  %h = embed %tokens, @ab : bf16[T,16] in embed
  %y, %conv.next = fused[pointwise+shortconv] %h, @c, %conv, %pos, %slot : bf16[T,16], bf16[4,8,16] in layers.0 {
    %m = mul %h, -0.001 : bf16[T,16]
    %y, %conv.next = conv1d_causal %m, @c, %conv, %pos, %slot : bf16[T,16], bf16[4,8,16]
  }
  %l, %r = split %y {sizes = [8, 8], block = 2} : bf16[T,8], bf16[T,8]
  return %l, %conv.next
}
";

/// The graph with its values in the order in which they appear in the text, and no others.
fn renumbered(graph: &Graph) -> Graph {
    let results = graph.ops.iter().flat_map(|op| {
        let inner = op.body.iter().flat_map(|inner| &inner.results);
        op.results.iter().chain(inner.filter(|id| !op.results.contains(id)))
    });
    let order: Vec<ValueId> = graph.inputs.iter().chain(&graph.states).chain(results).copied().collect();
    let new: HashMap<ValueId, ValueId> = order.iter().enumerate().map(|(at, &old)| (old, ValueId::new(at))).collect();
    let mut renumbered = graph.clone();
    renumbered.values = order.iter().map(|&id| graph.value(id).clone()).collect();
    let lists = [&mut renumbered.inputs, &mut renumbered.states, &mut renumbered.outputs];
    lists.into_iter().flatten().for_each(|id| *id = new[id]);
    for op in &mut renumbered.ops {
        renumber_op(op, &new);
        op.body.iter_mut().for_each(|inner| renumber_op(inner, &new));
    }
    renumbered
}

fn renumber_op(op: &mut Op, new: &HashMap<ValueId, ValueId>) {
    op.results.iter_mut().for_each(|id| *id = new[id]);
    for operand in &mut op.operands {
        if let Operand::Value(id) = operand {
            *id = new[id];
        }
    }
}

#[test]
fn an_example_is_read_and_printed_to_the_same_bytes() {
    let parsed = parse(EXAMPLE).unwrap();
    assert_eq!(parsed.graph.to_string(), EXAMPLE);
    let names: Vec<&str> = parsed.graph.values.iter().map(|value| &value.name[..]).collect();
    assert_eq!(names, ["tokens", "pos", "slot", "conv", "h", "y", "conv.next", "m", "l", "r"]);
    assert_eq!(parsed.graph.ops[1].body[0].operands[1], Operand::Const(-0.001));
    assert_eq!(parsed.lines.line(crate::ir::Location::Body(1, 1)), Some(11));
    assert_eq!(parsed.lines.line(crate::ir::Location::Return), Some(14));
}

#[test]
fn an_error_shows_its_line_and_underlines_the_culprit() {
    let text = EXAMPLE.replace("%m, @c, %conv", "%m, @cc, %conv");
    let error = parse(&text).unwrap_err();
    assert_eq!((error.line, error.column), (11, 40));
    let expected = "\
line 11, column 40: unknown weight `@cc`: it must be declared above
      %y, %conv.next = conv1d_causal %m, @cc, %conv, %pos, %slot : bf16[T,16], bf16[4,8,16]
                                         ^~~";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn an_error_in_a_very_long_line_shows_a_part_of_it() {
    let text = format!("graph @{} (?) {{", "x".repeat(10_000));
    let shown = parse(&text).unwrap_err().to_string();
    assert!(shown.lines().all(|line| line.chars().count() <= EXCERPT_LIMIT), "{shown}");
    let lines: Vec<&str> = shown.lines().collect();
    let at = lines[2].find('^').unwrap();
    assert_eq!(lines[1].chars().nth(at), Some('?'));
}

const EXCERPT_LIMIT: usize = 200;

proptest! {
    #[test]
    fn print_parse_print_gives_the_same_bytes_and_graph(graph in graphs()) {
        let text = graph.to_string();
        let parsed = parse(&text).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(parsed.graph.to_string(), text);
        prop_assert_eq!(&parsed.graph, &renumbered(&graph));
        prop_assert_eq!(parsed.lines, SourceMap::of_printed(&graph));
    }

    #[test]
    fn any_text_gives_a_graph_or_an_error(text in "\\PC*") {
        let _ = parse(&text).map_err(|error| error.to_string());
    }

    #[test]
    fn a_damaged_text_gives_a_graph_or_an_error(
        graph in graphs(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..3u8, "[%@{}(),:=;*\\[\\]\n0-9eTé.-]"), 1..4),
    ) {
        let mut chars: Vec<char> = graph.to_string().chars().collect();
        for (at, edit, with) in edits {
            let at = at.index(chars.len());
            match edit {
                0 => chars.truncate(at + 1),
                1 => drop(chars.remove(at)),
                _ => chars[at] = with.chars().next().unwrap_or(' '),
            }
            if chars.is_empty() {
                break;
            }
        }
        let text: String = chars.into_iter().collect();
        match parse(&text) {
            Ok(parsed) => {
                let printed = parsed.graph.to_string();
                prop_assert_eq!(parse(&printed).map(|again| again.graph), Ok(parsed.graph));
            }
            Err(error) => prop_assert!(error.to_string().contains('^')),
        }
    }
}
