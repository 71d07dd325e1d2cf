//! `lfm2c bench`: how long buckets take on the GPU, beside the least that they could.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde_json::json;

use crate::cli::bench_requests::RequestArguments;
use crate::cli::device::RankArguments;
use crate::cli::inspect::Format;
use crate::cli::load::{self, Choices, has_extension};
use crate::cli::measure::{self, Measuring, Opened, experts_cell, floor_heading, percent};
use crate::cli::output::{note, print};
use crate::cli::table::table;
use crate::cli::usage;
use crate::cli::{bench_fusion, bench_ranks, bench_requests};
use crate::codegen::CompileOptions;
use crate::plan::{Phase, Program};
use crate::runtime::cuda::Graphs;
use crate::runtime::cuda::measure::{
    Block, BlockReport, BucketReport, Ceilings, Distinct, Inputs, measure_block, measure_bucket,
};
use crate::runtime::ranks;

/// Rows of the prefill bucket that fills the state where only decode buckets are asked for.
const FILL_ROWS: u64 = 512;

/// Measure buckets on the GPU, beside the least time that they could take, or whole requests on all ranks.
///
/// Under `mpirun`, buckets of a plan that ranks run together are measured on all of them at a time.
///
/// With a recipe, --decode and --prefill say what is compiled and measured; with a plan, which of its buckets are; naming
/// sizes of one kind leaves out the other. Inputs are random. Ceilings are measured in the same run. Fails if rows route so
/// much alike that the figures say little.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan for a GPU, or a recipe (FILE.ron) or a graph (FILE.ir) to compile for one
    #[arg(value_name = "PLAN|RECIPE.ron|GRAPH.ir")]
    pub input: PathBuf,
    /// The Hugging Face directory whose checkpoint gives the weights
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Only the steps of these blocks, each kind as a graph of its own; of a plan whose experts are spread, those of rank 0 by itself
    #[arg(long, value_enum, value_delimiter = ',', conflicts_with = "compare_fusion")]
    block: Vec<BlockChoice>,
    /// Compiles a recipe's smallest bucket, or a graph, without fusion and with it, and compares times and results
    #[arg(long)]
    compare_fusion: bool,
    #[command(flatten)]
    pub ranks: RankArguments,
    #[command(flatten)]
    pub requests: RequestArguments,
    #[command(flatten)]
    pub measuring: Measuring,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    #[command(flatten)]
    pub choices: Choices,
}

/// `--block`.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum BlockChoice {
    /// Mixers that convolve.
    Conv,
    /// Mixers that attend.
    Attn,
    /// Feed-forward with experts.
    Moe,
    /// Products of rows with one matrix, of all layers.
    Dense,
}

impl BlockChoice {
    fn block(self) -> Block {
        match self {
            BlockChoice::Conv => Block::Conv,
            BlockChoice::Attn => Block::Attention,
            BlockChoice::Moe => Block::Experts,
            BlockChoice::Dense => Block::Dense,
        }
    }
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    if let Some(count) = arguments.requests.count {
        return bench_requests::execute(arguments, count);
    }
    if ranks::launched().is_some() {
        return bench_ranks::execute(arguments);
    }
    let options = arguments.measuring.options()?;
    if arguments.compare_fusion {
        return bench_fusion::execute(arguments);
    }
    let model = arguments.model.as_deref();
    // A whole step of several ranks takes what all of them take together.
    let ranks = if arguments.block.is_empty() { load::one_rank } else { load::experts_alone };
    let Opened { file, machine, _device } = measure::open(&arguments.input, model, &arguments.plan_options()?, ranks)?;
    let buckets = select(&file.manifest.ranks[0], &arguments.choices)?;
    let ceilings = arguments.measuring.ceilings(&machine);
    let mut executor = load::first_rank_alone(&file, model, Graphs::Required)?;
    let (mut reports, mut blocks): (Vec<BucketReport>, Vec<BlockReport>) = (vec![], vec![]);
    for bucket in buckets {
        let inputs = Inputs::prepare(&mut executor, bucket, &options)?;
        if arguments.block.is_empty() {
            reports.push(measure_bucket(&mut executor, bucket, &inputs, &options, &ceilings)?);
        }
        for block in &arguments.block {
            blocks.push(measure_block(&mut executor, bucket, block.block(), &inputs, &options, &ceilings)?);
        }
    }
    match arguments.format {
        Format::Text => {
            let mut text = measure::heading(&machine, &file.manifest, &ceilings);
            if arguments.block.is_empty() {
                text += &bucket_table(&reports, &ceilings);
            } else {
                text += &block_table(&blocks, &ceilings);
            }
            print(text)?;
        }
        Format::Json => print(format_args!(
            "{}\n",
            json!({
                "model": file.manifest.model.name,
                "plan_hash": file.hash(),
                "dtype": file.manifest.dtype,
                "ranks": file.manifest.ranks.len(),
                "machine": machine,
                "ceilings": ceilings,
                "buckets": reports,
                "blocks": blocks,
            })
        ))?,
    }
    // By itself a rank has its own rows several times, which share experts anyway.
    let repeated = file.manifest.ranks.len() > 1;
    for report in blocks.iter().filter(|report| !repeated && report.experts.is_some_and(|found| found.is_degenerate()))
    {
        note(format_args!(
            "bucket {}: the blocks' random activations route much alike; so their rows share experts",
            report.bucket
        ));
    }
    let degenerate = reports.iter().filter_map(|report| Some((&report.name, report.experts?)));
    let faults: Vec<String> =
        degenerate.filter(|(_, found)| found.is_degenerate()).map(|(name, found)| fault(name, &found)).collect();
    if !faults.is_empty() {
        bail!(
            "the inputs are degenerate, so the figures are too good: {}; try another --seed, or --temperature 1 where decode \
             repeats one token",
            faults.join("; ")
        );
    }
    Ok(())
}

