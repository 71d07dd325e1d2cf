//! `lfm2c bench --requests`: many requests of mixed lengths, queue and refill included, on one rank and on more.

use std::fmt;
use std::slice::from_ref;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::json;

use crate::cli::bench::Arguments;
use crate::cli::device::Device;
use crate::cli::follow::Following;
use crate::cli::inspect::Format;
use crate::cli::load;
use crate::cli::output::{note, print};
use crate::cli::table::table;
use crate::cli::usage;
use crate::cli::world::World;
use crate::plan::{Manifest, PlanFile};
use crate::runtime::cuda::Graphs;
use crate::runtime::ranks::{Mode, Summary};
use crate::runtime::sampling::draw;
use crate::runtime::{All, Executor, Finished, Generator, Options, Request, SamplingParams};

/// Requests that every rank runs before the first that count.
const WARM: usize = 16;
/// Prompts and new tokens, where the command line does not say and the plan has room.
const PROMPT: Span = Span { least: 1, most: 512 };
const NEW: Span = Span { least: 1, most: 128 };

/// The options of requests.
#[derive(clap::Args, Clone, Debug)]
pub struct RequestArguments {
    /// Times so many requests of random tokens, from the first one's start to the last one's end, on 1, 2, 4, ... of the ranks that
    /// `mpirun` has started; on the CPU too
    #[arg(long = "requests", value_name = "N", conflicts_with_all = ["block", "compare_fusion", "prefill", "decode"])]
    pub count: Option<usize>,
    /// With --requests: tokens of a prompt, evenly distributed [default: 1-512, less where the plan has no room]
    #[arg(long, value_name = "LEAST-MOST", requires = "count")]
    prompt_tokens: Option<Span>,
    /// With --requests: new tokens, evenly distributed [default: 1-128, less where the plan has no room]
    #[arg(long, value_name = "LEAST-MOST", requires = "count")]
    new_tokens: Option<Span>,
}

/// Lengths: `1-512`, or `64` for one length.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
struct Span {
    least: usize,
    most: usize,
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        let (least, most) = text.split_once('-').unwrap_or((text, text));
        match (least.parse(), most.parse()) {
            (Ok(least), Ok(most)) if 1 <= least && least <= most => Ok(Span { least, most }),
            _ => Err(format!("expected LEAST-MOST, numbers from 1 on such as 1-512, found `{text}`")),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.least, self.most)
    }
}

impl Span {
    fn at_most(self, most: usize) -> Span {
        Span { least: self.least, most: self.most.min(most.max(self.least)) }
    }

    fn draw(self, seed: u64, at: u64) -> usize {
        self.least + draw(seed, at, (self.most - self.least + 1) as u64) as usize
    }
}

/// One number of ranks.
#[derive(Serialize)]
struct Row {
    ranks: usize,
    seconds: f64,
    requests_per_second: f64,
    prompt_tokens_per_second: f64,
    new_tokens_per_second: f64,
    /// Of the first row's rate.
    times: f64,
    /// Of what so many times its ranks would do.
    of_ideal: f64,
    /// Of the time, in which a step ran, on the rank where that is least.
    least_busy: f64,
    /// Requests with the tokens of the first row.
    same: usize,
}

/// Does it.
pub fn execute(arguments: &Arguments, count: usize) -> Result<()> {
    if count == 0 {
        return usage("--requests: expected at least 1, found 0");
    }
    arguments.measuring.options()?;
    let mut world = World::join()?;
    let result = on_ranks(arguments, count, &mut world);
    world.end(result)
}

