//! The command line: one file a command. Exit codes: 0 done, 1 the work failed or a verification did not hold, 2 wrong usage.

mod bench;
mod bench_fusion;
mod bench_ranks;
mod bench_requests;
mod chat;
mod compile;
mod completions;
mod device;
mod diff;
mod dot;
pub mod draw;
mod eval;
mod follow;
mod inspect;
mod load;
mod lock;
mod measure;
mod output;
mod profile;
mod progress;
mod run;
mod samples;
mod sampling;
mod table;
mod text;
mod tune;
mod verify;
mod world;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::codegen::compile::OptionError;

/// Compiles LFM2 language models into static execution plans, and runs the plans.
///
/// A plan knows everything beforehand: every step, every byte offset, every bucket of rows. Compile one from a recipe or
/// a Hugging Face directory, run it, draw it, inspect it, verify it. Run only plans that you trust.
#[derive(Parser, Debug)]
#[command(name = "lfm2c", version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Compile(compile::Arguments),
    Run(Box<run::Arguments>),
    Chat(chat::Arguments),
    Eval(eval::Arguments),
    Dot(dot::Arguments),
    Inspect(inspect::Arguments),
    Verify(verify::Arguments),
    Diff(diff::Arguments),
    Bench(bench::Arguments),
    Profile(profile::Arguments),
    Samples(samples::Arguments),
    Completions(completions::Arguments),
    Man(completions::ManArguments),
}

impl Command {
    /// Refuses to run several times over what runs in one process.
    fn check_world(&self) -> anyhow::Result<()> {
        let name = match self {
            Command::Run(_) | Command::Bench(_) => return Ok(()),
            Command::Compile(_) => "compile",
            Command::Chat(_) => "chat",
            Command::Eval(_) => "eval",
            Command::Dot(_) => "dot",
            Command::Inspect(_) => "inspect",
            Command::Verify(_) => "verify",
            Command::Diff(_) => "diff",
            Command::Profile(_) => "profile",
            Command::Samples(_) => "samples",
            Command::Completions(_) => "completions",
            Command::Man(_) => "man",
        };
        world::World::refuse(name)
    }
}

/// A fault in how a command was called: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// Returns a usage error.
fn usage<V>(message: impl Into<String>) -> anyhow::Result<V> {
    Err(UsageError(message.into()).into())
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = arguments.command.check_world().and_then(|()| match arguments.command {
        Command::Compile(arguments) => compile::execute(&arguments),
        Command::Run(arguments) => run::execute(&arguments),
        Command::Chat(arguments) => chat::execute(&arguments),
        Command::Eval(arguments) => eval::execute(&arguments),
        Command::Dot(arguments) => dot::execute(&arguments),
        Command::Inspect(arguments) => inspect::execute(&arguments),
        Command::Verify(arguments) => verify::execute(&arguments),
        Command::Diff(arguments) => diff::execute(&arguments),
        Command::Bench(arguments) => bench::execute(&arguments),
        Command::Profile(arguments) => profile::execute(&arguments),
        Command::Samples(arguments) => samples::execute(&arguments),
        Command::Completions(arguments) => completions::execute(&arguments, Arguments::command()),
        Command::Man(arguments) => completions::man(&arguments, Arguments::command()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing to tell: another rank does.
            if !error.to_string().is_empty() {
                output::note(format_args!("lfm2c: {}", output::describe(&error)));
            }
            ExitCode::from(if is_usage(&error) { 2 } else { 1 })
        }
    }
}

/// True if another call of the command is what it takes.
fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<UsageError>() || cause.is::<OptionError>())
}

/// True if the reader of standard output went away, as `head` does: no fault.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}
