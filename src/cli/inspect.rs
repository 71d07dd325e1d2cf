//! `lfm2c inspect`: what is in a plan.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::cli::draw::memory_svg;
use crate::cli::load::{self, find_bucket};
use crate::cli::output::{keep_apart, print};
use crate::cli::table::{regions, size, table};
use crate::cuda;
use crate::plan::{Bucket, CollectiveKind, Manifest, Phase, PlanFile, Weight, WeightSource};
use crate::runtime::Executor;
use crate::runtime::cuda::{CudaExecutor, Graphs, check_device};

/// Show what is in a plan: model, pool, buckets, steps. Of a plan of several ranks, buckets and steps are those of rank 0.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// The plan file
    plan: PathBuf,
    /// Draws the arena of a bucket: offsets against steps
    #[arg(long, value_name = "FILE.svg")]
    memory: Option<PathBuf>,
    /// The bucket whose steps are listed, and which --memory draws [default for --memory: the largest prefill]
    #[arg(long, value_name = "NAME")]
    bucket: Option<String>,
    /// Prints the manifest itself, in RON
    #[arg(long, conflicts_with = "format")]
    manifest: bool,
    /// Captures every bucket on the GPU and shows time and bytes of each
    #[arg(long)]
    device: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// `--format`.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Tables.
    Text,
    /// One object.
    Json,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    keep_apart(&[("--memory", arguments.memory.as_deref())], &[Some(&arguments.plan)])?;
    let file = load::read_plan(&arguments.plan)?;
    if arguments.device {
        return on_device(&file);
    }
    let program = &file.manifest.ranks[0];
    let names: Vec<&str> = program.buckets.iter().map(|bucket| bucket.name.as_str()).collect();
    let chosen = arguments.bucket.as_deref().map(|name| find_bucket(&names, name)).transpose()?;
    if let Some(path) = &arguments.memory {
        let largest = program.buckets.iter().rposition(|bucket| bucket.phase == Phase::Prefill).unwrap_or(0);
        let drawing = memory_svg(program, chosen.unwrap_or(largest));
        std::fs::write(path, drawing).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if arguments.manifest {
        return print(file.manifest_text());
    }
    match arguments.format {
        Format::Text => {
            print(summary(&file.manifest, &file.hash()))?;
            if let Some(at) = chosen {
                print(format_args!("\n{}", steps(&file.manifest, &program.buckets[at])))?;
            }
        }
        Format::Json => {
            let mut object = serde_json::to_value(&file.manifest)?;
            let Some(fields) = object.as_object_mut() else { bail!("a manifest is an object") };
            fields.insert("plan_hash".into(), file.hash().into());
            fields.insert("pool_bytes".into(), program.pool.bytes().into());
            print(format_args!("{object}\n"))?;
        }
    }
    Ok(())
}

fn summary(manifest: &Manifest, hash: &str) -> String {
    let (model, limits, program) = (&manifest.model, &manifest.limits, &manifest.ranks[0]);
    let weights = match model.weights {
        WeightSource::Checkpoint => "from a checkpoint".to_owned(),
        WeightSource::Synthetic(seed) => format!("synthetic, seed {seed}"),
    };
    let pool = &program.pool;
    let mut text = format!(
        "plan {hash}, written by lfm2c {}\n\
         model {} ({}), configuration {}, weights {weights}\n\
         target {:?}, {:?}, {} rank(s)\n\
         limits {} sequences, context {}, {} KV positions in {} pages of {}, {} convolution columns\n\
         pool {}: {}\n\n",
        manifest.compiler,
        model.name,
        model.model_type,
        model.config_hash.get(..12).unwrap_or(&model.config_hash),
        manifest.target,
        manifest.dtype,
        manifest.ranks.len(),
        limits.max_sequences,
        limits.max_context,
        limits.kv_tokens,
        limits.pages(),
        limits.page_tokens,
        limits.ring_columns,
        size(pool.bytes()),
        regions(pool),
    );
    let waste = crate::runtime::buckets::padding(program);
    let rows: Vec<Vec<String>> = program
        .buckets
        .iter()
        .zip(&waste)
        .map(|(bucket, padding)| {
            vec![
                bucket.name.clone(),
                bucket.tokens.to_string(),
                bucket.sequences.to_string(),
                bucket.rows.to_string(),
                bucket.steps.len().to_string(),
                size(bucket.arena_bytes),
                size(bucket.arena_lower_bound),
                format!("{:.1} %", excess(bucket)),
                format!("{:.1} %", 100.0 * padding.mean),
                format!("{:.1} %", 100.0 * padding.worst),
            ]
        })
        .collect();
    if !program.packed.is_empty() {
        let weights = program.packed.iter().filter_map(|packed| program.weights.get(packed.weight as usize));
        let bytes = |of: fn(&Weight) -> Option<u64>| size(weights.clone().filter_map(of).sum());
        let (packed, raw) = (bytes(Weight::packed_bytes), bytes(|weight| weight.ty.bytes()));
        text += &format!("{} weights also packed: {packed} for {raw}\n\n", program.packed.len());
    }
    text += &ranks(manifest);
    text += &table(&["bucket", "T", "S", "R", "steps", "arena", "lower bound", "over", "mean padding", "worst"], &rows);
    text + "\narena: largest sum of live bytes is the lower bound; padding: share of rows unused, over the row counts that\n\
     a bucket is the smallest for\n"
}

