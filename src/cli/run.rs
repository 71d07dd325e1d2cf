//! `lfm2c run`: a plan with inputs.

mod batch;
mod batch_arguments;
mod evaluate;
mod line;
mod lines;
mod print;
mod prompt;
mod results;

use std::path::{Path, PathBuf};
use std::slice::from_ref;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use self::batch_arguments::BatchArguments;
pub use self::evaluate::write_answers;
use self::print::Texts;
use self::prompt::{PromptArguments, Prompts};
pub use self::results::Ordered;
use crate::cli::device::{Device, RankArguments};
use crate::cli::follow::Following;
use crate::cli::load::{self, Choices, has_extension};
use crate::cli::output::{keep_apart, note};
use crate::cli::sampling::Sampling;
use crate::cli::table::{regions, size};
use crate::cli::world::{World, rank_table};
use crate::cli::{text, usage};
use crate::plan::{ExpertCounts, PlanFile};
use crate::runtime::cuda::Graphs;
use crate::runtime::ranks::{Mode, Peer, Summary};
use crate::runtime::{All, Executor, Finished, Generator, Options, Request, SamplingParams, Statistics, logits_table};

/// Run a plan, or compile a recipe in memory and run that.
///
/// Generates new tokens for each prompt; without any input, for the recipe's own prompt. A prompt given as text is answered
/// in text, as it is made; one given as token ids, in token ids. What ran goes to standard error.
///
/// A prompt is text with --prompt, which needs the tokenizer.json of --model DIR or of the recipe's directory. Its tokens are
/// those that the tokenizer makes, with its beginning-of-sequence token, once; --chat puts the text into the model's chat
/// template instead, and --raw adds nothing. A sequence ends at a stop token, which generation_config.json names or else the
/// plan; at a --stop text; or after --max-new-tokens, of which there may be none. Prompt and new tokens together must fit the
/// plan's max-context: a request that does not fit is refused before it runs, never cut. So is a prompt without tokens, which
/// an empty text is only with --raw, or where the tokenizer adds no token.
///
/// Under `mpirun`, in a build with the feature `mpi`, every rank holds the model and rank 0 deals the requests; results are
/// those of one process.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan, or a recipe (FILE.ron) to compile in memory
    #[arg(value_name = "PLAN|RECIPE.ron")]
    input_plan: PathBuf,
    /// The Hugging Face directory whose checkpoint gives the weights
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// What to run on
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    #[command(flatten)]
    ranks: RankArguments,
    /// Fails rather than run without CUDA graphs
    #[arg(long)]
    require_graphs: bool,
    /// Token ids of a prompt, such as 5,17,3; repeat it for a batch
    #[arg(long, value_name = "IDS", conflicts_with = "input")]
    tokens: Vec<String>,
    #[command(flatten)]
    text: PromptArguments,
    #[command(flatten)]
    batch: BatchArguments,
    /// New tokens of each sequence, at the most
    #[arg(long, value_name = "N", default_value_t = 32)]
    max_new_tokens: usize,
    /// Goes on after an end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// Rows of a prompt in one step, at the most
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    #[command(flatten)]
    sampling: Sampling,
    /// Writes the logits of every position of a single prompt, float32 [prompt length, vocab]
    #[arg(long, value_name = "FILE.npy")]
    prompt_logits: Option<PathBuf>,
    /// Writes the logits that each new token was chosen from, float32 [sequences, max-new-tokens, vocab]; NaN after a sequence has ended, and for one that could not run
    #[arg(long, value_name = "FILE.npy")]
    logits: Option<PathBuf>,
    /// Writes how often each expert was chosen, layer by layer, for `lfm2c compile` to spread experts by; on the CPU, in one process
    #[arg(long, value_name = "FILE")]
    count_experts: Option<PathBuf>,
    /// How to print; json is one object, and a line for each sequence with --input [default: text; json lines with --input]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// With a recipe: choices of `lfm2c compile`
    #[command(flatten)]
    choices: Choices,
}

