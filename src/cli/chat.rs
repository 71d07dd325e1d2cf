//! `lfm2c chat`: a conversation, whose history stays in the pool.

mod interrupt;
mod lines;
mod log;
mod turn;

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Result, bail};

use self::interrupt::Interrupt;
use self::lines::Lines;
use self::log::Log;
use crate::cli::device::Device;
use crate::cli::load::{self, Choices};
use crate::cli::output::{keep_apart, note};
use crate::cli::sampling::Sampling;
use crate::cli::{text, usage};
use crate::runtime::cuda::Graphs;
use crate::runtime::{Executor, Generator, Options, SamplingParams, Session};
use crate::text::{Conversation, Text};

const HELP: &str = "\
/clear          forget the conversation and begin another
/system TEXT    the same, with TEXT as the system message; without TEXT, with none
/help           this
/exit           end (as Ctrl-D)
//TEXT          say /TEXT
Ctrl-C stops an answer; the conversation goes on from what was shown.";

/// Talk with a model.
///
/// Each line is a turn. What was said stays in the pool, so a turn runs only what is new. Ctrl-C stops an answer, and the
/// conversation goes on from the text that was shown. Where standard input is no terminal, its lines are the turns.
/// Answers go to standard output, everything else to standard error. When prompt and answer have no more room, the answer
/// ends, and the conversation is full: /clear begins another.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan, or a recipe (FILE.ron) to compile in memory
    #[arg(value_name = "PLAN|RECIPE.ron")]
    input_plan: PathBuf,
    /// The Hugging Face directory with tokenizer, chat template and checkpoint [default: the recipe's]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// What to run on
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    /// What the model is told before all
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    system: Option<String>,
    /// Uses no chat template: behind the beginning-of-sequence token the model goes on with the text so far, each turn on a line of its own
    #[arg(long)]
    raw: bool,
    /// Tokens of an answer, at the most
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    /// Ends an answer where this text would come; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Rows of a prompt in one step, at the most
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    /// How tokens are chosen
    #[command(flatten)]
    sampling: Sampling,
    /// Writes a JSON object for each turn: what was said, and how many rows ran
    #[arg(long, value_name = "FILE.jsonl")]
    log: Option<PathBuf>,
    /// With a recipe: choices of `lfm2c compile`
    #[command(flatten)]
    choices: Choices,
}

/// A conversation at work.
struct Chat<'a> {
    text: &'a Text,
    arguments: &'a Arguments,
    sampling: SamplingParams,
    /// Tokens that end an answer.
    eos: Vec<u32>,
    generator: Generator<'a, dyn Executor>,
    conversation: Conversation<'a>,
    system: Option<String>,
    interrupt: &'a Interrupt,
    log: Log,
    /// Turns so far.
    turns: u64,
}

/// The only session.
const SESSION: Session = Session(0);

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    keep_apart(&[("--log", arguments.log.as_deref())], &[Some(&arguments.input_plan)])?;
    let sampling = arguments.sampling.params()?;
    if arguments.max_new_tokens == 0 {
        return usage("--max-new-tokens: expected at least 1, found 0: an answer has tokens");
    }
    if arguments.chunk == Some(0) {
        return usage("--chunk: expected at least 1 row, found 0; leave it out to run prompts whole");
    }
    if arguments.stop.iter().any(String::is_empty) {
        return usage("--stop: expected some text, found none");
    }
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.input_plan, model, &arguments.choices.options_for(&arguments.input_plan)?)?;
    let text = text::open(&file, model)?;
    if !arguments.raw && !text.has_chat_template() {
        let directory = text.directory().display();
        bail!(
            "no chat template: expected chat_template.jinja or `chat_template` in tokenizer_config.json in {directory}; \
             with --raw the model goes on with plain text"
        );
    }
    let log = Log::create(arguments.log.as_deref())?;
    let mut executor = load::executor(&file, model, arguments.device, Graphs::Lazy)?;
    let mut lines = Lines::open()?;
    let interrupt = Interrupt::install(lines.are_typed())?;
    let options = Options { chunk: arguments.chunk, ..Options::default() };
    let eos = text::stop_tokens(&file, Some(&text));
    if lines.are_typed() {
        let device = executor.device();
        note(format_args!("{} on {device}; /help says what there is, Ctrl-D ends", file.manifest.model.name));
    }
    let mut chat = Chat {
        text: &text,
        arguments,
        sampling,
        eos,
        generator: Generator::new(&mut *executor, options)?,
        conversation: Conversation::new(&text, None),
        system: arguments.system.clone(),
        interrupt: &interrupt,
        log,
        turns: 0,
    };
    chat.clear();
    while let Some(line) = lines.next_line()? {
        if chat.line(&line)?.is_break() {
            break;
        }
    }
    Ok(())
}

impl Chat<'_> {
    /// Does what a line says.
    fn line(&mut self, line: &str) -> Result<ControlFlow<()>> {
        let trimmed = line.trim();
        let (command, rest) = trimmed.split_once(char::is_whitespace).unwrap_or((trimmed, ""));
        match command {
            "" => {}
            "/exit" => return Ok(ControlFlow::Break(())),
            "/help" => note(HELP),
            "/clear" => self.clear(),
            "/system" if self.arguments.raw => note("/system: there is no system message without a template (--raw)"),
            "/system" => {
                self.system = Some(rest.trim().to_owned()).filter(|text| !text.is_empty());
                self.clear();
            }
            _ => match line.strip_prefix('/') {
                Some(said) if said.starts_with('/') => self.turn(said)?,
                Some(_) => note(format_args!("{command}: no such command; /help names them")),
                None => self.turn(line)?,
            },
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Begins a conversation.
    fn clear(&mut self) {
        self.generator.forget(SESSION);
        self.conversation = match self.arguments.raw {
            true => Conversation::raw(self.text),
            false => Conversation::new(self.text, self.system.as_deref()),
        };
    }
}