/// What each rank has, and what it sends to others; empty for a plan of one rank.
pub fn ranks(manifest: &Manifest) -> String {
    if manifest.ranks.len() < 2 {
        return String::new();
    }
    let of_stage = manifest.stage_ranks();
    let list = |experts: Vec<&u64>| experts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let mut columns = vec!["rank", "layers", "experts", "of several ranks", "their weights", "all weights", "pool"];
    let rows = manifest.ranks.iter().enumerate().map(|(rank, program)| {
        let own = |weight: &&Weight| match manifest.stages.is_empty() {
            true => !weight.indices.is_empty(),
            false => weight.name.starts_with(LAYER),
        };
        let bytes: u64 = program.weights.iter().filter(own).filter_map(|weight| weight.ty.bytes()).sum();
        let layers =
            manifest.stages.get(rank / of_stage).map(|(first, end)| format!("{first} to {}", end.saturating_sub(1)));
        let experts = || manifest.experts.get(rank).into_iter().flatten();
        let stage = || manifest.experts.chunks(of_stage).nth(rank / of_stage).into_iter().flatten();
        let replicated = |expert: &&u64| stage().filter(|local| local.contains(expert)).count() > 1;
        let (all, shared) = (list(experts().collect()), list(experts().filter(replicated).collect()));
        let (weights, pool) = (size(program.pool.weights.bytes), size(program.pool.bytes()));
        vec![rank.to_string(), layers.unwrap_or_default(), all, shared, size(bytes), weights, pool]
    });
    let mut rows: Vec<Vec<String>> = rows.collect();
    // What no rank has, from the last of these columns on.
    for column in [3, 2, 1] {
        if rows.iter().all(|cells| cells[column].is_empty()) {
            columns.remove(column);
            rows.iter_mut().for_each(|cells| drop(cells.remove(column)));
        }
    }
    let mut text = table(&columns, &rows);
    text += "\n";
    text += &sent(manifest);
    text + "\n"
}

/// What weights of layers are called, as far as that is alike.
const LAYER: &str = "model.layers.";

