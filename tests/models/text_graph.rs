//! Graphs in text form that are no language models.

use std::sync::Arc;

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Compiled, Source, compile};
use lfm2c::plan::{Op, UnaryFn};
use lfm2c::runtime::cpu::{CpuExecutor, HostPool};

use crate::common::{assert_same_bits, project};

fn compiled(text: &str, disabled: &[&str]) -> Compiled {
    let graph = lfm2c::ir::parse(text).expect("the text is a graph").graph;
    let options = CompileOptions {
        disabled: disabled.iter().map(|name| (*name).to_owned()).collect(),
        ..CompileOptions::default()
    };
    compile(&Source::Graph(graph.name.clone(), Box::new(graph)), &options, &Silent).expect("the graph compiles")
}

/// Runs a compiled graph with inputs by name and returns an f32 result.
fn run_compiled(compiled: &Compiled, floats: &[(&str, &[f32])], integers: &[(&str, &[i32])], output: &str) -> Vec<f32> {
    let manifest = Arc::new(compiled.file.manifest.clone());
    let pool = HostPool::new(&manifest.ranks[0]).expect("the pool fits");
    let mut executor = CpuExecutor::new(manifest, 0, pool).expect("it runs on the CPU").with_poison(true);
    for (name, data) in floats {
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        executor.set_input(name, &bytes).expect("the input fits");
    }
    for (name, data) in integers {
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        executor.set_input(name, &bytes).expect("the input fits");
    }
    executor.run_steps(0).expect("the steps run");
    let bytes = executor.output(0, output).expect("the output is there");
    bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// Compiles and runs a graph.
pub fn run(text: &str, floats: &[(&str, &[f32])], integers: &[(&str, &[i32])], output: &str) -> Vec<f32> {
    run_compiled(&compiled(text, &[]), floats, integers, output)
}

fn inputs(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i as f32) * 0.37).sin() * 4.0).collect()
}

#[test]
fn tanh_gelu_is_one_step_and_right() {
    let text = std::fs::read_to_string(project("plans/gelu.ir")).expect("plans/gelu.ir is there");
    let text = text.replace("1000,3072", "50,33");
    let fused = compiled(&text, &[]);
    let unfused = compiled(&text, &["fuse-pointwise"]);
    let program = &fused.file.manifest.ranks[0];
    assert_eq!(program.buckets[0].steps.len(), 1);
    assert_eq!(unfused.file.manifest.ranks[0].buckets[0].steps.len(), 9);
    let [lfm2c::plan::Instr(Op::Pointwise(expression), ..)] = &program.semantics[0].body[..] else {
        panic!("expected one pointwise operator, found {:?}", program.semantics[0].body);
    };
    assert!(expression.iter().any(|register| matches!(register, lfm2c::plan::Expr::Unary(UnaryFn::Tanh, _))));
    let x = inputs(50 * 33);
    let found = run_compiled(&fused, &[("x", &x)], &[], "gelu");
    assert_same_bits(&run_compiled(&unfused, &[("x", &x)], &[], "gelu"), &found, "unfused");
    for (x, y) in x.iter().zip(&found) {
        let x = f64::from(*x);
        let expected = 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh());
        assert!((f64::from(*y) - expected).abs() <= 1e-6 * (1.0 + expected.abs()), "gelu({x}) = {y}, not {expected}");
    }
}

#[test]
fn gates_are_one_step() {
    let silu_mul = "
graph @silu_mul (%gate: f32[3,8], %up: f32[3,8]) {
  %sigmoid = sigmoid %gate : f32[3,8]
  %silu = mul %gate, %sigmoid : f32[3,8]
  %m = mul %silu, %up : f32[3,8]
  return %m
}
";
    let gates = "
graph @gates (%b: f32[3,8], %x: f32[3,8], %c: f32[3,8]) {
  %u = mul %b, %x : f32[3,8]
  %g = mul %c, %u : f32[3,8]
  return %g
}
";
    for text in [silu_mul, gates] {
        assert_eq!(compiled(text, &[]).file.manifest.ranks[0].buckets[0].steps.len(), 1, "{text}");
    }
    let (gate, up) = (inputs(24), inputs(24));
    let found = run(silu_mul, &[("gate", &gate), ("up", &up)], &[], "m");
    for ((gate, up), found) in gate.iter().zip(&up).zip(found) {
        let expected = f64::from(*gate) / (1.0 + (-f64::from(*gate)).exp()) * f64::from(*up);
        assert!((f64::from(found) - expected).abs() < 1e-5, "{found} is not {expected}");
    }
}
