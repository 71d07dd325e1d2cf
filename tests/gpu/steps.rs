//! Every step of every bucket from the GPU's inputs on the CPU: integers equal, numbers within the type's bound. Over shapes,
//! types, passes left out, and every candidate of every kernel.

use std::collections::BTreeSet;

use lfm2c::codegen::select::Tactics;
use lfm2c::codegen::{CompileOptions, Tuning};
use lfm2c::ir::DType;
use lfm2c::passes;
use lfm2c::plan::{Bucket, Kernel, PlanFile, Step};
use lfm2c::runtime::compare::{bound, compare_step, supply_step};
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
            trials.push(Trial::test(format!("steps {} {dtype}", shape.name), move || check(shape, &options(dtype))));
            trials.push(Trial::test(format!("unfused steps {} {dtype}", shape.name), move || {
                let disabled = passes::names().into_iter().map(str::to_owned).collect();
                check(shape, &CompileOptions { disabled, ..options(dtype) })
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
                check(shape, &CompileOptions { disabled: vec![left_out.into()], ..options(DType::BF16) })
            }));
        }
    }
    trials
}

/// Compares every step of a plan.
fn check(shape: &Shape, options: &CompileOptions) -> Result<(), Failed> {
    let file = plan(shape, options);
    let all = file.manifest.ranks[0].buckets.iter().map(|bucket| vec![true; bucket.steps.len()]).collect();
    compare(&file, all, History::Run)
}

/// Compares the chosen steps of every bucket; the CPU runs the others alone.
fn compare(file: &PlanFile, chosen: Vec<Vec<bool>>, history: History) -> Result<(), Failed> {
    if chosen.iter().flatten().all(|&chosen| !chosen) {
        return Ok(());
    }
    let (mut gpu, mut cpu) = (gpu(file, Graphs::Off), cpu(file));
    let bound = bound(file.manifest.dtype);
    let mut faults = vec![];
    let program = gpu.program().clone();
    for (i, (bucket, chosen)) in program.buckets.iter().zip(chosen).enumerate() {
        let Some(last) = chosen.iter().rposition(|&chosen| chosen) else { continue };
        gpu.poison(0xff).map_err(fail)?;
        if history == History::Held {
            gpu.randomize_state(i as u64).map_err(fail)?;
        }
        let batch = random_batch(&mut gpu, i, 40, 11 + i as u64, history).map_err(fail)?;
        gpu.poison_arena(0xff).map_err(fail)?;
        gpu.upload(i, &batch).map_err(fail)?;
        for (at, step) in bucket.steps.iter().enumerate().take(last + 1) {
            if !chosen[at] {
                supply_step(&mut cpu, &gpu, i, at).map_err(fail)?;
                continue;
            }
            let kernel = kernel_of(file, step);
            let written = compare_step(&mut cpu, &gpu, i, at).map_err(fail)?;
            for written in written.iter().filter(|written| !written.holds(bound)) {
                faults.push(format!(
                    "{} {} ({}), %{}: {:e}, {:?}",
                    bucket.name,
                    step.name,
                    kernel_name(kernel),
                    written.name,
                    written.error,
                    written.first
                ));
            }
        }
        if faults.len() > 12 {
            break;
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n").into()) }
}

fn kernel_of<'a>(file: &'a PlanFile, step: &Step) -> &'a Kernel {
    let launch = step.launch.as_ref().expect("a plan for the GPU has launches");
    &file.manifest.kernels[launch.kernel as usize]
}

/// Compares each kernel once a bucket, over several plans; of `parts` processes that do so, the one for `part` its share.
struct Once {
    seen: BTreeSet<(String, String)>,
    part: usize,
    parts: usize,
    history: History,
}

impl Once {
    /// Everything, over what rows left behind; or with `LFM2C_PART=2/5` the second of five shares, over a state of random numbers:
    /// under a sanitizer, running rows to fill it would take most of the time.
    fn new() -> Result<Once, Failed> {
        let seen = BTreeSet::new();
        let Ok(text) = std::env::var("LFM2C_PART") else {
            return Ok(Once { seen, part: 1, parts: 1, history: History::Run });
        };
        let (part, parts) = text.split_once('/').ok_or("expected LFM2C_PART=PART/PARTS")?;
        let (part, parts) = (part.parse()?, parts.parse()?);
        if !(1..=parts).contains(&part) {
            return Err(format!("expected a part from 1 to {parts}, found {part}").into());
        }
        Ok(Once { seen, part, parts, history: History::Held })
    }

    /// Compares the steps of a plan whose kernels have not had their turn yet.
    fn compare(&mut self, shape: &Shape, options: &CompileOptions) -> Result<(), Failed> {
        let file = plan(shape, options);
        let mut mine = |bucket: &Bucket, step| {
            let new = self.seen.insert((bucket.name.clone(), kernel_of(&file, step).source.clone()));
            new && self.seen.len() % self.parts == self.part - 1
        };
        let buckets = &file.manifest.ranks[0].buckets;
        let chosen: Vec<Vec<bool>> =
            buckets.iter().map(|bucket| bucket.steps.iter().map(|step| mine(bucket, step)).collect()).collect();
        compare(&file, chosen, self.history)
    }
}

/// Runs every candidate of every problem.
fn candidates(shape: &Shape, dtype: DType) -> Result<(), Failed> {
    let options = CompileOptions { prefill: Some(vec![80]), decode: Some(vec![3, 33]), ..options(dtype) };
    let problems = Tuning::of(&plan(shape, &CompileOptions { without_cubins: true, ..options.clone() }).manifest);
    let most = problems.problems().map(|(_, candidates)| candidates.len()).max().unwrap_or(0);
    let mut once = Once::new()?;
    for nth in 1..=most {
        let tactics = Tactics { nth: Some(nth), ..Tactics::default() };
        once.compare(shape, &CompileOptions { tactics, ..options.clone() })?;
    }
    println!("{} {dtype}: {} kernels", shape.name, once.seen.len());
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
    let mut once = Once::new()?;
    for nth in 0..most {
        let chosen = own.iter().filter(|(_, names)| !names.is_empty());
        let chosen = chosen.map(|(key, names)| ((*key).to_owned(), names[nth % names.len()].clone())).collect();
        let tactics = Tactics { chosen, ..Tactics::default() };
        once.compare(shape, &CompileOptions { tactics, ..options.clone() })?;
    }
    println!("{} {dtype}: {} kernels", shape.name, once.seen.len());
    Ok(())
}

fn fail(error: anyhow::Error) -> Failed {
    format!("{error:#}").into()
}
