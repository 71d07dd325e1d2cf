//! What the user says, a line at a time: typed with an editor, or as standard input has it.

use std::io::{BufRead, IsTerminal};

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::cli::output::note;

/// Lines of standard input.
pub(super) enum Lines {
    /// Typed at a terminal.
    Typed(Box<DefaultEditor>),
    /// Of a pipe or a file; how many have been read.
    Read(u64),
}

impl Lines {
    /// Opens an editor if standard input and output are a terminal.
    ///
    /// # Errors
    /// The terminal failed.
    pub(super) fn open() -> Result<Lines> {
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            let editor = DefaultEditor::new().context("cannot use the terminal; pipe lines in instead")?;
            return Ok(Lines::Typed(Box::new(editor)));
        }
        Ok(Lines::Read(0))
    }

    /// Whether they are typed at a terminal.
    pub(super) fn are_typed(&self) -> bool {
        matches!(self, Lines::Typed(_))
    }

    /// The next line, without its end; none after the last. A line that is no UTF-8 is told and left out.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn next_line(&mut self) -> Result<Option<String>> {
        match self {
            Lines::Typed(editor) => typed(editor),
            Lines::Read(number) => read(number),
        }
    }
}

fn typed(editor: &mut DefaultEditor) -> Result<Option<String>> {
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                // A history that does not take a line is no fault.
                let _ = editor.add_history_entry(&line);
                return Ok(Some(line));
            }
            Err(ReadlineError::Interrupted) => note("/exit or Ctrl-D ends"),
            Err(ReadlineError::Eof) => return Ok(None),
            Err(error) => return Err(error).context("cannot read from the terminal"),
        }
    }
}

fn read(number: &mut u64) -> Result<Option<String>> {
    loop {
        let mut line = vec![];
        if std::io::stdin().lock().read_until(b'\n', &mut line).context("cannot read standard input")? == 0 {
            return Ok(None);
        }
        *number += 1;
        match String::from_utf8(line) {
            Ok(line) => return Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned())),
            Err(_) => {
                note(format_args!("line {number} of standard input: expected UTF-8, found other bytes; left out"))
            }
        }
    }
}
