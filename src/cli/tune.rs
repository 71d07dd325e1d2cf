//! `lfm2c compile --tune`: the candidates of every choice among kernels, measured on the GPU that is present.

pub mod libraries;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cli::output::{note, print};
use crate::cli::table::table;
use crate::cli::{load, progress};
use crate::codegen::refine::{Entry, Refined, Refinement, last_fused};
use crate::codegen::select::{APART, Allowed, Tactics};
use crate::codegen::tuning::Round;
use crate::codegen::{CompileOptions, Lock, Source, Tuning};
use crate::cuda;
use crate::plan::{Manifest, Phase, PlanFile};
use crate::runtime::cuda::measure::{Inputs, Options, Timed, graph_us, refused_kernels, time_steps};
use crate::runtime::cuda::{CudaExecutor, Graphs, check_device};
use crate::runtime::workload::History;

/// The rank whose kernels are measured: every plan has one, and the others have about the same work.
const RANK: usize = 0;

/// Measures and prints the choices. After each round `keep` gets what is known by then, so that what interrupts the work
/// costs the rest alone. The options' own tactics do not count.
pub fn measure(
    source: &Source,
    options: &CompileOptions,
    model: Option<&Path>,
    keep: &mut dyn FnMut(Lock) -> Result<()>,
) -> Result<()> {
    let gpu = gpu()?;
    // All that can be packed, so that weights stay while kernels change.
    let Allowed { pack, libraries } = options.allowed().for_measurements();
    let options = &CompileOptions { tactics: Tactics::default(), pack, libraries, ..options.clone() };
    let problems = CompileOptions { without_cubins: true, ..options.clone() };
    let compiled = load::compile_source(source, &problems)?;
    let manifest = compiled.file.manifest;
    let mut bench = Bench { source, model, held: None };
    let mut tuning = Tuning::of(&manifest, options.allowed());
    let rounds = tuning.rounds();
    let mut toolkit = (0, 0);
    for (i, &round) in rounds.iter().enumerate() {
        let phase = format!("{:?}", round.phase).to_lowercase();
        note(format_args!("round {} of {}: candidates {} of {phase}", i + 1, rounds.len(), round.nth + 1));
        toolkit = bench.run(options, &mut tuning, round)?;
        keep(tuning.lock(&gpu, toolkit))?;
    }
    for (bucket, at) in manifest.ranks[RANK].buckets.iter().enumerate() {
        if at.phase == Phase::Decode {
            note(format_args!("whole graphs of {}", at.name));
            let alone = only(&manifest, at.phase, at.tokens, options);
            let search = Refinement::new(&tuning.entries(bucket), tuning.order(bucket));
            tuning.refine(bucket, bench.refine(&alone, search, 0)?);
            keep(tuning.lock(&gpu, toolkit))?;
            if let Some(found) = bench.apart(&alone, &mut tuning, &compiled.buckets[bucket].optional)? {
                tuning.take_apart(bucket, found);
                keep(tuning.lock(&gpu, toolkit))?;
            }
        }
    }
    print(report(&tuning, &gpu))
}

/// Histories are what the state holds: to run them would take longer than to measure.
fn over_held_state() -> Options {
    Options { history: History::Held, ..Options::default() }
}

/// The name of the first GPU, if kernels can be compiled for it.
fn gpu() -> Result<String> {
    let device = cuda::Device::open(0).context(
        "--tune measures kernels on a GPU of this machine; without one, leave it out: a lock file beside the recipe, made on \
         another machine, is used",
    )?;
    let (major, minor) = device.capability;
    if (major, minor) != (9, 0) {
        bail!("--tune: expected a GPU of compute capability 9.0, found {} with {major}.{minor}", device.name);
    }
    Ok(device.name.clone())
}

/// Plans of one model on the device, one after the other, with weights that stay there where the next plan has the same steps.
struct Bench<'a> {
    source: &'a Source,
    model: Option<&'a Path>,
    held: Option<CudaExecutor>,
}