/// `--format`.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// New text; where the prompt is token ids, new token ids, a line for each sequence.
    Text,
    /// JSON.
    Json,
}

/// What a run did, on all ranks together, for reports.
struct Timing {
    ready_seconds: f64,
    generate_seconds: f64,
    statistics: Statistics,
    /// What each rank did, if there are several.
    ranks: Vec<Summary>,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    check_options(arguments)?;
    let sampling = arguments.sampling.params()?;
    if is_samples(arguments)
        && let (Some(option), Some(input)) = (arguments.text.given(), &arguments.batch.input)
    {
        return usage(format!("{option}: expected text, found {}, which holds token ids", input.display()));
    }
    if arguments.count_experts.is_some() {
        World::refuse("run --count-experts")?;
    }
    let mut world = World::join()?;
    let result = match &arguments.batch.input {
        _ if world.follower().is_some() => follow(arguments, &mut world),
        input => check_files(arguments).and_then(|()| match input {
            Some(input) if is_samples(arguments) => evaluate::execute(arguments, input, &mut world),
            Some(input) => batch::execute(arguments, sampling, input, started, &mut world),
            None => prompts(arguments, sampling, started, &mut world),
        }),
    };
    world.end(result)
}

/// What ranks other than 0 do.
fn follow(arguments: &Arguments, world: &mut World) -> Result<()> {
    let (plans, graphs) = (plans(arguments)?, arguments.graphs());
    let (model, device, ranks) = (arguments.model.as_deref(), arguments.device, arguments.ranks);
    Following { plans: &plans, model, device, ranks, graphs, timed: is_samples(arguments) }.run(world)
}

/// Whether the input is one of samples.
fn is_samples(arguments: &Arguments) -> bool {
    arguments.batch.input.as_ref().is_some_and(|input| has_extension(input, "bin"))
}

/// The plan, and that of `--compare`.
fn plans(arguments: &Arguments) -> Result<Vec<PlanFile>> {
    let options = arguments.choices.options_for(&arguments.input_plan)?;
    let paths = [&arguments.input_plan].into_iter().chain(&arguments.batch.compare);
    paths.map(|path| load::plan(path, arguments.model.as_deref(), &options)).collect()
}

/// Runs the prompts that the command line has, or the recipe's own.
fn prompts(arguments: &Arguments, sampling: SamplingParams, started: Instant, world: &mut World) -> Result<()> {
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.input_plan, model, &arguments.choices.options_for(&arguments.input_plan)?)?;
    let place = world.agree(from_ref(&file), arguments.device, arguments.ranks)?;
    let prompts = arguments.text.prompts(&arguments.tokens, &file, model)?;
    let count = prompts.tokens.len();
    if arguments.prompt_logits.is_some() && count != 1 {
        return usage(format!("--prompt-logits: expected a single prompt, found {count}"));
    }
    world.load(0)?;
    let mut executor = load::executor(&file, model, place, arguments.graphs())?;
    counts(arguments, &*executor)?;
    world.wait_until_ready()?;
    let ready_seconds = started.elapsed().as_secs_f64();
    let begun = Instant::now();
    let mut generator = Generator::new(&mut *executor, arguments.generating())?;
    let requests = requests(arguments, sampling, &prompts, &file);
    let format = arguments.format.unwrap_or(Format::Text);
    let live = prompts.text && count == 1 && format == Format::Text;
    let mut texts = Texts::new(prompts.rules.as_ref(), count, &arguments.text.stop, live);
    let stops = if prompts.rules.is_some() { &arguments.text.stop[..] } else { &[] };
    let mut all = All::new(requests, |id, token| texts.token(id, token)).stopping_at(stops);
    let ranks = world.run(&mut generator, &mut all, arguments.generating(), Mode::Deal)?;
    let finished = all.results()?;
    let peers = world.peers().to_vec();
    world.leave()?;
    let timing = Timing::new(ready_seconds, begun, generator.statistics(), ranks);
    let results: Vec<std::result::Result<Finished, String>> =
        finished.into_iter().map(|result| result.map_err(|e| e.to_string())).collect();
    write_logits(arguments, &results, executor.manifest().model.vocab)?;
    write_counts(arguments, &*executor)?;
    let ran = results.iter().any(std::result::Result::is_ok);
    let texts = if ran { texts.finish()? } else { vec![] };
    match format {
        Format::Json => print::object(&results, &texts, &timing)?,
        Format::Text if live => {}
        Format::Text if prompts.text => print::texts(&results, &texts)?,
        Format::Text => print::tokens(&results)?,
    }
    summary(&file, &timing, &peers, &*executor);
    let failed: Vec<&String> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    match failed[..] {
        [] => Ok(()),
        [only] if results.len() == 1 => bail!("{only}"),
        _ => {
            for fault in &failed {
                note(format_args!("lfm2c: {fault}"));
            }
            bail!("{} of {} sequences could not run", failed.len(), results.len())
        }
    }
}

