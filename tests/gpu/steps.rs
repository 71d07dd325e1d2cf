//! Every step of every bucket from the GPU's inputs on the CPU: integers equal, numbers within the type's bound. Over shapes,
//! types, passes left out, and every candidate of every kernel.

use std::collections::BTreeSet;

use lfm2c::codegen::select::Tactics;
use lfm2c::codegen::{CompileOptions, Tuning};
use lfm2c::ir::DType;
use lfm2c::passes;
use lfm2c::plan::{Kernel, Manifest, PlanFile, Step};
use lfm2c::runtime::compare::{bound, compare_step, supply_step};
use lfm2c::runtime::cpu::CpuExecutor;
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
            trials.push(Trial::test(format!("many rows {} {dtype}", shape.name), move || many_rows(shape, dtype)));
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
    compare(&file, &mut cpu(&file), all, History::Run)
}

/// Compares the chosen steps of every bucket; the CPU runs the others alone.
fn compare(file: &PlanFile, cpu: &mut CpuExecutor, chosen: Vec<Vec<bool>>, history: History) -> Result<(), Failed> {
    let mut gpu = gpu(file, Graphs::Off);
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
                supply_step(cpu, &gpu, i, at).map_err(fail)?;
                continue;
            }
            let kernel = kernel_of(file, step);
            let written = compare_step(cpu, &gpu, i, at).map_err(fail)?;
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

/// Compares each kernel once a bucket, over several plans that differ in kernels alone.
#[derive(Default)]
struct Once {
    seen: BTreeSet<String>,
    cpu: Option<(Manifest, CpuExecutor)>,
    share: Option<Share>,
    plans: usize,
}

/// What one of several processes compares, over a state of random numbers: under a sanitizer, running rows to fill it would take
/// most of the time.
struct Share {
    part: usize,
    parts: usize,
    /// Kernels that need not run, by shape, bucket and machine code.
    known: BTreeSet<String>,
}

impl Share {
    /// As the environment says: `LFM2C_PART=2/5` is the second of five shares, and lines of the file `LFM2C_KNOWN` are left out.
    fn of_environment() -> Result<Option<Share>, Failed> {
        let Ok(text) = std::env::var("LFM2C_PART") else { return Ok(None) };
        let (part, parts) = text.split_once('/').ok_or("expected LFM2C_PART=PART/PARTS")?;
        let (part, parts) = (part.parse()?, parts.parse()?);
        if !(1..=parts).contains(&part) {
            return Err(format!("LFM2C_PART: expected a part from 1 to {parts}, found {part}").into());
        }
        let known = match std::env::var_os("LFM2C_KNOWN") {
            Some(file) => std::fs::read_to_string(file)?.lines().map(str::to_owned).collect(),
            None => BTreeSet::new(),
        };
        Ok(Some(Share { part, parts, known }))
    }
}

impl Once {
    fn new() -> Result<Once, Failed> {
        Ok(Once { share: Share::of_environment()?, ..Once::default() })
    }

    /// Compares the steps of a plan whose kernels have not had their turn yet.
    fn compare(&mut self, shape: &Shape, options: &CompileOptions) -> Result<(), Failed> {
        let mut file = plan(shape, options);
        self.plans += 1;
        let mine = self.share.as_ref().is_none_or(|share| self.plans % share.parts == share.part - 1);
        let known = |name: &String| self.share.as_ref().is_some_and(|share| share.known.contains(name));
        let mut chosen = vec![];
        let mut new = vec![];
        for bucket in &file.manifest.ranks[0].buckets {
            let mut first = |step| {
                let cubin = kernel_of(&file, step).cubin.expect("the plan has machine code") as usize;
                let name = format!("{} {} {}", shape.name, bucket.name, blake3::hash(&file.cubins[cubin]));
                let first = self.seen.insert(name.clone()) && mine && !known(&name);
                if first {
                    new.push(name);
                }
                first
            };
            chosen.push(bucket.steps.iter().map(&mut first).collect::<Vec<bool>>());
        }
        if new.is_empty() {
            return Ok(());
        }
        let (plan, cpu) = self.cpu.get_or_insert_with(|| (without_launches(&file), cpu(&file)));
        assert!(*plan == without_launches(&file), "plans differ in more than kernels");
        let history = if self.share.is_some() { History::Held } else { History::Run };
        if history == History::Held {
            keep_kernels(&mut file, &chosen);
        }
        compare(&file, cpu, chosen, history)?;
        if self.share.is_some() {
            new.iter().for_each(|name| println!("ran {name}"));
        }
        Ok(())
    }
}

/// A plan but for how its steps run on a device.
fn without_launches(file: &PlanFile) -> Manifest {
    let mut manifest = file.manifest.clone();
    manifest.kernels.clear();
    manifest.services.clear();
    manifest.ranks.iter_mut().flat_map(|rank| &mut rank.buckets).flat_map(|bucket| &mut bucket.steps).for_each(
        |step| {
            step.launch = None;
        },
    );
    manifest
}

/// Leaves only the kernels of services and of the chosen steps, because a sanitizer takes its time for each that is loaded. The
/// other steps can no longer be launched.
fn keep_kernels(file: &mut PlanFile, chosen: &[Vec<bool>]) {
    let manifest = &mut file.manifest;
    let mut kept: Vec<u32> = manifest.services.iter().map(|service| service.1).collect();
    let steps = manifest.ranks[0].buckets.iter_mut().zip(chosen);
    for (step, &chosen) in steps.flat_map(|(bucket, chosen)| bucket.steps.iter_mut().zip(chosen)) {
        let launch = step.launch.as_mut().expect("a plan for the GPU has launches");
        if chosen {
            kept.push(launch.kernel);
        } else {
            (launch.kernel, launch.shared, launch.args) = (kept[0], 0, vec![]);
        }
    }
    kept.sort_unstable();
    kept.dedup();
    let place = |kernel: &mut u32| *kernel = kept.binary_search(kernel).expect("it is kept") as u32;
    manifest.services.iter_mut().for_each(|service| place(&mut service.1));
    let steps = manifest.ranks[0].buckets.iter_mut().flat_map(|bucket| &mut bucket.steps);
    steps.filter_map(|step| step.launch.as_mut()).for_each(|launch| place(&mut launch.kernel));
    manifest.kernels = kept.iter().map(|&kernel| manifest.kernels[kernel as usize].clone()).collect();
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

/// Runs every candidate of the kernels with the largest tiles, `wgmma` and `flash`, with more rows than those have.
fn many_rows(shape: &Shape, dtype: DType) -> Result<(), Failed> {
    let options = CompileOptions { prefill: Some(vec![600]), decode: Some(vec![100]), ..options(dtype) };
    let problems = Tuning::of(&plan(shape, &CompileOptions { without_cubins: true, ..options.clone() }).manifest);
    let large = |name: &str| name.starts_with("wgmma ") || name.starts_with("flash ");
    let own =
        |names: Vec<&str>| -> Vec<String> { names.into_iter().filter(|name| large(name)).map(str::to_owned).collect() };
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
