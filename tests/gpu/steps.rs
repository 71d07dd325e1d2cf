//! Every step of every bucket from the GPU's inputs on the CPU: integers equal, numbers within the type's bound. Over shapes,
//! types, passes left out, and every candidate of every kernel.

use std::collections::BTreeSet;

use lfm2c::codegen::select::Tactics;
use lfm2c::codegen::{CompileOptions, Tuning};
use lfm2c::ir::DType;
use lfm2c::passes;
use lfm2c::runtime::compare::{bound, compare_step};
use lfm2c::runtime::cuda::{Graphs, kernel_name};
use lfm2c::runtime::workload::{History, random_batch};
use libtest_mimic::{Failed, Trial};

use crate::models::{SHAPES, Shape, cpu, gpu, plan};

fn options(dtype: DType) -> CompileOptions {
    CompileOptions {
        dtype: Some(dtype),
        prefill: Some(vec![5, 80, 300]),
        decode: Some(vec![1, 3, 8, 33, 100]),
        max_sequences: Some(100),
        max_context: Some(320),
        kv_tokens: Some(6400),
        ..CompileOptions::default()
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    for shape in SHAPES {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            trials.push(Trial::test(format!("steps {} {dtype}", shape.name), move || {
                check(shape, &options(dtype), History::Run).map(drop)
            }));
            trials.push(Trial::test(format!("unfused steps {} {dtype}", shape.name), move || {
                let disabled = passes::names().into_iter().map(str::to_owned).collect();
                check(shape, &CompileOptions { disabled, ..options(dtype) }, History::Run).map(drop)
            }));
            trials.push(Trial::test(format!("candidates {} {dtype}", shape.name), move || candidates(shape, dtype)));
            if dtype != DType::F32 {
                let name = format!("many rows {} {dtype}", shape.name);
                trials.push(Trial::test(name, move || many_rows(shape, dtype)));
            }
        }
        for left_out in passes::names().into_iter().filter(|name| name.starts_with("fuse") || name.starts_with("group"))
        {
            trials.push(Trial::test(format!("steps {} without {left_out}", shape.name), move || {
                check(shape, &CompileOptions { disabled: vec![left_out.into()], ..options(DType::BF16) }, History::Run)
                    .map(drop)
            }));
        }
    }
    trials
}

/// Compares every step; gives the names of the kernels that ran.
fn check(shape: &Shape, options: &CompileOptions, history: History) -> Result<BTreeSet<String>, Failed> {
    let file = plan(shape, options);
    let (mut gpu, mut cpu) = (gpu(&file, Graphs::Off), cpu(&file));
    let bound = bound(file.manifest.dtype);
    let mut kernels = BTreeSet::new();
    let mut faults = vec![];
    let program = gpu.program().clone();
    for (i, bucket) in program.buckets.iter().enumerate() {
        gpu.poison(0xff).map_err(fail)?;
        if history == History::Held {
            gpu.randomize_state(i as u64).map_err(fail)?;
        }
        let batch = random_batch(&mut gpu, i, 40, 11 + i as u64, history).map_err(fail)?;
        gpu.poison_arena(0xff).map_err(fail)?;
        gpu.upload(i, &batch).map_err(fail)?;
        for (at, step) in bucket.steps.iter().enumerate() {
            let launch = step.launch.as_ref().expect("a plan for the GPU has launches");
            let kernel = kernel_name(&file.manifest.kernels[launch.kernel as usize]);
            let written = compare_step(&mut cpu, &gpu, i, at).map_err(fail)?;
            for written in written.iter().filter(|written| !written.holds(bound)) {
                faults.push(format!(
                    "{} {} ({kernel}), %{}: {:e}, {:?}",
                    bucket.name, step.name, written.name, written.error, written.first
                ));
            }
            kernels.insert(kernel);
        }
        if faults.len() > 12 {
            break;
        }
    }
    if faults.is_empty() { Ok(kernels) } else { Err(faults.join("\n").into()) }
}

/// Runs every candidate of every problem at least once. `LFM2C_CANDIDATES=3,4` runs those rounds alone, so that what is slow
/// under a sanitizer can be divided among processes, over a state of random numbers, as running rows to fill it would take most of
/// the time; `0` only says how many there are.
fn candidates(shape: &Shape, dtype: DType) -> Result<(), Failed> {
    let options = CompileOptions { prefill: Some(vec![80]), decode: Some(vec![3, 33]), ..options(dtype) };
    let problems = Tuning::of(&plan(shape, &CompileOptions { without_cubins: true, ..options.clone() }).manifest);
    let most = problems.problems().map(|(_, candidates)| candidates.len()).max().unwrap_or(0);
    let (rounds, history): (Vec<usize>, _) = match std::env::var("LFM2C_CANDIDATES") {
        Ok(list) => (list.split(',').map(|n| n.trim().parse()).collect::<Result<_, _>>()?, History::Held),
        Err(_) => ((1..=most).collect(), History::Run),
    };
    let mut seen = BTreeSet::new();
    for nth in rounds.into_iter().filter(|nth| (1..=most).contains(nth)) {
        let tactics = Tactics { nth: Some(nth), ..Tactics::default() };
        seen.extend(check(shape, &CompileOptions { tactics, ..options.clone() }, history)?);
    }
    println!("{} {dtype}: {} kernels of {most} rounds", shape.name, seen.len());
    Ok(())
}

/// Runs every candidate of `wgmma` with more rows than its largest tiles have.
fn many_rows(shape: &Shape, dtype: DType) -> Result<(), Failed> {
    let options = CompileOptions { prefill: Some(vec![600]), decode: Some(vec![100]), ..options(dtype) };
    let problems = Tuning::of(&plan(shape, &CompileOptions { without_cubins: true, ..options.clone() }).manifest);
    let own = |names: Vec<&str>| -> Vec<String> {
        names.into_iter().filter(|name| name.starts_with("wgmma ")).map(str::to_owned).collect()
    };
    let own: Vec<(&str, Vec<String>)> = problems.problems().map(|(key, names)| (key, own(names))).collect();
    let most = own.iter().map(|(_, names)| names.len()).max().unwrap_or(0);
    let mut seen = BTreeSet::new();
    for nth in 0..most {
        let chosen = own.iter().filter(|(_, names)| !names.is_empty());
        let chosen = chosen.map(|(key, names)| ((*key).to_owned(), names[nth % names.len()].clone())).collect();
        let tactics = Tactics { chosen, ..Tactics::default() };
        seen.extend(check(shape, &CompileOptions { tactics, ..options.clone() }, History::Run)?);
    }
    println!("{} {dtype}: {} kernels", shape.name, seen.iter().filter(|name| name.starts_with("wgmma ")).count());
    Ok(())
}

fn fail(error: anyhow::Error) -> Failed {
    format!("{error:#}").into()
}
