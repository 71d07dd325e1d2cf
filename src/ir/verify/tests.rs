//! What no text can say, and properties; the rest is in `tests/filetests/verify`.

use proptest::prelude::*;

use super::*;
use crate::ir::testing::graphs;
use crate::ir::{Layout, OpKind, Operand, ValueId, VerifyErrors, WeightId, parse};

const FUSED: &str = "\
graph @g (%x: f32[T,8]) {
  weight @n : f32[8]

  %a = neg %x : f32[T,8]
  %b = fused[norm+pointwise] %a, @n : f32[T,8] {
    %m = rms_norm %a, @n {eps = 1e-5} : f32[T,8]
    %b = mul %m, 2.0 : f32[T,8]
  }
  %c = add %b, %a : f32[T,8]
  return %c
}
";

fn graph() -> Graph {
    parse(FUSED).unwrap().graph
}

/// The faults of the graph after a change, as (location, message).
fn faults(change: impl FnOnce(&mut Graph)) -> Vec<(Location, String)> {
    let mut graph = graph();
    change(&mut graph);
    let errors = verify(&graph).expect_err("the graph has a fault");
    assert!(errors.to_string().contains('^'), "{errors}");
    errors.faults.into_iter().map(|fault| (fault.location, fault.message)).collect()
}

#[track_caller]
fn assert_one(found: Vec<(Location, String)>, location: Location, message: &str) {
    assert_eq!(found, [(location, message.to_owned())]);
}

#[test]
fn ids_outside_their_table_are_faults() {
    let found = faults(|graph| {
        graph.outputs.push(ValueId(99));
        graph.ops[1].body[0].operands[1] = Operand::Weight(WeightId(7));
        graph.ops[1].body[1].results[0] = ValueId(u32::MAX);
        graph.weights[0].layout = Layout::Concat { axis: 0, block: None, parts: vec![WeightId(3)] };
    });
    let expected = [
        (Location::Weight(0), "weight3 is not among the graph's 1 weights"),
        (Location::Body(1, 0), "weight7 is not among the graph's 1 weights"),
        (Location::Body(1, 1), "value4294967295 is not among the graph's 5 values"),
        (Location::Return, "value99 is not among the graph's 5 values"),
    ];
    assert_eq!(found, expected.map(|(location, message)| (location, message.to_owned())));
}

#[test]
fn a_use_before_its_definition_is_a_fault() {
    let found = faults(|graph| graph.ops.swap(0, 1));
    assert_one(found, Location::Body(0, 0), "`%a` is used before its definition");
}

#[test]
fn a_value_without_definition_is_a_fault() {
    let found = faults(|graph| drop(graph.ops.remove(0)));
    let message = "`%a` is not defined".to_owned();
    assert_eq!(found, [(Location::Body(0, 0), message.clone()), (Location::Op(1), message)]);
}

#[test]
fn a_second_definition_is_a_fault() {
    let found = faults(|graph| graph.ops[2].results = graph.ops[0].results.clone());
    assert!(found.contains(&(Location::Op(2), "`%a` is defined a second time".into())), "{found:?}");
}

#[test]
fn values_of_one_name_are_a_fault() {
    let found = faults(|graph| graph.values[4].name = "x".into());
    assert_one(found, Location::Op(2), "another value is called `%x`");
}

#[test]
fn names_that_would_not_be_read_back_are_faults() {
    let found = faults(|graph| {
        graph.name = String::new();
        graph.values[0].name = "two words".into();
        graph.ops[0].scope = "a\nb".into();
    });
    let locations: Vec<Location> = found.into_iter().map(|(location, _)| location).collect();
    assert_eq!(locations, [Location::Graph, Location::Input(0), Location::Op(0)]);
}

#[test]
fn bodies_belong_to_fused_operators_and_do_not_nest() {
    let found = faults(|graph| {
        let body = graph.ops[1].body.clone();
        graph.ops[0].body = body;
        let fused = graph.ops[1].clone();
        graph.ops[1].body.push(fused);
    });
    let expected = [
        (Location::Op(0), "`neg` has a body, but only `fused` may"),
        (Location::Body(1, 2), "fused operators do not nest"),
    ];
    assert_eq!(found, expected.map(|(location, message)| (location, message.to_owned())));
}

#[test]
fn numbers_must_be_finite() {
    let found = faults(|graph| {
        graph.ops[1].body[0].kind = OpKind::RmsNorm { eps: f64::NAN };
        graph.ops[1].body[1].operands[1] = Operand::Const(f64::INFINITY);
    });
    let expected = [
        (Location::Body(1, 0), "`eps` must be finite, found NaN"),
        (Location::Body(1, 1), "operand 1 must be finite, found inf"),
    ];
    assert_eq!(found, expected.map(|(location, message)| (location, message.to_owned())));
}

