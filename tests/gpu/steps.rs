//! Every step of every bucket from the GPU's inputs on the CPU: integers equal, numbers within the type's bound. Over shapes,
//! types, passes left out, and every candidate of every kernel.

use std::collections::BTreeSet;

use lfm2c::codegen::select::{Pack, Tactics};
use lfm2c::codegen::{CompileOptions, Tuning};
use lfm2c::cuda::Device;
use lfm2c::ir::DType;
use lfm2c::passes;
use lfm2c::plan::{Bucket, Instr, Kernel, Op, PlanFile, Step};
use lfm2c::runtime::compare::{Example, Written, bound, compare_step};
use lfm2c::runtime::cuda::{CudaExecutor, Graphs};
use lfm2c::runtime::weights;
use lfm2c::runtime::workload::{History, random_batch};
use libtest_mimic::{Failed, Trial};

use crate::models::{CROWDED, SHAPES, Shape, cpu, fail, gpu, plan};

pub fn options(dtype: DType) -> CompileOptions {
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
    for dtype in [DType::BF16, DType::F16] {
        trials.push(Trial::test(format!("steps {} {dtype}", CROWDED.name), move || gathered_apart(dtype)));
    }
    trials
}

/// Compares the steps of a plan whose rows are gathered apart.
fn gathered_apart(dtype: DType) -> Result<(), Failed> {
    let options = CompileOptions {
        prefill: Some(vec![1100]),
        decode: Some(vec![1]),
        max_sequences: Some(8),
        max_context: Some(1280),
        kv_tokens: Some(10240),
        ..options(dtype)
    };
    let program = &plan(&CROWDED, &options).manifest.ranks[0];
    let apart = |Instr(op, ..): &Instr| matches!(op, Op::GatherPairs { .. });
    if !program.semantics.iter().any(|semantic| semantic.body.iter().any(apart)) {
        return Err("expected a step that gathers rows, found none".into());
    }
    check(&CROWDED, &options)
}

/// Compares every step of a plan, from what the steps before it left on the GPU.
fn check(shape: &Shape, options: &CompileOptions) -> Result<(), Failed> {
    check_plan(&plan(shape, options))
}

/// The same of a plan that there is.
pub fn check_plan(file: &PlanFile) -> Result<(), Failed> {
    let (mut gpu, mut cpu) = (gpu(file, Graphs::Off), cpu(file));
    let mut faults = Faults::of(file);
    let program = gpu.program().clone();
    for (i, bucket) in program.buckets.iter().enumerate() {
        begin(&mut gpu, i, History::Run).map_err(fail)?;
        for (at, step) in bucket.steps.iter().enumerate() {
            faults.add(file, bucket, step, &compare_step(&mut cpu, &gpu, i, at).map_err(fail)?);
        }
    }
    faults.result()
}

/// Puts rows of a bucket on the GPU, with what they need in the state; all else is poisoned.
fn begin(gpu: &mut CudaExecutor, bucket: usize, history: History) -> anyhow::Result<()> {
    gpu.poison(0xff)?;
    if history == History::Held {
        gpu.randomize_state(bucket as u64)?;
    }
    let batch = random_batch(gpu, bucket, 40, 11 + bucket as u64, history)?;
    gpu.poison_arena(0xff)?;
    gpu.upload(bucket, &batch)
}

/// What steps wrote wrong.
struct Faults {
    bound: f64,
    found: Vec<String>,
}

impl Faults {
    fn of(file: &PlanFile) -> Faults {
        Faults { bound: bound(file.manifest.dtype), found: vec![] }
    }

    fn add(&mut self, file: &PlanFile, bucket: &Bucket, step: &Step, written: &[Written]) {
        for Written { name, error, first, .. } in written.iter().filter(|written| !written.holds(self.bound)) {
            let kernel = file.manifest.runner(step).unwrap_or_default();
            self.found.push(format!("{} {} ({kernel}), %{name}: {error:e}, {first:?}", bucket.name, step.name));
        }
    }

    fn result(self) -> Result<(), Failed> {
        let shown = &self.found[..self.found.len().min(20)];
        if shown.is_empty() { Ok(()) } else { Err(shown.join("\n").into()) }
    }
}

fn kernel_of<'a>(file: &'a PlanFile, step: &Step) -> &'a Kernel {
    let launch = step.launch.as_ref().expect("a plan for the GPU has launches");
    &file.manifest.kernels[launch.kernel as usize]
}

/// Compares each kernel once a bucket, over several plans that differ in kernels alone: with what the CPU made of each step, once
/// for all.
#[derive(Default)]
struct Once {
    seen: BTreeSet<String>,
    begun: Option<(Examples, CudaExecutor)>,
    share: Option<Share>,
    plans: usize,
}

/// What a plan's steps read and wrote on the CPU, by bucket and position.
type Examples = Vec<Vec<Example>>;