fn fault(name: &str, found: &Distinct) -> String {
    format!(
        "bucket {name}: expected a mean of {:.2} distinct experts over {} layers (deviation {:.2}), found {:.2}",
        found.uniform, found.layers, found.deviation, found.mean
    )
}

impl Arguments {
    /// What to compile of a source. For a plan, sizes only choose among its buckets.
    pub fn plan_options(&self) -> Result<CompileOptions> {
        let choices = &self.choices;
        if !measure::is_source(&self.input) {
            return Ok(Choices { decode: None, prefill: None, ..choices.clone() }.options());
        }
        let mut options = choices.options_for(&self.input)?;
        if has_extension(&self.input, "ron") {
            match (&choices.decode, &choices.prefill) {
                (Some(_), None) => options.prefill = Some(vec![FILL_ROWS]),
                (None, Some(_)) => options.decode = Some(vec![]),
                _ => {}
            }
        }
        Ok(options)
    }

    /// Whether parts of buckets are asked for.
    pub fn has_blocks(&self) -> bool {
        self.compare_fusion || !self.block.is_empty()
    }
}

/// The buckets that are measured: those of the sizes named, or all where none is.
pub fn select(program: &Program, choices: &Choices) -> Result<Vec<usize>> {
    let buckets = || program.buckets.iter().enumerate();
    if choices.decode.is_none() && choices.prefill.is_none() || buckets().all(|(_, at)| at.phase == Phase::Fixed) {
        return Ok(buckets().map(|(i, _)| i).collect());
    }
    let mut selected = vec![];
    for (phase, option, sizes) in
        [(Phase::Decode, "--decode", &choices.decode), (Phase::Prefill, "--prefill", &choices.prefill)]
    {
        for &size in sizes.iter().flatten() {
            let found = buckets().find(|(_, at)| at.phase == phase && at.tokens == size);
            let Some((i, _)) = found else {
                let of_phase = buckets().filter(|(_, at)| at.phase == phase);
                let sizes: Vec<String> = of_phase.map(|(_, at)| at.tokens.to_string()).collect();
                return usage(format!("{option} {size}: expected sizes of the plan's buckets: {}", sizes.join(", ")));
            };
            if !selected.contains(&i) {
                selected.push(i);
            }
        }
    }
    Ok(selected)
}