impl Bench<'_> {
    /// The device with a plan, and random numbers in its state.
    fn open(&mut self, file: &PlanFile) -> Result<CudaExecutor> {
        if let Some(mut executor) = self.held.take().filter(|executor| executor.runs_same_steps(file)) {
            executor.adopt(file)?;
            return Ok(executor);
        }
        let mut executor = load::first_rank_alone(file, self.model, Graphs::Required)?;
        executor.randomize_state(0)?;
        Ok(executor)
    }

    /// Compiles and measures one round, with the options' own tactics beside it, as often as it takes until the device runs all
    /// of it. Gives the toolkit's version.
    fn run(&mut self, options: &CompileOptions, tuning: &mut Tuning, round: Round) -> Result<(u32, u32)> {
        loop {
            let mut tactics = tuning.tactics(round)?;
            tactics.chosen.extend(options.tactics.chosen.clone());
            let file = load::compile_source(self.source, &CompileOptions { tactics, ..options.clone() })?.file;
            match self.time(&file, &tuning.measured(round))? {
                Timed::Steps(times) => {
                    tuning.record(round, &times)?;
                    return file.manifest.toolkit.context("a plan for a GPU without machine code");
                }
                Timed::Refused(steps) => {
                    let buckets = &file.manifest.ranks[RANK].buckets;
                    for at in &steps {
                        let bucket = &buckets[at.bucket];
                        note(format_args!("bucket {}, step {}: {}", bucket.name, bucket.steps[at.step].name, at.error));
                    }
                    let steps: Vec<_> = steps.into_iter().map(|at| (at.bucket, at.step, at.error)).collect();
                    tuning.fail(round, &steps)?;
                }
            }
        }
    }

    /// Times of the steps of some buckets. After a kernel that failed the device is opened anew, because it stays unusable until
    /// it is closed.
    fn time(&mut self, file: &PlanFile, buckets: &[usize]) -> Result<Timed> {
        check_device(&file.manifest, None)?;
        let mut executor = match self.open(file) {
            Ok(executor) => executor,
            Err(error) => {
                let refused = refused_kernels(file, RANK, &cuda::Device::open(0)?)?;
                return if refused.is_empty() { Err(error) } else { Ok(Timed::Refused(refused)) };
            }
        };
        // Steps are timed where the inputs stand; none moves them on.
        let options = Options { steps: 1, ..over_held_state() };
        let bar = progress::count("measuring buckets", buckets.len() as u64);
        let timed = time_steps(&mut executor, buckets, &options, &|done| bar.set_position(done as u64));
        bar.finish_and_clear();
        if matches!(timed, Ok(Timed::Steps(_))) {
            self.held = Some(executor);
        }
        timed
    }

    /// Times the whole graphs of a bucket of the plan, with the options' own tactics beside those tried.
    fn refine(&mut self, options: &CompileOptions, mut search: Refinement, bucket: usize) -> Result<Refined> {
        let mut prepared: Option<Inputs> = None;
        let all = search.left();
        let bar = progress::count("timing graphs", all as u64);
        while let Some(tactics) = search.next() {
            let mut options = options.clone();
            options.tactics.chosen.extend(tactics.chosen);
            let file = load::compile_source(self.source, &options)?.file;
            let stays = self.held.as_ref().is_some_and(|executor| executor.runs_same_steps(&file));
            let mut executor = self.open(&file)?;
            let inputs = match prepared.take().filter(|_| stays) {
                Some(inputs) => inputs,
                None => Inputs::prepare(&mut executor, bucket, &over_held_state())?,
            };
            search.record(Some(graph_us(&mut executor, bucket, &inputs)?));
            (self.held, prepared) = (Some(executor), Some(inputs));
            bar.set_position((all - search.left()) as u64);
        }
        bar.finish_and_clear();
        Ok(search.finish())
    }

    /// Finds out which of a bucket's fused operators are better taken apart, once what they are made of has been measured.
    fn apart(
        &mut self,
        alone: &CompileOptions,
        tuning: &mut Tuning,
        optional: &BTreeSet<String>,
    ) -> Result<Option<Refined>> {
        if optional.is_empty() {
            return Ok(None);
        }
        // What is apart may be fused in another way, which is found on the way.
        let (mut optional, mut apart) = (optional.clone(), BTreeSet::new());
        loop {
            let last = last_fused(optional.difference(&apart));
            if last.is_empty() {
                break;
            }
            apart.extend(last);
            let chosen = apart.iter().map(|key| (key.clone(), APART.to_owned())).collect();
            let tactics = Tactics { chosen, ..Tactics::default() };
            let some = CompileOptions { tactics, ..alone.clone() };
            let without = CompileOptions { without_cubins: true, ..some.clone() };
            let compiled = load::compile_source(self.source, &without)?;
            let mut parts = Tuning::of(&compiled.file.manifest, alone.allowed());
            parts.learn(tuning);
            for round in parts.rounds() {
                if !parts.measured(round).is_empty() {
                    self.run(&some, &mut parts, round)?;
                }
            }
            tuning.absorb(parts);
            optional.extend(compiled.buckets.into_iter().flat_map(|bucket| bucket.optional));
        }
        let base = CompileOptions { tactics: tuning.lock("", (0, 0)).tactics(), ..alone.clone() };
        let entries: Vec<Entry> = optional.iter().map(|key| Entry::fusion(key)).collect();
        self.refine(&base, Refinement::new(&entries, &[]), 0).map(Some)
    }
}

