//! `lfm2c compile`: a recipe or a model directory to a plan file.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Result;
use clap::ValueEnum;

use crate::cli::load::{self, Choices, TargetChoice, compile_source};
use crate::cli::output::{keep_apart, note, print};
use crate::cli::table::{regions, size, table};
use crate::cli::{inspect, lock, tune, usage};
use crate::codegen::compile::{BucketReport, Observer};
use crate::codegen::select::Tactics;
use crate::codegen::{Balance, CompileOptions, Compiled, Lock, Source, compile};
use crate::ir::Graph;
use crate::passes::{self, Target};

/// Compile a recipe, a Hugging Face directory or a graph in text form to a plan file.
///
/// Prints what each pass did: how often it rewrote, the operators before and after, and the steps if it were the last. For a
/// GPU, the lock file beside the recipe (FILE.lock.ron), or beside the plan where there is no recipe, chooses among kernels.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A recipe (FILE.ron), or a graph in text form (FILE.ir)
    #[arg(value_name = "RECIPE.ron")]
    recipe: Option<PathBuf>,
    /// A Hugging Face directory: config.json and safetensors; with a recipe, the recipe's checkpoint
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    choices: Choices,
    /// Measures the candidates of every choice among kernels on the GPU of this machine, and writes the fastest to the lock file,
    /// for this and every later compilation. Keeps what the file has of other sizes, measured alike, unless --no-lock is given.
    /// Steps are timed one by one; then, for decode buckets, the best candidates within the whole captured graph, where neighbours
    /// overlap. `--tune=libraries` measures only where the --libraries are faster, within whole graphs, than the kernels that are
    /// chosen already; what the lock file says of kernels stays, so it does not go with --no-lock. Where experts are spread, rank 0 is
    /// measured by itself, and what it sends comes back to it
    #[arg(
        long,
        value_enum,
        value_name = "WHAT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        conflicts_with_all = ["without_cubins", "forced_routing", "stop_after_patch"]
    )]
    tune: Option<Tune>,
    /// Prints the graph after a pass, or after `all`, to standard error
    #[arg(long, value_name = "NAME")]
    print_after: Option<String>,
    /// The plan file to write
    #[arg(short, long, value_name = "FILE.plan")]
    output: PathBuf,
}

/// `--tune`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Tune {
    /// Every choice
    All,
    /// The choice between kernels and libraries
    Libraries,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    let started = std::time::Instant::now();
    let read = [arguments.recipe.as_deref(), arguments.choices.expert_counts.as_deref()];
    keep_apart(&[("--output", Some(&arguments.output))], &read)?;
    let source = load::source(arguments.recipe.as_deref(), arguments.model.as_deref(), arguments.choices.synthetic)?;
    // What the lock file lies beside.
    let named = arguments.recipe.as_deref().unwrap_or(&arguments.output);
    let options = match (arguments.tune, arguments.choices.no_lock) {
        (Some(what), _) => tuned(arguments, &source, named, what)?,
        (None, true) => arguments.choices.options(),
        (None, false) => lock::apply(arguments.choices.options(), named)?,
    };
    if let Some(name) = &arguments.print_after
        && name != "all"
        && !passes::names().contains(&name.as_str())
    {
        return usage(format!("--print-after {name}: expected `all` or one of {}", passes::names().join(", ")));
    }
    let compiled = load::compile_for_checkpoint(&source, &options, &|options| match &arguments.print_after {
        None => compile_source(&source, options),
        Some(name) => compile(&source, options, &Printer { after: name, output: Mutex::new(()) }),
    })?;
    compiled.file.write(&arguments.output)?;
    print(report(&compiled))?;
    if !options.tactics.chosen.is_empty()
        && let Some(line) = lock::report(named, &compiled)
    {
        print(line + "\n")?;
    }
    let kernels = &compiled.kernels;
    if kernels.compiled + kernels.cached > 0 {
        print(format_args!(
            "{} kernels, {} of machine code: {} compiled by CUDA {}.{} in {:.2} s, {} from the cache\n",
            kernels.compiled + kernels.cached,
            size(kernels.bytes as u64),
            kernels.compiled,
            kernels.toolkit.0,
            kernels.toolkit.1,
            kernels.elapsed.as_secs_f64(),
            kernels.cached,
        ))?;
    }
    let bytes = std::fs::metadata(&arguments.output)?.len();
    print(format_args!(
        "{}: {} in {:.2} s, plan {}\n",
        arguments.output.display(),
        size(bytes),
        started.elapsed().as_secs_f64(),
        &compiled.file.hash()[..16],
    ))
}

