//! `lfm2c bench --compare-fusion`: one source compiled with and without fusion.

use anyhow::Result;
use serde_json::json;

use crate::cli::bench::Arguments;
use crate::cli::inspect::Format;
use crate::cli::load::{self, compile_source, has_extension};
use crate::cli::measure;
use crate::cli::output::print;
use crate::cli::table::table;
use crate::cli::usage;
use crate::codegen::CompileOptions;
use crate::passes;
use crate::plan::{Phase, PlanFile};
use crate::runtime::cuda::measure::{
    Difference, Inputs, Options, Output, Variant, cpu_outputs, device_outputs, differences, measure_variant,
};
use crate::runtime::cuda::{CudaExecutor, Graphs};

/// The bucket that is compared: the first, because no more are compiled.
const BUCKET: usize = 0;

/// What was found out.
struct Comparison {
    variants: Vec<Variant>,
    /// What is compared, and how far each result is off.
    differences: Vec<(&'static str, Vec<Difference>)>,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    let options = arguments.measuring.options()?;
    let model = arguments.model.as_deref();
    if !measure::is_source(&arguments.input) {
        return usage(format!(
            "--compare-fusion: expected a recipe (FILE.ron) or a graph (FILE.ir) to compile several ways, found {}",
            arguments.input.display()
        ));
    }
    let (_device, machine) = measure::machine()?;
    let source = load::source(Some(&arguments.input), model, arguments.choices.synthetic)?;
    let fused = compile_options(arguments)?;
    let mut unfused = fused.clone();
    unfused.disabled.extend(passes::fusing().into_iter().map(str::to_owned));
    let unfused = compile_source(&source, &unfused)?.file;
    let fused = compile_source(&source, &fused)?.file;
    let found = compare(arguments, &options, &unfused, &fused)?;
    let bucket = &fused.manifest.ranks[0].buckets[BUCKET].name;
    match arguments.format {
        Format::Text => print(format_args!("{}\n{}", measure::machine_line(&machine), report(&found, bucket))),
        Format::Json => {
            let ratios: Vec<f64> = found.variants.iter().map(|variant| ratio(&found.variants[0], variant)).collect();
            let differences: serde_json::Map<String, serde_json::Value> =
                found.differences.iter().map(|(what, list)| ((*what).to_owned(), json!(list))).collect();
            print(format_args!(
                "{}\n",
                json!({
                    "model": fused.manifest.model.name,
                    "bucket": bucket,
                    "machine": machine,
                    "variants": found.variants,
                    "times_as_fast": ratios,
                    "differences": differences,
                })
            ))
        }
    }
}

/// One bucket of a recipe: the first size named, else one decode row. Prompts are fed by decode steps, so that no other is
/// compiled.
fn compile_options(arguments: &Arguments) -> Result<CompileOptions> {
    let mut options = arguments.choices.options_for(&arguments.input)?;
    if has_extension(&arguments.input, "ron") {
        let first = |sizes: &Option<Vec<u64>>| sizes.as_ref().and_then(|sizes| sizes.first().copied());
        (options.decode, options.prefill) = match (first(&options.decode), first(&options.prefill)) {
            (None, Some(rows)) => (Some(vec![]), Some(vec![rows])),
            (sequences, _) => (Some(vec![sequences.unwrap_or(1)]), Some(vec![])),
        };
    }
    Ok(options)
}

fn compare(arguments: &Arguments, options: &Options, unfused: &PlanFile, fused: &PlanFile) -> Result<Comparison> {
    let model = arguments.model.as_deref();
    let runs = options.steps;
    let (mut executor, inputs, plain_results) = start(arguments, options, unfused, Graphs::Off)?;
    let plain = measure_variant(&mut executor, BUCKET, &inputs, false, "unfused, launch by launch", runs)?;
    // Its pool makes room for the next.
    drop(executor);
    let (mut executor, inputs, results) = start(arguments, options, fused, Graphs::Required)?;
    let single = measure_variant(&mut executor, BUCKET, &inputs, false, "fused, launch by launch", runs)?;
    let graph = measure_variant(&mut executor, BUCKET, &inputs, true, "fused, as a graph", runs)?;
    drop(executor);
    let mut found = vec![("fused against unfused", differences(&plain_results, &results)?)];
    // A model on the CPU takes long, and `diff` compares its steps.
    if fused.manifest.ranks[0].buckets[BUCKET].phase == Phase::Fixed {
        let mut cpu = load::cpu_executor(fused, model)?;
        let expected = cpu_outputs(&mut cpu, BUCKET, options.seed, &results)?;
        found.push(("fused against the CPU", differences(&expected, &results)?));
        found.push(("unfused against the CPU", differences(&expected, &plain_results)?));
    }
    Ok(Comparison { variants: vec![plain, single, graph], differences: found })
}

/// An executor with the bucket's inputs, and what it makes of them.
fn start(
    arguments: &Arguments,
    options: &Options,
    file: &PlanFile,
    graphs: Graphs,
) -> Result<(CudaExecutor, Inputs, Vec<Output>)> {
    let mut executor = load::cuda_executor(file, arguments.model.as_deref(), graphs)?;
    let inputs = Inputs::prepare(&mut executor, BUCKET, options)?;
    let results = device_outputs(&mut executor, BUCKET, &inputs)?;
    Ok((executor, inputs, results))
}

/// How many times as fast as the first a variant is, by the host's clock.
fn ratio(first: &Variant, variant: &Variant) -> f64 {
    first.host.median_ms / variant.host.median_ms
}

fn report(found: &Comparison, bucket: &str) -> String {
    let variants: Vec<Vec<String>> = found
        .variants
        .iter()
        .map(|variant| {
            vec![
                variant.name.clone(),
                variant.kernels.to_string(),
                variant.launches.to_string(),
                format!("{:.4}", variant.host.median_ms),
                format!("{:.4}", variant.host.p99_ms),
                format!("{:.4}", variant.device.median_ms),
                format!("{:.2}", ratio(&found.variants[0], variant)),
            ]
        })
        .collect();
    let results: Vec<Vec<String>> = found
        .differences
        .iter()
        .flat_map(|(what, list)| {
            list.iter().map(move |found| {
                vec![format!("{} {what}", found.name), format!("{:.1e}", found.error), found.different.to_string()]
            })
        })
        .collect();
    let heading = format!("bucket {bucket}");
    let header = [&*heading, "kernels", "launches", "host, ms", "p99", "device, ms", "times as fast"];
    format!(
        "{}\nhost: from the first launch until the device is done, one run at a time; device: the same by its own clock\n\n{}",
        table(&header, &variants),
        table(&["result", "relative L2 error", "elements that differ"], &results),
    )
}
