//! Steps that are calls of cuBLASLt: against the CPU, and whole models with them against themselves and against models of kernels alone.

use std::collections::BTreeMap;

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::select::{Libraries, Tactics};
use lfm2c::codegen::{CompileOptions, Source, Tuning, compile};
use lfm2c::cuda::{Cublaslt, CublasltError, Device};
use lfm2c::ir::DType;
use lfm2c::passes::Target;
use lfm2c::plan::{LibraryCall, PlanFile, StateRole};
use lfm2c::runtime::compare::{bound, compare_step};
use lfm2c::runtime::convert::write_f32;
use lfm2c::runtime::cuda::{Graphs, offset};
use lfm2c::runtime::sampling::uniform;
use libtest_mimic::{Failed, Trial};

use crate::bits;
use crate::models::{SHAPES, Shape, cpu, fail, gpu, plan, small};
use crate::{steps, tune};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    let missing = Device::open(0).is_ok_and(|device| matches!(Cublaslt::new(&device), Err(CublasltError::Missing)));
    if missing && std::env::var_os("LFM2C_REQUIRE_GPU").is_none() {
        println!("skipped: no cuBLASLt, none of the tests of tests/gpu/library.rs ran");
        return trials;
    }
    for (x, y) in [("f32", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("bf16", "f32")] {
        trials.push(Trial::test(format!("library product {x} {y}"), move || product(x, y)));
    }
    trials.push(Trial::test("library tuned", tune::libraries));
    // Rows of the other shape are no whole chunks.
    for shape in SHAPES.iter().filter(|shape| shape.name != "odd") {
        for dtype in [DType::BF16, DType::F16] {
            let name = |what: &str| format!("library {what} {} {dtype}", shape.name);
            trials.push(Trial::test(name("steps"), move || {
                let options = CompileOptions { prefill: Some(vec![5, 80, 300, 600]), ..steps::options(dtype) };
                steps::check_plan(&by_library(shape, &options)?)
            }));
            trials.push(Trial::test(name("unfused steps"), move || {
                let disabled = lfm2c::passes::names().into_iter().map(str::to_owned).collect();
                steps::check_plan(&by_library(shape, &CompileOptions { disabled, ..steps::options(dtype) })?)
            }));
            trials.push(Trial::test(name("company"), move || bits::company(&by_library(shape, &model(dtype))?)));
            trials.push(Trial::test(name("graphs"), move || bits::graphs(&by_library(shape, &model(dtype))?)));
            trials.push(Trial::test(name("model"), move || beside_kernels(shape, dtype)));
        }
    }
    trials
}

fn model(dtype: DType) -> CompileOptions {
    small(&[64], &[8], dtype)
}

/// A plan whose every step that can be is a call.
fn by_library(shape: &Shape, options: &CompileOptions) -> Result<PlanFile, Failed> {
    let options = CompileOptions { libraries: Libraries::Asked, ..options.clone() };
    let bare = plan(shape, &CompileOptions { without_cubins: true, ..options.clone() });
    let problems = Tuning::of(&bare.manifest, options.allowed());
    let can = problems.problems().filter(|(_, names)| names.contains(&"cublaslt"));
    let keys: Vec<(String, String)> = can.map(|(key, names)| (key.to_owned(), names[0].to_owned())).collect();
    let library = keys.iter().map(|(key, _)| (key.clone(), "cublaslt".to_owned())).collect();
    let tactics = Tactics { chosen: keys.into_iter().collect(), library, ..Tactics::default() };
    let file = plan(shape, &CompileOptions { tactics, ..options });
    let program = &file.manifest.ranks[0];
    let calls = program.buckets.iter().flat_map(|bucket| &bucket.steps).filter(|step| step.library.is_some()).count();
    let room = program.states.iter().any(|state| state.role == StateRole::Workspace);
    if calls < program.buckets.len() || !room {
        return Err(
            format!("expected calls of cuBLASLt and a workspace, found {calls} calls, workspace: {room}").into()
        );
    }
    Ok(file)
}

