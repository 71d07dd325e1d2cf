//! `lfm2c compile --tune=libraries`: the kernels that are chosen, against libraries, within whole graphs.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Bench, RANK, gpu, only};
use crate::cli::load;
use crate::cli::output::{note, print};
use crate::cli::table::table;
use crate::codegen::refine::Refinement;
use crate::codegen::select::Allowed;
use crate::codegen::tuning::libraries::{LibraryTrials, graph_text, without_libraries};
use crate::codegen::{CompileOptions, Lock, Source, Tuning};
use crate::cuda::Nvrtc;
use crate::plan::{Manifest, Phase, PlanFile};
use crate::runtime::cuda::measure::Timed;

/// Measures and prints what is faster, for the problems that a library has a call for, beside the kernels that the options' tactics choose.
/// After each bucket `keep` gets the lock with what is known by then: `earlier`, which lies at the path beside it, or one of its own. Either
/// says of each problem what the options' tactics say of kernels.
///
/// # Errors
/// No GPU, another GPU, lfm2c or toolkit than the lock's, no library, or nothing to choose.
pub fn measure(
    source: &Source,
    options: &CompileOptions,
    model: Option<&Path>,
    earlier: Option<(&Path, Lock)>,
    keep: &mut dyn FnMut(&Lock) -> Result<()>,
) -> Result<()> {
    let gpu = gpu()?;
    let toolkit = Nvrtc::load()?.version();
    if let Some((path, lock)) = &earlier {
        lock.compares(&gpu, toolkit).with_context(|| format!("--tune=libraries: the lock file {}", path.display()))?;
    }
    // Elsewhere the tactics go by what the program brings, too, but its times are not those of this machine.
    let brought = Some(Lock::shipped()?).filter(|brought| brought.compares(&gpu, toolkit).is_ok());
    let Allowed { pack, libraries } = options.allowed().for_measurements();
    let options = CompileOptions { pack, libraries, ..options.clone() };
    let plan = |options: &CompileOptions| -> Result<Manifest> {
        let problems = CompileOptions { without_cubins: true, ..options.clone() };
        Ok(load::compile_source(source, &problems)?.file.manifest)
    };
    let tactics = without_libraries(&options.tactics, &plan(&options)?);
    let options = &CompileOptions { tactics, ..options };
    let manifest = plan(options)?;
    let mut trials = LibraryTrials::of(&manifest, options)?;
    let buckets: Vec<usize> =
        (0..manifest.ranks[RANK].buckets.len()).filter(|&at| trials.of_bucket(at).next().is_some()).collect();
    if buckets.is_empty() {
        bail!(
            "--tune=libraries: expected dense products of prompts, found no bucket with one that a library has a call for"
        );
    }
    let mut bench = Bench { source, model, held: None };
    let mut lock = earlier.map_or_else(|| Tuning::default().lock(&gpu, toolkit), |(_, lock)| lock);
    let mut graphs = String::new();
    for (i, &at) in (1..).zip(&buckets) {
        let bucket = &manifest.ranks[RANK].buckets[at];
        note(format_args!("bucket {} of {}: {}", i, buckets.len(), bucket.name));
        let alone = match bucket.phase {
            Phase::Fixed => options.clone(),
            phase => only(&manifest, phase, bucket.tokens, options),
        };
        // By itself it is the plan's only bucket, but where a graph has no others.
        let own = if bucket.phase == Phase::Fixed { at } else { 0 };
        let compile = |trials: &LibraryTrials, libraries| -> Result<PlanFile> {
            let tactics = trials.tactics(at, &options.tactics, libraries);
            let file = load::compile_source(source, &CompileOptions { tactics, ..alone.clone() })?.file;
            trials.check(at, &file.manifest, own, libraries)?;
            Ok(file)
        };
        loop {
            let file = compile(&trials, true)?;
            match bench.time(&file, &[own])? {
                Timed::Steps(times) => trials.record(at, &times[0].1, true)?,
                Timed::Refused(steps) => {
                    for refused in &steps {
                        note(format_args!("step {}: {}", bucket.steps[refused.step].name, refused.error));
                    }
                    trials.leave_out(at, &steps.iter().map(|refused| refused.step).collect::<Vec<_>>())?;
                    continue;
                }
            }
            break;
        }
        match bench.time(&compile(&trials, false)?, &[own])? {
            Timed::Steps(times) => trials.record(at, &times[0].1, false)?,
            Timed::Refused(steps) => bail!(
                "bucket {}: expected kernels that the device runs, found {} steps that it refuses; measure with --tune",
                bucket.name,
                steps.len()
            ),
        }
        let base = CompileOptions { tactics: trials.tactics(at, &options.tactics, false), ..alone.clone() };
        let entries = trials.entries(at);
        let found = bench.refine(&base, Refinement::new(&entries, &[]), own)?;
        trials.refine(at, &found);
        graphs += &(graph_text(&bucket.name, &found, &entries) + "\n");
        trials.write(&mut lock, brought.as_ref());
        keep(&lock)?;
    }
    print(report(&trials) + "\n" + &graphs)
}

/// What was found out.
fn report(trials: &LibraryTrials) -> String {
    let us = |us: Option<f64>| us.map_or_else(|| "-".to_owned(), |us| format!("{us:.2}"));
    let rows: Vec<Vec<String>> = trials
        .list
        .iter()
        .map(|trial| {
            vec![
                trial.key.clone(),
                trial.bucket.1.clone(),
                trial.steps.len().to_string(),
                us(trial.kernel.1),
                us(trial.library.1),
                trial.kernel.0.clone(),
                match trial.chosen {
                    Some(true) => trial.library.0.clone(),
                    Some(false) => "kernel".into(),
                    None => "-".into(),
                },
            ]
        })
        .collect();
    let header = ["problem", "bucket", "steps", "kernel, us", "library, us", "kernel", "in the graph"];
    format!("{}us: of one step, in a graph of those alike\n", table(&header, &rows))
}
