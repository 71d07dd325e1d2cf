//! `lfm2c profile`: the steps of a bucket on the GPU, one by one.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::cli::inspect::Format;
use crate::cli::load::{self, Choices, find_bucket};
use crate::cli::measure::{self, Measuring, Opened, experts_cell, floor_heading, percent};
use crate::cli::output::{keep_apart, print};
use crate::cli::table::table;
use crate::plan::{Phase, Program};
use crate::runtime::cuda::Graphs;
use crate::runtime::cuda::measure::{
    Ceilings, Inputs, Profile, StepGroup, StepProfile, Transfer, chrome_trace, group, label, layer, profile,
};

/// Time each step of a bucket on the GPU, beside the least time that it could take.
///
/// Groups steps by what they do and by layer. Alone, a step's time begins when everything before it is done. In the captured
/// graph neighbours overlap: there a step's time is what it adds to the graph of all steps before it.
///
/// Of a plan whose experts are spread, the steps are those of rank 0 by itself, to which what it sends comes back.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan for a GPU, or a recipe (FILE.ron) or a graph (FILE.ir) to compile for one
    #[arg(value_name = "PLAN")]
    plan: PathBuf,
    /// The Hugging Face directory whose checkpoint gives the weights
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The bucket [default: the smallest decode bucket]
    #[arg(long, value_name = "NAME")]
    bucket: Option<String>,
    /// Writes a Chrome trace: open it in chrome://tracing or ui.perfetto.dev
    #[arg(long, value_name = "FILE.json")]
    trace: Option<PathBuf>,
    /// Lists every step
    #[arg(long)]
    all_steps: bool,
    #[command(flatten)]
    measuring: Measuring,
    /// How to print; json lists every step
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    choices: Choices,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    keep_apart(&[("--trace", arguments.trace.as_deref())], &[Some(&arguments.plan)])?;
    let options = arguments.measuring.options()?;
    let model = arguments.model.as_deref();
    let compiling = arguments.choices.options_for(&arguments.plan)?;
    let Opened { file, machine, _device } = measure::open(&arguments.plan, model, &compiling, load::experts_alone)?;
    let bucket = choose(&file.manifest.ranks[0], arguments.bucket.as_deref())?;
    let ceilings = arguments.measuring.ceilings(&machine);
    let mut executor = load::first_rank_alone(&file, model, Graphs::Required)?;
    let inputs = Inputs::prepare(&mut executor, bucket, &options)?;
    let profile = profile(&mut executor, bucket, &inputs, &options, &ceilings)?;
    if let Some(path) = &arguments.trace {
        let trace = serde_json::to_vec(&chrome_trace(&profile))?;
        std::fs::write(path, trace).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let (labels, layers) = (by_time(group(&profile.steps, label)), group(&profile.steps, layer));
    match arguments.format {
        Format::Text => {
            let mut text = measure::heading(&machine, &file.manifest, &ceilings);
            text += &group_table("steps", &labels, &ceilings);
            if arguments.all_steps {
                text += "\n";
                text += &step_table(&profile.steps, &ceilings);
            }
            text += "\n";
            text += &group_table("layer", &layers, &ceilings);
            print(text + "\n" + &summary(&profile))
        }
        Format::Json => print(format_args!(
            "{}\n",
            json!({
                "model": file.manifest.model.name,
                "plan_hash": file.hash(),
                "ranks": file.manifest.ranks.len(),
                "machine": machine,
                "ceilings": ceilings,
                "profile": profile,
                "by_label": labels,
                "by_layer": layers,
            })
        )),
    }
}

/// The bucket of that name; else the smallest decode bucket, or the first of a program without one.
fn choose(program: &Program, name: Option<&str>) -> Result<usize> {
    let names: Vec<&str> = program.buckets.iter().map(|bucket| bucket.name.as_str()).collect();
    match name {
        Some(name) => find_bucket(&names, name),
        None => Ok(program.buckets.iter().position(|bucket| bucket.phase == Phase::Decode).unwrap_or(0)),
    }
}