/// Options that compile one bucket with the limits of the whole plan, on which its problems depend.
fn only(manifest: &Manifest, phase: Phase, rows: u64, options: &CompileOptions) -> CompileOptions {
    let limits = &manifest.limits;
    let (decode, prefill) = if phase == Phase::Decode { (vec![rows], vec![]) } else { (vec![], vec![rows]) };
    CompileOptions {
        decode: Some(decode),
        prefill: Some(prefill),
        max_sequences: Some(limits.max_sequences),
        max_context: Some(limits.max_context),
        kv_tokens: Some(limits.kv_tokens),
        ..options.clone()
    }
}

/// What was found out.
fn report(tuning: &Tuning, gpu: &str) -> String {
    let us = |us: Option<f64>| us.map_or_else(|| "failed".to_owned(), |us| format!("{us:.2}"));
    let choices = tuning.choices();
    let rows: Vec<Vec<String>> = choices
        .iter()
        .filter(|choice| choice.candidates > 1)
        .map(|choice| {
            vec![
                choice.key.to_owned(),
                choice.bucket.to_owned(),
                choice.steps.to_string(),
                choice.candidates.to_string(),
                us(choice.default_us),
                us(choice.us),
                choice.chosen.to_owned(),
            ]
        })
        .collect();
    let totals: Vec<Vec<String>> = tuning
        .totals()
        .iter()
        .map(|total| {
            vec![
                total.bucket.to_owned(),
                total.steps.to_string(),
                format!("{:.1}", total.default_us),
                format!("{:.1}", total.us),
                format!("{:.1} %", 100.0 * (1.0 - total.us / total.default_us)),
            ]
        })
        .collect();
    let graphs: Vec<Vec<String>> = tuning
        .graphs()
        .iter()
        .map(|(bucket, time)| {
            vec![
                bucket.clone(),
                time.timed.to_string(),
                format!("{:.1}", time.default_us),
                format!("{:.1}", time.us),
                format!("{:.1} %", 100.0 * (1.0 - time.us / time.default_us)),
            ]
        })
        .collect();
    format!(
        "{gpu}: {} problems, {} of them with a choice\n\n{}\n{}\
         us: median of a problem's steps, each timed by itself, so without what neighbours gain by overlapping\n\n{}\n",
        choices.len(),
        rows.len(),
        table(&["problem", "first in", "steps", "candidates", "default, us", "chosen, us", "chosen"], &rows),
        table(&["bucket", "steps", "defaults, us", "chosen, us", "saved"], &totals),
        table(&["whole graph of", "graphs timed", "defaults, us", "chosen, us", "saved"], &graphs),
    )
}