fn bucket_table(reports: &[BucketReport], ceilings: &Ceilings) -> String {
    let floor = floor_heading(ceilings, "ms");
    let header = [
        "bucket",
        "rows",
        "behind",
        "launches",
        "experts",
        "tokens/s",
        "step, ms",
        "p99",
        "graph, ms",
        &floor,
        "of step",
        "of graph",
    ];
    let rows: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            vec![
                report.name.clone(),
                report.rows.to_string(),
                format!("{:.0}", report.context),
                report.launches.to_string(),
                experts_cell(report.experts.as_ref()),
                format!("{:.0}", report.tokens_per_second),
                format!("{:.4}", report.host.median_ms),
                format!("{:.4}", report.host.p99_ms),
                format!("{:.4}", report.device.median_ms),
                format!("{:.4}", report.floor_ms),
                percent(report.fraction),
                percent(report.device_fraction),
            ]
        })
        .collect();
    table(&header, &rows)
        + "\nstep: median by the host's clock; in decode from a step's tokens to the next one's, with steps in flight; else from the \
           call to the result\ngraph: median on the device, from the end of one replay to the end of the next\nexperts: mean of the \
           layers' distinct ones (fewest, mean of uniform routing)\n"
}

fn block_table(reports: &[BlockReport], ceilings: &Ceilings) -> String {
    let floor = floor_heading(ceilings, "ms");
    let header = [
        "bucket",
        "block",
        "layers",
        "launches",
        "experts",
        "ms",
        "a layer, us",
        "GB",
        "Gflop",
        "TFLOP/s",
        &floor,
        "of floor",
    ];
    let rows: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            vec![
                report.bucket.clone(),
                format!("{:?}", report.block).to_lowercase(),
                report.layers.to_string(),
                report.launches.to_string(),
                experts_cell(report.experts.as_ref()),
                format!("{:.4}", report.device.median_ms),
                format!("{:.2}", 1e3 * report.layer_ms),
                format!("{:.3}", report.work.bytes / 1e9),
                format!("{:.3}", report.work.flops / 1e9),
                format!("{:.1}", report.tflops),
                format!("{:.4}", report.floor_ms),
                percent(report.fraction),
            ]
        })
        .collect();
    let stages: Vec<Vec<String>> = reports
        .iter()
        .flat_map(|report| report.stages.iter().map(move |stage| (report, stage)))
        .map(|(report, stage)| {
            vec![
                report.bucket.clone(),
                stage.name.clone(),
                stage.steps.to_string(),
                format!("{:.4}", stage.added_ms),
                format!("{:.2}", 1e3 * stage.added_ms / stage.steps as f64),
                format!("{:.3}", stage.work.bytes / 1e9),
                format!("{:.3}", stage.work.flops / 1e9),
                stage.tflops.map_or_else(|| "-".into(), |tflops| format!("{tflops:.1}")),
                format!("{:.4}", stage.floor_ms),
                stage.kernels.join(", "),
            ]
        })
        .collect();
    let of_stages = ["bucket", "step", "steps", "adds, ms", "each, us", "GB", "Gflop", "TFLOP/s", &floor, "kernel"];
    table(&header, &rows)
        + "\n"
        + &table(&of_stages, &stages)
        + "\nms: all layers' blocks as one graph, over random activations, from the end of one replay to the end of the next\n\
           adds: to the graph of the steps before it of all layers; dense products, the time of their own graph\n\
           experts: mean of the layers' distinct ones (fewest, mean of uniform routing)\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::{Recipe, Source, compile};

    #[test]
    fn sizes_name_buckets_of_a_plan() {
        let recipe = Recipe::parse(include_str!("../../plans/synthetic.ron")).expect("the recipe is valid");
        let options = CompileOptions { prefill: Some(vec![16]), decode: Some(vec![1, 4]), ..CompileOptions::default() };
        let compiled = compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles");
        let program = &compiled.file.manifest.ranks[0];
        let names = |decode: Option<Vec<u64>>, prefill: Option<Vec<u64>>| -> Result<Vec<&str>> {
            let selected = select(program, &Choices { decode, prefill, ..Choices::default() })?;
            Ok(selected.into_iter().map(|i| program.buckets[i].name.as_str()).collect())
        };
        assert_eq!(names(None, None).expect("all"), ["prefill_16", "decode_1", "decode_4"]);
        assert_eq!(names(Some(vec![4, 4, 1]), None).expect("there are both"), ["decode_4", "decode_1"]);
        assert_eq!(names(Some(vec![1]), Some(vec![16])).expect("there are both"), ["decode_1", "prefill_16"]);
        let error = names(None, Some(vec![512])).expect_err("no such bucket").to_string();
        assert!(error.contains("--prefill 512") && error.contains("16"), "{error}");
    }
}
