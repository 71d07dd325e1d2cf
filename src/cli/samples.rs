//! `lfm2c samples`: files for `run --input FILE.bin --validate FILE.bin`.

pub mod file;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cli::device::Device;
use crate::cli::load;
use crate::cli::output::{keep_apart, note};
use crate::cli::run::write_answers;
use crate::cli::{text, usage};
use crate::codegen::CompileOptions;
use crate::runtime::cuda::Graphs;
use crate::runtime::sampling::draw;

/// Make samples for `lfm2c run --input FILE.bin`, and the answers to them.
///
/// Little-endian files: samples are int32 count, int32 length, int32 tokens [count, length]; answers are float32 [count,
/// vocab], the logits of each sample's last position, as this plan computes them: take one in f32, on the CPU.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan, or a recipe (FILE.ron) to compile in memory
    #[arg(value_name = "PLAN|RECIPE.ron")]
    input_plan: PathBuf,
    /// The Hugging Face directory whose checkpoint gives the weights
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// How many samples
    #[arg(long, value_name = "N", default_value_t = 16)]
    count: usize,
    /// Tokens of each
    #[arg(long, value_name = "N", default_value_t = 16)]
    length: usize,
    /// Random tokens are a function of this
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Takes the tokens of a text, sample after sample, `-` for standard input; needs a tokenizer
    #[arg(long, value_name = "FILE", conflicts_with = "seed")]
    text: Option<PathBuf>,
    /// Where the samples go
    #[arg(short, long, value_name = "FILE.bin")]
    output: PathBuf,
    /// Where the answers go; without it, none are computed
    #[arg(long, value_name = "FILE.bin")]
    answers: Option<PathBuf>,
    /// What to compute them on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    let Arguments { count, length, .. } = *arguments;
    for (name, found) in [("--count", count), ("--length", length)] {
        if found == 0 || i32::try_from(found).is_err() {
            return usage(format!("{name}: expected a number from 1 to {}, found {found}", i32::MAX));
        }
    }
    let written = [("--output", Some(arguments.output.as_path())), ("--answers", arguments.answers.as_deref())];
    keep_apart(&written, &[Some(&arguments.input_plan), arguments.text.as_deref()])?;
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.input_plan, model, &CompileOptions::default())?;
    let vocab = file.manifest.model.vocab;
    let kind = match &arguments.text {
        Some(path) => {
            let tokens = text::open(&file, model)?.encode_plain(&text::read(path)?)?;
            let found = tokens.len();
            ensure!(
                found as u64 >= count as u64 * length as u64,
                "{}: expected a text of at least {count} x {length} tokens, found {found}; take fewer or shorter samples",
                path.display()
            );
            write(&arguments.output, [count, length], tokens.into_iter().take(count * length))?;
            "tokens of the text"
        }
        None => {
            let tokens = (0..count as u64 * length as u64).map(|i| draw(arguments.seed, i, vocab) as u32);
            write(&arguments.output, [count, length], tokens)?;
            "random tokens"
        }
    };
    note(format_args!("{}: {count} samples of {length} {kind}", arguments.output.display()));
    if let Some(answers) = &arguments.answers {
        let mut executor = load::prepared_executor(&file, model, arguments.device, Graphs::Lazy)?;
        let mut inputs = file::Inputs::open(&arguments.output)?;
        write_answers(&mut *executor, &mut inputs, count, answers)?;
        note(format_args!("{}: the logits of each, {vocab} float32, by {}", answers.display(), executor.device()));
    }
    Ok(())
}

fn write(path: &Path, header: [usize; 2], tokens: impl Iterator<Item = u32>) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        for word in header.into_iter().map(|n| n as u32).chain(tokens) {
            file.write_all(&word.to_le_bytes())?;
        }
        file.flush()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