/// Products of each kind and of several sizes, with and without a residual, by the library alone.
fn product(x: &str, y: &str) -> Result<(), Failed> {
    for [rows, columns, depth] in [[1, 16, 8], [80, 264, 200], [512, 1024, 2048], [600, 2048, 7168]] {
        for residual in [false, true] {
            let (stream, sum, last) = match residual {
                true => (
                    format!(", %h: {y}[{rows},{columns}]"),
                    format!("  %sum = add %o, %h : {y}[{rows},{columns}] in layers.0.ffn\n"),
                    "sum",
                ),
                false => (String::new(), String::new(), "o"),
            };
            let text = format!(
                "graph @product (%x: {x}[{rows},{depth}]{stream}) {{\n  weight @w : {x}[{columns},{depth}]\n  %o = matmul %x, @w : \
                 {y}[{rows},{columns}] in layers.0.ffn\n{sum}  return %{last}\n}}\n"
            );
            check_product(&text)
                .map_err(|fault| format!("{rows} x {columns} x {depth}: {}", fault.message().unwrap_or("")))?;
        }
    }
    Ok(())
}

fn check_product(text: &str) -> Result<(), Failed> {
    let graph = lfm2c::ir::parse(text).map_err(|fault| fault.to_string())?.graph;
    let source = Source::Graph("product".into(), Box::new(graph));
    let options = CompileOptions { target: Target::Sm90a, libraries: Libraries::Asked, ..CompileOptions::default() };
    let compiled = |tactics: Tactics, without_cubins| {
        compile(&source, &CompileOptions { tactics, without_cubins, ..options.clone() }, &Silent)
    };
    let bare = compiled(Tactics::default(), true)?.file;
    let tuning = Tuning::of(&bare.manifest, options.allowed());
    let chosen: BTreeMap<_, _> = tuning.problems().map(|(key, _)| (key.to_owned(), "cublaslt".to_owned())).collect();
    let file = compiled(Tactics { chosen, ..Tactics::default() }, false)?.file;
    let (executor, mut reference) = (gpu(&file, Graphs::Off), cpu(&file));
    let program = executor.program().clone();
    let [step] = &program.buckets[0].steps[..] else {
        return Err(format!("expected one step, found {}", program.buckets[0].steps.len()).into());
    };
    let Some(LibraryCall::Matmul(call)) = step.library else { return Err("expected a call of cuBLASLt".into()) };
    for (seed, i) in std::iter::once(call.x).chain(call.residual).enumerate() {
        let ty = &program.semantics[step.op as usize].inputs[i as usize];
        let values: Vec<f32> = (0..ty.elements().unwrap_or(0)).map(|n| 2.0 * uniform(seed as u64, n) - 1.0).collect();
        let mut bytes = vec![0; ty.bytes().unwrap_or(0) as usize];
        write_f32(ty.0, &values, &mut bytes);
        let at = offset(&program, 0, step.reads[i as usize]).map_err(fail)? as usize;
        executor.pool().write(at, &bytes, executor.stream())?;
    }
    let bound = if call.made == lfm2c::plan::DType::F32 { 1e-5 } else { bound(call.made) };
    for written in compare_step(&mut reference, &executor, 0, 0).map_err(fail)? {
        if !written.holds(bound) {
            return Err(format!("{call:?}: error {:e}, {:?}", written.error, written.first).into());
        }
    }
    Ok(())
}

/// Logits of prompts are those of a plan of kernels, but for roundings. Where these change a router's choice, rows differ more: those in the
/// middle count.
fn beside_kernels(shape: &Shape, dtype: DType) -> Result<(), Failed> {
    let kernels = bits::prompt_logits(&plan(shape, &model(dtype)))?;
    let library = bits::prompt_logits(&by_library(shape, &model(dtype))?)?;
    let vocab = plan(shape, &CompileOptions { without_cubins: true, ..model(dtype) }).manifest.model.vocab as usize;
    let rows = kernels.chunks(vocab).zip(library.chunks(vocab));
    let mut errors: Vec<f64> = rows
        .map(|(a, b)| {
            let square = |x: f32| f64::from(x).powi(2);
            let wrong: f64 = a.iter().zip(b).map(|(&a, &b)| square(a - b)).sum();
            (wrong / a.iter().map(|&a| square(a)).sum::<f64>()).sqrt()
        })
        .collect();
    errors.sort_by(f64::total_cmp);
    let middle = errors.get(errors.len() / 2).copied().unwrap_or(f64::NAN);
    println!("{} {dtype}: {} rows, the one in the middle differs by {middle:.2e}", shape.name, errors.len());
    if kernels.len() == library.len() && middle <= 4.0 * bound_of(dtype) {
        return Ok(());
    }
    Err(format!("{} and {} logits, the row in the middle differs by {middle:e}", kernels.len(), library.len()).into())
}

fn bound_of(dtype: DType) -> f64 {
    bound(if dtype == DType::F16 { lfm2c::plan::DType::F16 } else { lfm2c::plan::DType::BF16 })
}
