//! `lfm2c diff`: each step on the CPU from the GPU's inputs.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::cli::load::{self, Choices, find_bucket};
use crate::cli::output::print;
use crate::cli::table::table;
use crate::plan::Phase;
use crate::runtime::Executor;
use crate::runtime::compare::{bound, compare_step};
use crate::runtime::cuda::Graphs;
use crate::runtime::workload::{History, random_batch};

/// Compares the GPU with the CPU, step by step.
///
/// Runs each bucket over random sequences on the GPU. The CPU starts each step from the GPU's inputs, and what the step wrote
/// on both is compared: integers exactly, numbers by relative L2 error. Names the first step that differs.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan file for a GPU, or a recipe to compile for one
    #[arg(value_name = "PLAN")]
    plan: PathBuf,
    /// The checkpoint's directory
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    choices: Choices,
    /// Only this bucket
    #[arg(long, value_name = "NAME")]
    bucket: Option<String>,
    /// Stops a bucket after this step
    #[arg(long, value_name = "STEP")]
    stop_after: Option<String>,
    /// Bound on the relative L2 error [default: by the plan's type]
    #[arg(long, value_name = "X")]
    tolerance: Option<f64>,
    /// Random numbers of the tokens
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Positions that each sequence of a decode bucket has behind it, at most
    #[arg(long, default_value_t = 40, value_name = "N")]
    context: usize,
    /// Goes on after a difference, and lists every step
    #[arg(long)]
    all: bool,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.plan, model, &arguments.choices.options_for(&arguments.plan)?)?;
    let mut gpu = load::cuda_executor(&file, model, Graphs::Off)?;
    let mut cpu = load::cpu_executor(&file, model)?;
    let program = gpu.program().clone();
    let names: Vec<&str> = program.buckets.iter().map(|bucket| bucket.name.as_str()).collect();
    let only = arguments.bucket.as_deref().map(|name| find_bucket(&names, name)).transpose()?;
    let bound = arguments.tolerance.unwrap_or(bound(file.manifest.dtype));
    let mut rows = vec![];
    let (mut steps, mut worst, mut differing) = (0usize, 0.0f64, 0usize);
    let mut found_stop = arguments.stop_after.is_none();
    for (i, bucket) in program.buckets.iter().enumerate().filter(|(i, _)| only.is_none_or(|only| only == *i)) {
        if bucket.phase == Phase::Fixed {
            bail!("bucket {}: a graph that is no language model is compared by `lfm2c bench`", bucket.name);
        }
        gpu.poison(0xff)?;
        let batch = random_batch(&mut gpu, i, arguments.context, arguments.seed, History::Run)?;
        gpu.poison_arena(0xff)?;
        gpu.upload(i, &batch)?;
        for (at, step) in bucket.steps.iter().enumerate() {
            let written = compare_step(&mut cpu, &gpu, i, at)
                .with_context(|| format!("step {} of bucket {}", step.name, bucket.name))?;
            steps += 1;
            let holds = written.iter().all(|written| written.holds(bound));
            differing += usize::from(!holds);
            for written in &written {
                worst = if written.error > worst || written.error.is_nan() { written.error } else { worst };
                if arguments.all || !written.holds(bound) {
                    let first = written.first.map(|(i, a, b)| format!("[{i}] CPU {a}, GPU {b}"));
                    rows.push(vec![
                        bucket.name.clone(),
                        step.name.clone(),
                        file.manifest.runner(step).context("a step without a launch")?,
                        written.name.clone(),
                        format!("{:.1e}", written.error),
                        first.unwrap_or_default(),
                    ]);
                }
            }
            if !holds && !arguments.all {
                print(table(&HEADER, &rows))?;
                bail!("bucket {}: step {} is the first that differs beyond {bound:e}", bucket.name, step.name);
            }
            if arguments.stop_after.as_deref() == Some(&step.name) {
                found_stop = true;
                break;
            }
        }
    }
    if arguments.all {
        print(table(&HEADER, &rows))?;
    }
    if !found_stop {
        bail!("--stop-after: no bucket has a step of that name; `lfm2c inspect PLAN --bucket NAME` lists them");
    }
    if differing > 0 {
        bail!("{differing} of {steps} steps differ beyond {bound:e}");
    }
    print(format_args!(
        "{steps} steps on {} and on the CPU: integers equal, relative L2 error at most {worst:.1e} (bound {bound:e})\n",
        gpu.device()
    ))
}

const HEADER: [&str; 6] = ["bucket", "step", "kernel", "output", "error", "first difference"];