/// Measures, writes the lock file, and gives the options with its choices.
fn tuned(arguments: &Arguments, source: &Source, named: &Path, what: Tune) -> Result<CompileOptions> {
    if arguments.choices.target == TargetChoice::Cpu {
        return usage("--tune: expected --target sm_90a or auto, found cpu, which has no choice among kernels");
    }
    let options = CompileOptions { target: Target::Sm90a, ..arguments.choices.options() };
    if options.pipeline_ranks > 1 {
        return usage(format!(
            "--tune: expected all layers on each rank, found --ranks pipeline={}; measure without that, kernels are the same",
            options.pipeline_ranks
        ));
    }
    if let Some(most) = load::most_alone(options.expert_ranks) {
        return usage(format!(
            "--tune: expected at most {most} ranks, of which one is measured by itself, found --ranks expert={}; measure with expert={most}",
            options.expert_ranks
        ));
    }
    if what == Tune::Libraries && arguments.choices.libraries.is_empty() {
        return usage(
            "--tune=libraries: expected libraries to measure, found none; name them with --libraries cublaslt",
        );
    }
    let path = lock::beside(named);
    if what == Tune::Libraries {
        if arguments.choices.no_lock {
            return usage(format!(
                "--tune=libraries: expected to measure beside the kernels that {} chooses, and to write to it, found --no-lock; leave \
                 that out, or measure everything with --tune",
                path.display()
            ));
        }
        // What the file says stays, but where a library is measured.
        let options = lock::apply(options, named)?;
        let earlier = Lock::read(&path)?.map(|lock| (&*path, lock));
        let mut tactics = options.tactics.clone();
        tune::libraries::measure(source, &options, arguments.model.as_deref(), earlier, &mut |lock| {
            tactics.overlay(lock.tactics());
            lock.write(&path)
        })?;
        return Ok(CompileOptions { tactics, ..options });
    }
    // A file that is no lock is told before anything is measured.
    let earlier = if arguments.choices.no_lock { None } else { Lock::read(&path)? };
    let (mut tactics, mut kept) = (Tactics::default(), 0);
    tune::measure(source, &options, arguments.model.as_deref(), &mut |mut lock| {
        kept = earlier.as_ref().map_or(0, |earlier| lock.keep(earlier));
        tactics = lock.tactics();
        lock.write(&path)
    })?;
    let (all, path) = (tactics.chosen.len(), path.display());
    print(format_args!("{path}: {all} problems, {kept} of them measured earlier\n\n"))?;
    Ok(CompileOptions { tactics, ..options })
}

struct Printer<'a> {
    after: &'a str,
    output: Mutex<()>,
}

impl Observer for Printer<'_> {
    fn pass(&self, bucket: Option<&str>, pass: &str, graph: &Graph) {
        if self.after == "all" || self.after == pass {
            let _alone = self.output.lock();
            note(format_args!("; after {pass}, {}\n{graph}", bucket.unwrap_or("all buckets")));
        }
    }
}

/// The table of passes for the smallest decode and the largest prefill bucket, and the table of buckets.
fn report(compiled: &Compiled) -> String {
    let mut text = String::new();
    let shown = representative(&compiled.buckets);
    for bucket in shown {
        let mut rows = vec![];
        for report in compiled.once.iter().chain(&bucket.passes) {
            rows.push(vec![
                report.name.to_owned(),
                report.rewrites.to_string(),
                report.ops_before.to_string(),
                report.ops_after.to_string(),
                // One operator is one step, wherever the pipeline ends.
                report.ops_after.to_string(),
            ]);
        }
        text += &table(&[&format!("pass ({})", bucket.name), "rewrites", "operators before", "after", "steps"], &rows);
        text += "\n";
    }
    let program = &compiled.file.manifest.ranks[0];
    let rows: Vec<Vec<String>> = program
        .buckets
        .iter()
        .map(|bucket| {
            vec![
                bucket.name.clone(),
                bucket.steps.len().to_string(),
                compiled.unfused_steps.to_string(),
                size(bucket.arena_bytes),
                size(bucket.arena_lower_bound),
            ]
        })
        .collect();
    text += &table(&["bucket", "steps", "unfused", "arena", "lower bound"], &rows);
    let pool = &program.pool;
    text += &format!("pool {}: {}\n", size(pool.bytes()), regions(pool));
    let ranks = inspect::ranks(&compiled.file.manifest);
    if !ranks.is_empty() {
        text += &format!("\n{}\n", ranks.trim_end());
    }
    if let Some(Balance { neighbours, placed, replicated }) = compiled.balance {
        let replicated = replicated.map(|replicated| format!(", {replicated:.3} with replicas")).unwrap_or_default();
        text += &format!(
            "rows of the busiest rank, layer by layer, as counted: {neighbours:.3} of the mean with neighbours together, {placed:.3} as placed{replicated}\n"
        );
    }
    text
}

/// The smallest decode bucket and the largest prefill bucket, as far as there are such.
fn representative(buckets: &[BucketReport]) -> Vec<&BucketReport> {
    let decode = buckets.iter().find(|bucket| bucket.name.starts_with("decode"));
    let prefill = buckets.iter().rev().find(|bucket| bucket.name.starts_with("prefill"));
    let chosen: Vec<&BucketReport> = decode.into_iter().chain(prefill).collect();
    if chosen.is_empty() { buckets.iter().take(1).collect() } else { chosen }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn libraries_are_measured_beside_a_lock_alone() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let [recipe, lock, plan] = ["demo.ron", "demo.lock.ron", "demo.plan"].map(|name| folder.path().join(name));
        std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/plans/synthetic.ron"), &recipe).expect("it can be copied");
        let known = Lock::shipped().and_then(|shipped| shipped.to_text()).expect("it is a lock");
        std::fs::write(&lock, &known).expect("it can be written");
        let [recipe, plan] = [&recipe, &plan].map(|path| path.to_str().expect("UTF-8"));
        let fixed = ["compile", recipe, "--target", "sm_90a", "--libraries", "cublaslt", "-o", plan];
        let line = Line::parse_from([&fixed[..], &["--tune=libraries", "--no-lock"]].concat());
        let error = execute(&line.arguments).expect_err("nothing to measure beside").to_string();
        assert!(error.contains("found --no-lock; leave that out") && error.contains("demo.lock.ron"), "{error}");
        assert_eq!(std::fs::read_to_string(&lock).expect("it is there"), known, "nothing was written");
    }
}
