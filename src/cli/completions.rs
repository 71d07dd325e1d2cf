//! `lfm2c completions` and `lfm2c man`: what a shell and a reader of manuals want to know, from the options themselves.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::output::print;

/// Print a script that completes commands and options in a shell.
///
/// For example, in bash: source <(lfm2c completions bash)
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Print the manual page, or write those of all commands.
///
/// For example: lfm2c man | man -l -
#[derive(clap::Args, Debug)]
pub struct ManArguments {
    /// Writes lfm2c.1, and lfm2c-COMMAND.1 for each command, to a directory
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Prints a script.
pub fn execute(arguments: &Arguments, mut command: Command) -> Result<()> {
    let name = command.get_name().to_owned();
    let mut script = vec![];
    clap_complete::generate(arguments.shell, &mut command, name, &mut script);
    print(String::from_utf8(script)?)
}

/// Prints or writes manual pages.
pub fn man(arguments: &ManArguments, command: Command) -> Result<()> {
    // Without `help`, whose page would only say what the others do.
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let source = format!("{} {}", command.get_name(), command.get_version().unwrap_or_default());
    let page = |command: &Command| Man::new(command.clone()).source(source.clone());
    match &arguments.output {
        Some(folder) => {
            let write = || {
                std::fs::create_dir_all(folder)?;
                let mut all = std::iter::once(&command).chain(command.get_subcommands());
                all.try_for_each(|command| page(command).generate_to(folder).map(drop))
            };
            write().with_context(|| format!("cannot write manual pages to {}", folder.display()))
        }
        None => {
            let mut text = vec![];
            page(&command).render(&mut text)?;
            print(String::from_utf8(text)?)
        }
    }
}
