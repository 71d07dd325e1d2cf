//! `lfm2c bench` on the ranks of `mpirun`: buckets of a plan that ranks run together, each rank with random rows of its own, all of
//! them in lockstep because all do the same.

use std::slice::from_ref;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use crate::cli::bench::{Arguments, select};
use crate::cli::device::Device;
use crate::cli::inspect::Format;
use crate::cli::output::print;
use crate::cli::table::table;
use crate::cli::world::World;
use crate::cli::{load, usage};
use crate::plan::PlanFile;
use crate::runtime::Executor;
use crate::runtime::cuda::measure::{Inputs, Options, measure_bucket, measure_machine};
use crate::runtime::cuda::{Graphs, check_device};
use crate::runtime::group::Group;

/// What one rank measured of a bucket.
#[derive(Clone, Copy, Serialize)]
struct Row {
    rank: usize,
    /// Rows of the rank.
    rows: f64,
    /// Mean of the layers' distinct experts of this rank.
    experts: f64,
    /// Between tokens by the host's clock, in milliseconds: median and 99th percentile.
    step_ms: f64,
    p99_ms: f64,
    /// From the end of one replay of the graph to the end of the next: median.
    graph_ms: f64,
    /// The rank's own bytes over the bandwidth of a copy on its device.
    floor_ms: f64,
}

/// A bucket on all ranks.
#[derive(Serialize)]
struct Measured {
    bucket: String,
    /// Rows of all ranks in the time of the rank that took longest.
    tokens_per_second: f64,
    ranks: Vec<Row>,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    let mut world = World::join()?;
    let result = on_ranks(arguments, &mut world);
    world.end(result)
}

fn on_ranks(arguments: &Arguments, world: &mut World) -> Result<()> {
    let options = arguments.measuring.options()?;
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.input, model, &arguments.plan_options()?)?;
    if arguments.has_blocks() {
        return usage("bench: --block and --compare-fusion: expected one process, found several; start one");
    }
    if file.manifest.ranks.len() == 1 {
        return usage(
            "bench: expected a plan that ranks run together, found a plan of one rank; compile it with --ranks, start one process, or add \
             --requests N",
        );
    }
    check_device(&file.manifest, None)?;
    let place = world.agree(from_ref(&file), Device::Cuda, arguments.ranks)?;
    let mut executor = load::executor_on_gpu(&file, model, &place, Graphs::Required)?;
    let machine = measure_machine(executor.gpu())?;
    let ceilings = arguments.measuring.ceilings(&machine);
    let groups = place.groups.context("ranks without groups; this is a bug")?;
    let mut all = groups(world.size())?;
    // Rows of all ranks differ.
    let options = Options { seed: options.seed.wrapping_add((all.rank() as u64) << 32), ..options };
    let mut found = vec![];
    for bucket in select(&file.manifest.ranks[0], &arguments.choices)? {
        let inputs = Inputs::prepare(&mut executor, bucket, &options)?;
        let report = measure_bucket(&mut executor, bucket, &inputs, &options, &ceilings)?;
        let row = Row {
            rank: all.rank(),
            rows: report.rows as f64,
            experts: report.experts.map_or(0.0, |experts| experts.mean),
            step_ms: report.host.median_ms,
            p99_ms: report.host.p99_ms,
            graph_ms: report.device.median_ms,
            floor_ms: report.floor_ms,
        };
        let ranks = gather(&mut *all, &row)?;
        let slowest = ranks.iter().map(|row| row.step_ms).fold(0.0, f64::max);
        let rows: f64 = ranks.iter().map(|row| row.rows).sum();
        found.push(Measured { bucket: report.name, tokens_per_second: rows / (slowest * 1e-3), ranks });
    }
    let (device, exchanges) = (executor.device(), executor.exchanges().unwrap_or_default());
    drop(executor);
    if !world.finish()? {
        return Ok(());
    }
    report(arguments.format, &file, (&device, &exchanges), &found)
}

/// What all ranks have, by number.
fn gather(all: &mut dyn Group, own: &Row) -> Result<Vec<Row>> {
    let sent = [own.rows, own.experts, own.step_ms, own.p99_ms, own.graph_ms, own.floor_ms];
    let mut received = vec![sent; all.size()];
    all.all_gather(bytemuck::cast_slice(&sent), bytemuck::cast_slice_mut(&mut received))?;
    let row = |(rank, numbers): (usize, [f64; 6])| {
        let [rows, experts, step_ms, p99_ms, graph_ms, floor_ms] = numbers;
        Row { rank, rows, experts, step_ms, p99_ms, graph_ms, floor_ms }
    };
    Ok(received.into_iter().enumerate().map(row).collect())
}

fn report(format: Format, file: &PlanFile, (device, exchanges): (&str, &str), found: &[Measured]) -> Result<()> {
    let (model, dtype) = (&file.manifest.model.name, file.manifest.dtype);
    if format == Format::Json {
        let hash = file.hash();
        return print(format_args!(
            "{}\n",
            json!({ "model": model, "plan_hash": hash, "dtype": dtype, "device": device, "exchanges": exchanges, "buckets": found })
        ));
    }
    let header = ["bucket", "rank", "rows", "experts", "step, ms", "p99", "graph, ms", "memory floor, ms", "tokens/s"];
    let cells: Vec<Vec<String>> = found
        .iter()
        .flat_map(|bucket| bucket.ranks.iter().map(move |row| (bucket, row)))
        .map(|(bucket, row)| {
            let first = |text: String| if row.rank == 0 { text } else { String::new() };
            vec![
                first(bucket.bucket.clone()),
                row.rank.to_string(),
                format!("{:.0}", row.rows),
                format!("{:.1}", row.experts),
                format!("{:.4}", row.step_ms),
                format!("{:.4}", row.p99_ms),
                format!("{:.4}", row.graph_ms),
                format!("{:.4}", row.floor_ms),
                first(format!("{:.0}", bucket.tokens_per_second)),
            ]
        })
        .collect();
    let ranks = found.first().map_or(0, |bucket| bucket.ranks.len());
    let text = format!("{model} in {dtype:?} on {ranks} ranks, {device} each, which exchange {exchanges}\n\n");
    print(
        text + &table(&header, &cells)
            + "\nstep: median by the host's clock, from a step's tokens to the next one's\ngraph: median on the device, from the end of one \
               replay to the end of the next\nexperts: mean of the layers' distinct ones of this rank\ntokens/s: of all ranks, by the one \
               whose steps take longest\n",
    )
}