#[test]
fn all_faults_are_shown_under_their_lines() {
    let mut graph = graph();
    graph.ops[0].kind = OpKind::Matmul;
    graph.ops[2].operands.pop();
    let errors: VerifyErrors = verify(&graph).unwrap_err();
    assert_eq!(errors.faults[0].context, "%a = matmul %x : f32[T,8]");
    let expected = "\
graph @g (%x: f32[T,8]) {
  weight @n : f32[8]

  %a = matmul %x : f32[T,8]
  ^~~~~~~~~~~~~~~~~~~~~~~~~ error: `matmul` takes 2 operands, found 1
  %b = fused[norm+pointwise] %a, @n : f32[T,8] {
    %m = rms_norm %a, @n {eps = 1e-5} : f32[T,8]
    %b = mul %m, 2.0 : f32[T,8]
  }
  %c = add %b : f32[T,8]
  ^~~~~~~~~~~~~~~~~~~~~~ error: `add` takes 2 operands, found 1
  return %c
}
2 errors in the graph";
    assert_eq!(errors.to_string(), expected);
}

#[test]
fn lines_far_from_a_fault_are_left_out() {
    let mut text = "graph @g (%v0: f32[T,8]) {\n".to_owned();
    for i in 1..100 {
        text += &format!("  %v{i} = neg %v{} : f32[T,8]\n", i - 1);
    }
    let parsed = parse(&(text + "  return %v50, %v50\n}\n")).unwrap();
    let shown = verify(&parsed.graph).unwrap_err().to_string();
    assert!(shown.starts_with("  ...\n  %v96 = neg %v95 : f32[T,8]\n"), "{shown}");
    assert_eq!(shown.lines().count(), 9, "{shown}");
}

fn change_at_random(graph: &mut Graph, (kind, a, b): (u8, prop::sample::Index, u32)) {
    let id = ValueId(b % (graph.values.len() as u32 + 2));
    if kind == 0 {
        graph.outputs.push(id);
    }
    if graph.ops.is_empty() {
        return;
    }
    let (at, other) = (a.index(graph.ops.len()), b as usize % graph.ops.len());
    match kind {
        1 => drop(graph.ops.remove(at)),
        2 => graph.ops.swap(at, other),
        _ => {
            let op = &mut graph.ops[at];
            let op = match op.body.len() {
                0 => op,
                n if b % 3 > 0 => &mut op.body[b as usize % n],
                _ => op,
            };
            match kind {
                3 => op.results.push(id),
                4 => op.operands.push(id.into()),
                5 => drop(op.operands.pop()),
                6 => drop(op.results.pop()),
                7 => op.body.clear(),
                8 => op.operands.push(WeightId(b % 9).into()),
                9 => op.kind = OpKind::Split { sizes: vec![8, 8], block: Some(b as u64 % 3) },
                _ => op.operands.reverse(),
            }
        }
    }
}

proptest! {
    #[test]
    fn valid_graphs_have_no_faults(graph in graphs()) {
        prop_assert_eq!(verify(&graph).map_err(|errors| errors.to_string()), Ok(()));
    }

    #[test]
    fn damaged_graphs_are_judged_without_panic(
        mut graph in graphs(),
        changes in prop::collection::vec((0..11u8, any::<prop::sample::Index>(), any::<u32>()), 1..4),
    ) {
        changes.into_iter().for_each(|change| change_at_random(&mut graph, change));
        match verify(&graph) {
            Ok(()) => {
                let again = parse(&graph.to_string()).map_err(|error| TestCaseError::fail(error.to_string()))?;
                prop_assert!(verify(&again.graph).is_ok());
            }
            Err(errors) => {
                let shown = errors.to_string();
                for fault in &errors.faults {
                    prop_assert!(shown.contains(&format!("error: {}", fault.message)), "{}", shown);
                }
            }
        }
    }
}

#[test]
fn very_many_faults_on_one_line_are_shown_in_little_space() {
    let many = 50_000;
    let list = |item: &str| vec![item; many].join(", ");
    let text = format!("graph @g (%x: f32[T,8]) {{\n  neg {}\n  return {}\n}}\n", list("1.0"), list("%x"));
    let errors = verify(&parse(&text).unwrap().graph).unwrap_err();
    assert!(errors.faults.len() >= 2 * many - 1);
    assert!(errors.faults.iter().all(|fault| fault.context.len() < 200));
    assert!(errors.to_string().len() < text.len() + errors.faults.len() * 300);
}
