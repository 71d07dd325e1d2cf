//! Standard output and standard error, either of which may be closed or full: an error, never a panic.

use std::fmt::Display;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::runtime::ranks::launched;

/// Writes to standard output, now.
pub fn print(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).context("cannot write to standard output")
}

/// Writes a line to standard error, where nobody could be told that it failed; in one piece, since other processes may write there.
pub fn note(text: impl Display) {
    let _ = std::io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

/// As [`note`], what every rank of `mpirun` has to say alike: rank 0 says it.
pub fn note_once(text: impl Display) {
    if launched().is_none_or(|launched| launched.rank == 0) {
        note(text);
    }
}

/// Whether two paths name the same file, which is there: what is written to one must not be read from the other.
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b && a.is_file(),
        _ => false,
    }
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
    fn a_file_is_the_same_by_any_path() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
        assert!(!same_file(&a, &a), "it is not there");
        std::fs::write(&a, "").unwrap();
        std::fs::write(&b, "").unwrap();
        assert!(same_file(&a, &folder.path().join(".").join("a")) && !same_file(&a, &b));
        assert!(!same_file(Path::new("/dev/null"), Path::new("/dev/null")), "no file");
    }

    #[test]
    fn a_cause_that_was_told_is_not_told_again() {
        let inner = anyhow::anyhow!("no such file").context("x.plan: no such file").context("cannot read");
        assert_eq!(describe(&inner), "cannot read: x.plan: no such file");
    }
}