impl Timing {
    /// Of a run that has just ended. The statistics are this process's, if there are no ranks.
    fn new(ready_seconds: f64, begun: Instant, statistics: &Statistics, ranks: Vec<Summary>) -> Timing {
        let mut statistics = statistics.clone();
        // The first of the ranks is this process.
        ranks.iter().skip(1).for_each(|rank| statistics.merge(&rank.statistics));
        Timing { ready_seconds, generate_seconds: begun.elapsed().as_secs_f64(), statistics, ranks }
    }

    /// New tokens a second of all ranks, if there are several.
    fn tokens_per_second(&self) -> Option<f64> {
        let tokens = self.statistics.tokens as f64;
        (!self.ranks.is_empty() && self.generate_seconds > 0.0).then(|| tokens / self.generate_seconds)
    }
}

impl Arguments {
    /// What the generator does besides.
    fn generating(&self) -> Options {
        Options {
            chunk: self.chunk,
            capture_logits: self.logits.is_some(),
            capture_prompt_logits: self.prompt_logits.is_some(),
        }
    }

    fn graphs(&self) -> Graphs {
        if self.require_graphs { Graphs::Required } else { Graphs::Lazy }
    }
}

/// Refuses numbers that no plan could use.
fn check_options(arguments: &Arguments) -> Result<()> {
    arguments.text.check()?;
    if arguments.chunk == Some(0) {
        return usage("--chunk: expected at least 1 row, found 0; leave it out to run prompts whole");
    }
    let batch = &arguments.batch;
    // Other options that exclude --input would excuse these from it.
    let of_input = [
        ("-n", batch.first.is_some()),
        ("--output", batch.output.is_some()),
        ("--validate", batch.validate.is_some()),
        ("--compare", batch.compare.is_some()),
    ];
    if let Some((option, _)) = of_input.iter().find(|(_, given)| *given && batch.input.is_none()) {
        return usage(format!(
            "{option}: expected --input FILE with it, found prompts that have no such results; leave it out"
        ));
    }
    Ok(())
}

/// What is written, only rank 0 writes: none of it over what it reads.
fn check_files(arguments: &Arguments) -> Result<()> {
    let batch = &arguments.batch;
    let written = [
        ("--output", batch.output.as_deref()),
        ("--logits", arguments.logits.as_deref()),
        ("--prompt-logits", arguments.prompt_logits.as_deref()),
        ("--count-experts", arguments.count_experts.as_deref()),
    ];
    let read = [
        Some(arguments.input_plan.as_path()),
        batch.input.as_deref(),
        batch.validate.as_deref(),
        batch.compare.as_deref(),
    ];
    keep_apart(&written, &read)
}