fn by_time(mut groups: Vec<StepGroup>) -> Vec<StepGroup> {
    groups.sort_by(|a, b| b.in_graph_us.total_cmp(&a.in_graph_us));
    groups
}

fn group_table(what: &str, groups: &[StepGroup], ceilings: &Ceilings) -> String {
    let floor = floor_heading(ceilings, "us");
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|group| {
            vec![
                group.label.clone(),
                group.count.to_string(),
                format!("{:.1}", group.us),
                format!("{:.1}", group.in_graph_us),
                percent(group.share),
                format!("{:.2}", group.work.bytes / 1e6),
                format!("{:.2}", group.work.flops / 1e6),
                format!("{:.1}", group.floor_us),
                percent(group.fraction),
            ]
        })
        .collect();
    table(&[what, "count", "alone, us", "in graph, us", "share", "MB", "Mflop", &floor, "of floor"], &rows)
}

fn step_table(steps: &[StepProfile], ceilings: &Ceilings) -> String {
    let floor = floor_heading(ceilings, "us");
    let header = [
        "step",
        "alone, us",
        "in graph, us",
        "MB",
        "Mflop",
        &*floor,
        "of floor",
        "grid",
        "block",
        "registers",
        "local",
        "shared",
        "blocks/SM",
        "kernel",
    ];
    let rows: Vec<Vec<String>> = steps
        .iter()
        .map(|step| {
            // A library does not say how it launches its kernels.
            let known = |text: String| if step.block == 0 { "-".to_owned() } else { text };
            vec![
                step.name.clone(),
                format!("{:.2}", step.us),
                format!("{:.2}", step.in_graph_us),
                format!("{:.3}", step.work.bytes / 1e6),
                format!("{:.3}", step.work.flops / 1e6),
                format!("{:.2}", step.floor_us),
                percent(step.fraction),
                known(step.grid.map(|n| n.to_string()).join("x")),
                known(step.block.to_string()),
                known(step.registers.to_string()),
                known(step.local.to_string()),
                known(step.shared.to_string()),
                known(step.blocks_per_multiprocessor.to_string()),
                step.kernel.clone(),
            ]
        })
        .collect();
    table(&header, &rows)
}

/// The bucket as a whole.
fn summary(profile: &Profile) -> String {
    let graph_us = 1e3 * profile.graph.median_ms;
    let experts = match &profile.experts {
        Some(experts) => format!(", distinct experts {}", experts_cell(Some(experts))),
        None => String::new(),
    };
    let difference = profile.graph_less_steps_us;
    let meaning = match difference < 0.0 {
        true => "less than the steps one after the other: saved by overlap and shorter gaps",
        false => "more than the steps one after the other: gaps between launches",
    };
    let transfers = match profile.transfer {
        Some(Transfer { bytes, us }) => format!(
            "transfers: {us:.1} us for the {bytes} bytes of a new batch, {} of its step; none while the rows stay the same\n",
            percent(us / (us + graph_us)),
        ),
        None => String::new(),
    };
    format!(
        "bucket {}: {} rows, {} positions behind each sequence{experts}\n\
         steps one after the other: {:.1} us in {}, of which a mark takes about {:.2} us each\n\
         graph: {graph_us:.1} us (p99 {:.1}), median of {} replays, {} of its floor of {:.1} us\n\
         the graph takes {:.1} us ({}) {meaning}\n{transfers}",
        profile.bucket,
        profile.rows,
        profile.context,
        profile.steps_us,
        profile.steps.len(),
        profile.mark_us,
        1e3 * profile.graph.p99_ms,
        profile.graph.runs,
        percent(profile.fraction),
        profile.floor_us,
        difference.abs(),
        percent(difference.abs() / graph_us),
    )
}