fn on_ranks(arguments: &Arguments, count: usize, world: &mut World) -> Result<()> {
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.input, model, &arguments.choices.options_for(&arguments.input)?)?;
    let (device, ranks, graphs) = (Device::Auto, arguments.ranks, Graphs::Lazy);
    if world.follower().is_some() {
        return Following { plans: from_ref(&file), model, device, ranks, graphs, timed: true }.run(world);
    }
    let (prompts, new) = spans(&arguments.requests, &file.manifest)?;
    let (seed, sampling) = arguments.measuring.sampling();
    let requests = requests(count, (prompts, new), file.manifest.model.vocab, seed, sampling);
    let place = world.agree(from_ref(&file), device, ranks)?;
    world.load(0)?;
    let mut executor = load::prepared_executor(&file, model, place, graphs)?;
    world.wait_until_ready()?;
    let warm = requests.iter().take(WARM).cloned().collect();
    run(world, &mut *executor, warm, Mode::Copy)?;
    let (mut rows, mut expected): (Vec<Row>, Option<Vec<Finished>>) = (vec![], None);
    // Alone, all ranks of a plan are in this process.
    let (all, least) = match world.peers().len() {
        0 => (1, 1),
        all => (all, file.manifest.ranks.len()),
    };
    for ranks in counts(all, least) {
        let begun = Instant::now();
        let (found, summaries) = run(world, &mut *executor, requests.clone(), Mode::DealTo(ranks))?;
        let first = rows.first().zip(expected.as_deref());
        let row = row(ranks, begun.elapsed().as_secs_f64(), &requests, &found, &summaries, first);
        expected.get_or_insert(found);
        rows.push(row);
    }
    let device = executor.device();
    world.leave()?;
    report(arguments.format, &file, &device, &[("prompts", prompts), ("new", new)], seed, &requests, &rows)
}

/// What a request may be long.
fn spans(arguments: &RequestArguments, manifest: &Manifest) -> Result<(Span, Span)> {
    let context = manifest.limits.longest() as usize;
    let prompts = arguments.prompt_tokens.unwrap_or_else(|| PROMPT.at_most(context / 2));
    let new = arguments.new_tokens.unwrap_or_else(|| NEW.at_most(context.saturating_sub(prompts.most)));
    if prompts.most.saturating_add(new.most) > context {
        return usage(format!(
            "--prompt-tokens and --new-tokens: expected at most {context} together, the plan's --max-context or --kv-tokens, whichever is \
             less, found {} and {}; shorten them, or compile with larger ones",
            prompts.most, new.most
        ));
    }
    Ok((prompts, new))
}

fn requests(
    count: usize,
    (prompts, new): (Span, Span),
    vocab: u64,
    seed: u64,
    sampling: SamplingParams,
) -> Vec<Request> {
    let mut drawn = 0;
    let mut next = || {
        drawn += 1;
        drawn
    };
    (0..count as u64)
        .map(|id| {
            let (length, max_new_tokens) = (prompts.draw(seed, next()), new.draw(seed, next()));
            let prompt = (0..length).map(|_| draw(seed, next(), vocab) as u32).collect();
            let sampling = SamplingParams { seed: seed.wrapping_add(id), ..sampling };
            Request { id, prompt, max_new_tokens, eos: vec![], sampling, session: None }
        })
        .collect()
}

/// Runs them on so many ranks; what became of each, and what each rank did.
fn run(
    world: &mut World,
    executor: &mut dyn Executor,
    requests: Vec<Request>,
    mode: Mode,
) -> Result<(Vec<Finished>, Vec<Summary>)> {
    let mut generator = Generator::new(executor, Options::default())?;
    let mut all = All::new(requests, |_, _| std::ops::ControlFlow::Continue(()));
    let mut summaries = world.run(&mut generator, &mut all, Options::default(), mode)?;
    let found = all.results()?.into_iter().collect::<Result<Vec<Finished>, _>>()?;
    if summaries.is_empty() {
        summaries.push(Summary { sequences: found.len() as u64, statistics: generator.statistics().clone() });
    }
    Ok((found, summaries))
}