fn requests(arguments: &Arguments, sampling: SamplingParams, prompts: &Prompts, file: &PlanFile) -> Vec<Request> {
    let eos = if arguments.ignore_eos { vec![] } else { text::stop_tokens(file, prompts.rules.as_ref()) };
    (0..)
        .zip(&prompts.tokens)
        .map(|(id, prompt)| Request {
            id,
            prompt: prompt.clone(),
            max_new_tokens: arguments.max_new_tokens,
            eos: eos.clone(),
            sampling: SamplingParams { seed: sampling.seed.wrapping_add(id), ..sampling },
            session: None,
        })
        .collect()
}

fn write_logits(arguments: &Arguments, results: &[std::result::Result<Finished, String>], vocab: u64) -> Result<()> {
    let first = results.iter().find_map(|result| result.as_ref().ok());
    // Where no sequence ran there is nothing to tell, and new tokens may be any number.
    if let (Some(path), Some(_)) = (&arguments.logits, first) {
        let new_tokens = arguments.max_new_tokens;
        let table = logits_table(results.iter().map(|result| result.as_ref().ok()), new_tokens, vocab as usize);
        write_npy(path, &[results.len() as u64, new_tokens as u64, vocab], &table)?;
    }
    if let (Some(path), Some(finished)) = (&arguments.prompt_logits, first) {
        write_npy(path, &[finished.prompt_tokens as u64, vocab], &finished.prompt_logits)?;
    }
    Ok(())
}

/// What the executor counts, if that is to be written.
fn counts(arguments: &Arguments, executor: &dyn Executor) -> Result<Option<ExpertCounts>> {
    if arguments.count_experts.is_none() {
        return Ok(None);
    }
    let Some(counts) = executor.expert_counts() else {
        bail!(
            "--count-experts: expected the CPU, which alone counts what routers choose, found {}; add --device cpu",
            executor.device()
        );
    };
    Ok(Some(counts))
}

fn write_counts(arguments: &Arguments, executor: &dyn Executor) -> Result<()> {
    if let (Some(path), Some(counts)) = (&arguments.count_experts, counts(arguments, executor)?) {
        let text = serde_json::to_string(&counts)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn write_npy(path: &Path, shape: &[u64], data: &[f32]) -> Result<()> {
    use npyz::WriterBuilder;
    let write = || -> std::io::Result<()> {
        let file = std::io::BufWriter::new(std::fs::File::create(path)?);
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd()?;
        writer.extend(data)?;
        writer.finish()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// What ran, on standard error.
fn summary(file: &PlanFile, timing: &Timing, peers: &[Peer], executor: &dyn Executor) {
    let device = executor.device();
    let program = &file.manifest.ranks[0];
    let statistics = &timing.statistics;
    let pool = &program.pool;
    note(format_args!(
        "{}: ready in {:.2} s; pool {} ({})",
        file.manifest.model.name,
        timing.ready_seconds,
        size(pool.bytes()),
        regions(pool),
    ));
    if let Some(measured) = executor.measured_pool_bytes() {
        note(format_args!("  pool: {} bytes planned, {measured} measured on the device", pool.bytes()));
    }
    for (bucket, counts) in program.buckets.iter().zip(&statistics.buckets) {
        if counts.steps > 0 {
            note(format_args!(
                "  {}: {} times {} steps, {} rows and {} of padding",
                counts.name,
                counts.steps,
                bucket.steps.len(),
                counts.rows,
                counts.padding,
            ));
        }
    }
    note(format_args!(
        "  prefill {:.0} tokens/s, decode {:.0} tokens/s, {} new tokens in {:.3} s on {device}",
        statistics.prefill.rows_per_second(),
        statistics.decode.rows_per_second(),
        statistics.tokens,
        timing.generate_seconds,
    ));
    if let Some(rate) = timing.tokens_per_second() {
        let table = rank_table(peers, &timing.ranks, timing.generate_seconds);
        note(format_args!("  {} ranks: {rate:.0} new tokens/s in all\n{}", timing.ranks.len(), table.trim_end()));
    }
}