/// Runs a plan's steps on the CPU. The GPU makes the state, if its rows run there; its executor keeps its weights for others of the
/// plan's kernels.
fn begun(file: &PlanFile, history: History) -> anyhow::Result<(Examples, CudaExecutor)> {
    let program = &file.manifest.ranks[0];
    let mut cpu = cpu(file);
    let mut gpu = match history {
        History::Run => gpu(file, Graphs::Off),
        History::Held => {
            // A sanitizer takes seconds to watch weights being made.
            weights::pack(program, cpu.pool_mut().weights_mut())?;
            let bare = CudaExecutor::new(&with_kernels(file, &[]), 0, &Device::open(0)?, Graphs::Off)?;
            bare.pool().write(program.pool.weights.offset as usize, cpu.pool_mut().weights_mut(), bare.stream())?;
            bare
        }
    };
    let mut examples = vec![];
    for (i, bucket) in program.buckets.iter().enumerate() {
        begin(&mut gpu, i, history)?;
        for region in [program.pool.state, program.pool.io] {
            let range = region.offset as usize..(region.offset + region.bytes) as usize;
            gpu.pool().read(range.start, &mut cpu.pool_mut().bytes_mut()[range], gpu.stream())?;
        }
        let steps = 0..bucket.steps.len();
        examples.push(steps.map(|at| Example::run(program, &mut cpu, i, at)).collect::<anyhow::Result<_>>()?);
    }
    Ok((examples, gpu))
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
        let file = plan(shape, options);
        let history = if self.share.is_some() { History::Held } else { History::Run };
        if self.begun.is_none() {
            self.begun = Some(begun(&file, history).map_err(fail)?);
        }
        let Some((examples, gpu)) = &mut self.begun else { unreachable!("it was just made") };
        assert!(gpu.runs_same_steps(&file), "plans differ in more than kernels");
        self.plans += 1;
        let mine = self.share.as_ref().is_none_or(|share| self.plans % share.parts == share.part - 1);
        let known = |name: &String| self.share.as_ref().is_some_and(|share| share.known.contains(name));
        let mut chosen = vec![];
        let mut names = vec![];
        for (i, bucket) in file.manifest.ranks[0].buckets.iter().enumerate() {
            for (at, step) in bucket.steps.iter().enumerate() {
                let cubin = kernel_of(&file, step).cubin.expect("the plan has machine code") as usize;
                let name = format!("{} {} {}", shape.name, bucket.name, blake3::hash(&file.cubins[cubin]));
                if self.seen.insert(name.clone()) && mine && !known(&name) {
                    chosen.push((i, at));
                    names.push(name);
                }
            }
        }
        if chosen.is_empty() {
            return Ok(());
        }
        gpu.adopt(&with_kernels(&file, &chosen)).map_err(fail)?;
        gpu.poison_arena(0xff).map_err(fail)?;
        let mut faults = Faults::of(&file);
        for (bucket, step) in chosen {
            let example = &examples[bucket][step];
            example.pose(gpu, 0xff).map_err(fail)?;
            let written = example.compare(gpu, bucket, step).map_err(fail)?;
            let of = &file.manifest.ranks[0].buckets[bucket];
            faults.add(&file, of, &of.steps[step], &written);
        }
        faults.result()?;
        if self.share.is_some() {
            names.iter().for_each(|name| println!("ran {name}"));
        }
        Ok(())
    }
}

/// A plan with no kernels but those of services and of the chosen steps, by bucket and position, because loading a kernel takes a
/// sanitizer longer than running it. The other steps can no longer be launched.
fn with_kernels(file: &PlanFile, chosen: &[(usize, usize)]) -> PlanFile {
    let mut file = file.clone();
    let manifest = &mut file.manifest;
    let mut kept: Vec<u32> = manifest.services.iter().map(|service| service.1).collect();
    for (i, bucket) in manifest.ranks[0].buckets.iter_mut().enumerate() {
        for (at, step) in bucket.steps.iter_mut().enumerate() {
            let launch = step.launch.as_mut().expect("a plan for the GPU has launches");
            if chosen.contains(&(i, at)) {
                kept.push(launch.kernel);
            } else {
                (launch.kernel, launch.shared, launch.args) = (kept[0], 0, vec![]);
            }
        }
    }
    kept.sort_unstable();
    kept.dedup();
    let place = |kernel: &mut u32| *kernel = kept.binary_search(kernel).expect("it is kept") as u32;
    manifest.services.iter_mut().for_each(|service| place(&mut service.1));
    let steps = manifest.ranks[0].buckets.iter_mut().flat_map(|bucket| &mut bucket.steps);
    steps.filter_map(|step| step.launch.as_mut()).for_each(|launch| place(&mut launch.kernel));
    manifest.kernels = kept.iter().map(|&kernel| manifest.kernels[kernel as usize].clone()).collect();
    file
}

/// Runs every candidate of every problem.
fn candidates(shape: &Shape, dtype: DType) -> Result<(), Failed> {
    let options =
        CompileOptions { prefill: Some(vec![80]), decode: Some(vec![3, 33]), pack: Pack::All, ..options(dtype) };
    let problems =
        Tuning::of(&plan(shape, &CompileOptions { without_cubins: true, ..options.clone() }).manifest, options.pack);
    let most = problems.problems().map(|(_, candidates)| candidates.len()).max().unwrap_or(0);
    let mut once = Once::new()?;
    for nth in 1..=most {
        let tactics = Tactics { nth: Some(nth), ..Tactics::default() };
        once.compare(shape, &CompileOptions { tactics, ..options.clone() })?;
    }
    println!("{} {dtype}: {} kernels", shape.name, once.seen.len());
    Ok(())
}

/// Runs every candidate of the kernels with the largest tiles, and of those that are for many rows, with more rows than tiles have.
fn many_rows(shape: &Shape, dtype: DType) -> Result<(), Failed> {
    let options =
        CompileOptions { prefill: Some(vec![600]), decode: Some(vec![100]), pack: Pack::All, ..options(dtype) };
    let problems =
        Tuning::of(&plan(shape, &CompileOptions { without_cubins: true, ..options.clone() }).manifest, options.pack);
    let large = |name: &str| ["wgmma ", "flash ", "attention_tile_fma "].iter().any(|kernel| name.starts_with(kernel));
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