/// The least number of ranks, twice as many and so on, and all.
fn counts(all: usize, least: usize) -> Vec<usize> {
    let mut list: Vec<usize> = std::iter::successors(Some(least), |n| Some(2 * n)).take_while(|&n| n < all).collect();
    list.push(all);
    list
}

fn row(
    ranks: usize,
    seconds: f64,
    requests: &[Request],
    found: &[Finished],
    summaries: &[Summary],
    first: Option<(&Row, &[Finished])>,
) -> Row {
    let rate = |number: usize| number as f64 / seconds;
    let new_tokens_per_second = rate(found.iter().map(|finished| finished.tokens.len()).sum());
    let (one, of) = first.map_or((new_tokens_per_second, ranks), |(row, _)| (row.new_tokens_per_second, row.ranks));
    let times = new_tokens_per_second / one;
    let busy = summaries.iter().take(ranks).map(|summary| summary.busy_seconds() / seconds);
    let same = first.map_or(found.len(), |(_, expected)| {
        expected.iter().zip(found).filter(|(expected, found)| expected.tokens == found.tokens).count()
    });
    Row {
        ranks,
        seconds,
        requests_per_second: rate(found.len()),
        prompt_tokens_per_second: rate(requests.iter().map(|request| request.prompt.len()).sum()),
        new_tokens_per_second,
        times,
        of_ideal: times * of as f64 / ranks as f64,
        least_busy: busy.fold(1.0, f64::min),
        same,
    }
}

fn report(
    format: Format,
    file: &PlanFile,
    device: &str,
    spans: &[(&str, Span)],
    seed: u64,
    requests: &[Request],
    rows: &[Row],
) -> Result<()> {
    let manifest = &file.manifest;
    let tokens = [
        requests.iter().map(|request| request.prompt.len()).sum::<usize>(),
        requests.iter().map(|request| request.max_new_tokens).sum(),
    ];
    if format == Format::Json {
        let (model, dtype, plan_hash) = (&manifest.model.name, manifest.dtype, file.hash());
        return print(format_args!(
            "{}\n",
            json!({
                "model": model, "plan_hash": plan_hash, "dtype": dtype, "device": device, "requests": requests.len(), "seed": seed,
                "prompt_tokens": tokens[0], "new_tokens": tokens[1], "rows": rows,
            })
        ));
    }
    let lengths = spans.iter().zip(tokens).map(|((what, span), sum)| format!("{what} of {span} tokens ({sum})"));
    let mut text = format!(
        "{} in {:?} on {device}: {} requests, {}, seed {seed}\n\n",
        manifest.model.name,
        manifest.dtype,
        requests.len(),
        lengths.collect::<Vec<_>>().join(", "),
    );
    let header = [
        "ranks",
        "seconds",
        "requests/s",
        "prompt tokens/s",
        "new tokens/s",
        "times",
        "of ideal",
        "least busy",
        "same tokens",
    ];
    let cells = rows.iter().map(|row| {
        vec![
            row.ranks.to_string(),
            format!("{:.3}", row.seconds),
            format!("{:.1}", row.requests_per_second),
            format!("{:.0}", row.prompt_tokens_per_second),
            format!("{:.0}", row.new_tokens_per_second),
            format!("{:.2}", row.times),
            format!("{:.1} %", 100.0 * row.of_ideal),
            format!("{:.1} %", 100.0 * row.least_busy),
            row.same.to_string(),
        ]
    });
    text += &table(&header, &cells.collect::<Vec<_>>());
    print(text)?;
    match rows.iter().all(|row| row.same == requests.len()) {
        true => Ok(()),
        false if !Device::Auto.is_cuda(manifest) => {
            bail!(
                "expected the same tokens from every number of ranks, as always on the CPU, found others; this is a bug"
            )
        }
        // Other neighbours bring other buckets, and these other kernels.
        false => {
            note(
                "tokens differ where the best two logits were a rounding apart: buckets of other sizes round in other places",
            );
            Ok(())
        }
    }
}
