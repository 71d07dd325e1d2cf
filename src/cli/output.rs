//! Standard output and standard error, either of which may be closed or full: an error, never a panic.

use std::fmt::Display;
use std::io::Write;

use anyhow::{Context, Result};

/// Writes to standard output, now.
pub fn print(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).context("cannot write to standard output")
}

/// Writes a line to standard error, where nobody could be told that it failed; in one piece, since other processes may write there.
pub fn note(text: impl Display) {
    let _ = std::io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

/// An error and its causes in one line, without a cause that the text before already ends with.
pub fn describe(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| {
        if text.is_empty() {
            cause
        } else if text.ends_with(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_was_told_is_not_told_again() {
        let inner = anyhow::anyhow!("no such file").context("x.plan: no such file").context("cannot read");
        assert_eq!(describe(&inner), "cannot read: x.plan: no such file");
    }
}
