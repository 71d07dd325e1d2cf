//! `lfm2c eval`: how well a model predicts a text.

mod chunks;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde_json::json;

use self::chunks::{Chunks, Scores, surprise};
use crate::cli::device::Device;
use crate::cli::load::{self, Choices};
use crate::cli::output::{note, print};
use crate::cli::{progress, text, usage};
use crate::runtime::cuda::Graphs;
use crate::runtime::{Scored, score};

/// Positions of a chunk, where the plan has room for as many.
const CONTEXT: u64 = 512;

/// Perplexity of a model over a text, by the rule of llama-perplexity.
///
/// The text's tokens are cut into chunks of --context tokens, each a sequence of its own; what is left at the end is not used.
/// Where the tokenizer puts a token before a text, the first token of each chunk is replaced by that one. A chunk's first half
/// is context alone: the tokens behind position N/2 are scored, N - N/2 - 1 of them; with --all, every token but the first.
/// Perplexity is exp of the mean of -ln p over all scored tokens, and +/- is its standard error.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan, or a recipe (FILE.ron) to compile in memory
    #[arg(value_name = "PLAN|RECIPE.ron")]
    plan: PathBuf,
    /// The Hugging Face directory whose checkpoint gives the weights, and whose tokenizer the tokens
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The text, UTF-8; - for standard input
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a chunk [default: 512, or the plan's max-context if that is less]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Only the first N chunks
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Scores every token of a chunk but the first
    #[arg(long)]
    all: bool,
    /// What to run on
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// With a recipe: choices of `lfm2c compile`
    #[command(flatten)]
    choices: Choices,
}

/// `--format`.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    /// A line.
    Text,
    /// One object.
    Json,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    if arguments.chunks == Some(0) {
        return usage("--chunks: expected at least 1, found 0");
    }
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.plan, model, &arguments.choices.options_for(&arguments.plan)?)?;
    let longest = file.manifest.limits.longest();
    let context = arguments.context.unwrap_or(CONTEXT.min(longest) as usize);
    if context < 3 || context as u64 > longest {
        return usage(format!(
            "--context: expected 3 to {longest}, the plan's --max-context or --kv-tokens, whichever is less, found {context}"
        ));
    }
    let rules = text::open(&file, model)?;
    let given = text::read(&arguments.text)?;
    let tokens = [rules.before(), &rules.encode_plain(&given)?].concat();
    let vocab = file.manifest.model.vocab;
    if let Some(token) = tokens.iter().find(|&&token| u64::from(token) >= vocab) {
        let directory = rules.directory().display();
        bail!(
            "{directory}: expected a tokenizer of the plan's vocabulary, ids below {vocab}, found token {token} in the text"
        );
    }
    let chunks = Chunks::new(tokens, rules.before(), context, arguments.all, arguments.chunks);
    if chunks.count() == 0 {
        bail!(
            "{}: expected at least {context} tokens, a chunk, found {}; give a longer text or a smaller --context",
            arguments.text.display(),
            chunks.tokens(),
        );
    }
    let mut executor = load::executor(&file, model, arguments.device, Graphs::Lazy)?;
    let bar = progress::count("scoring", chunks.count() as u64);
    let begun = Instant::now();
    let mut scores = Scores::new(&chunks);
    score(&mut *executor, chunks.prompts(), chunks.first(), |positions, logits| {
        let rows = positions.par_iter().zip(logits.par_chunks_exact(vocab as usize));
        let surprises: Vec<f64> = rows.map(|(at, row)| surprise(row, chunks.next(at))).collect();
        positions.iter().zip(surprises).for_each(|(at, surprise)| scores.put(at, surprise));
        tell(&bar, &scores, positions);
        Ok(())
    })?;
    bar.finish_and_clear();
    let seconds = begun.elapsed().as_secs_f64();
    let Some(estimate) = scores.estimate() else {
        bail!("the logits hold numbers that are none: expected a mean of -ln p, found {}", scores.mean());
    };
    let run = chunks.count() * context;
    let rate = run as f64 / seconds.max(1e-9);
    match arguments.format {
        Format::Text => print(format_args!("perplexity {:.4} +/- {:.5}\n", estimate.perplexity, estimate.error))?,
        Format::Json => {
            let object = json!({
                "perplexity": estimate.perplexity,
                "standard_error": estimate.error,
                "mean_nll": estimate.mean,
                "mean_nll_standard_error": estimate.mean_error,
                "scored_tokens": scores.count(),
                "chunks": chunks.count(),
                "context": context,
                "text_tokens": chunks.tokens(),
                "text_bytes": given.len(),
                "seconds": seconds,
                "tokens_per_second": rate,
            });
            print(format_args!("{object}\n"))?;
        }
    }
    note(format_args!(
        "{}: {} chunks of {context} tokens, {} of {} tokens not used; {} scored; {seconds:.2} s, {rate:.0} tokens/s on {}",
        file.manifest.model.name,
        chunks.count(),
        chunks.tokens() - run,
        chunks.tokens(),
        scores.count(),
        executor.device(),
    ));
    Ok(())
}

/// Moves the bar, with the estimate so far.
fn tell(bar: &ProgressBar, scores: &Scores, positions: &[Scored]) {
    let done = positions.iter().filter(|at| scores.is_last(at)).count() as u64;
    if done > 0 {
        bar.inc(done);
        let rate = scores.count_so_far() as f64 / bar.elapsed().as_secs_f64().max(1e-9);
        bar.set_message(format!("perplexity {:.4}, {rate:.0} scored tokens/s", scores.mean().exp()));
    }
}