/// What ranks send in each bucket: of spread experts, all of them the same; of spread layers, each to some.
fn sent(manifest: &Manifest) -> String {
    let shown = if manifest.stages.is_empty() { 1 } else { manifest.ranks.len() };
    let mut rows = vec![];
    for bucket in 0..manifest.ranks[0].buckets.len() {
        for (rank, program) in manifest.ranks.iter().enumerate().take(shown) {
            let bucket = &program.buckets[bucket];
            let bytes: u64 = bucket.steps.iter().map(|step| step.cost.link_bytes).sum();
            let kinds = bucket.steps.iter().filter_map(|step| Some(step.collective.as_ref()?.kind));
            let count = |is_it: fn(&CollectiveKind) -> bool| kinds.clone().filter(is_it).count().to_string();
            let together = count(|kind| kind.peer().is_none());
            let name = if rank == 0 { bucket.name.clone() } else { String::new() };
            rows.push(if shown == 1 {
                vec![name, together, size(bytes)]
            } else {
                let sends = count(|kind| matches!(kind, CollectiveKind::Send(_)));
                let receives = count(|kind| matches!(kind, CollectiveKind::Receive(_)));
                let mut cells = vec![name, rank.to_string(), sends, receives, size(bytes)];
                if !manifest.experts.is_empty() {
                    cells.insert(4, together);
                }
                cells
            });
        }
    }
    let mut columns = vec!["bucket", "rank", "sends", "receives", "sent by the rank"];
    if !manifest.experts.is_empty() {
        columns.insert(4, "within the stage");
    }
    match shown {
        1 => table(&["bucket", "collectives", "sent by each rank"], &rows),
        _ => table(&columns, &rows),
    }
}

/// How far the arena exceeds its lower bound, in percent.
fn excess(bucket: &Bucket) -> f64 {
    match bucket.arena_lower_bound {
        0 => 0.0,
        bound => 100.0 * (bucket.arena_bytes as f64 / bound as f64 - 1.0),
    }
}

fn steps(manifest: &Manifest, bucket: &Bucket) -> String {
    let semantics = &manifest.ranks[0].semantics;
    let rows: Vec<Vec<String>> = bucket
        .steps
        .iter()
        .enumerate()
        .map(|(i, step)| {
            let after: Vec<String> = step.after.iter().map(ToString::to_string).collect();
            let mut bytes = size(step.cost.bytes);
            if step.cost.bytes_per_expert > 0 {
                bytes += &format!(" + {}/expert", size(step.cost.bytes_per_expert));
            }
            if step.cost.bytes_per_position > 0 {
                bytes += &format!(" + {}/position", size(step.cost.bytes_per_position));
            }
            if step.cost.link_bytes > 0 {
                bytes += &format!(" + {} to other ranks", size(step.cost.link_bytes));
            }
            let operators = semantics[step.op as usize].body.len();
            let flops = format!("{:.3}", step.cost.flops as f64 / 1e6);
            let kernel = manifest.runner(step);
            let cells = [format!("{i} {}", step.name), operators.to_string(), bytes, flops, after.join(" ")];
            cells.into_iter().chain(kernel).collect()
        })
        .collect();
    let title = format!("step ({})", bucket.name);
    // A plan for the CPU has no launches.
    let columns = rows.first().map_or(0, Vec::len);
    table(&[title.as_str(), "operators", "bytes", "Mflop", "after", "kernel"][..columns.max(1)], &rows)
}

/// Captures every bucket on the first GPU and says what each took; weights are not loaded.
fn on_device(file: &PlanFile) -> Result<()> {
    load::one_rank(&file.manifest)?;
    check_device(&file.manifest, None)?;
    let device = cuda::Device::open(0)?;
    let started = std::time::Instant::now();
    let mut executor = CudaExecutor::new(file, 0, &device, Graphs::Required)?;
    let made = started.elapsed();
    executor.capture_all()?;
    let mut rows = vec![];
    for (i, bucket) in executor.program().buckets.iter().enumerate() {
        let Some(captured) = executor.captured(i) else { continue };
        rows.push(vec![
            bucket.name.clone(),
            bucket.steps.len().to_string(),
            captured.nodes().to_string(),
            format!("{:.2}", captured.elapsed.as_secs_f64() * 1e3),
            size(captured.bytes),
        ]);
    }
    let (major, minor) = device.driver;
    let planned = executor.program().pool.bytes();
    let measured = executor.measured_pool_bytes().unwrap_or(0);
    print(table(&["bucket", "steps", "graph nodes", "capture, ms", "memory"], &rows))?;
    print(format_args!(
        "{}, driver for CUDA {major}.{minor}: {} kernels loaded and {} allocated in {:.3} s, {} graphs captured in {:.3} s\n\
         pool: {planned} bytes planned, {measured} measured\n",
        device.name,
        executor.kernels(),
        size(planned),
        made.as_secs_f64(),
        rows.len(),
        (started.elapsed() - made).as_secs_f64(),
    ))
}
