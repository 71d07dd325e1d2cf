//! Standard output and standard error, either of which may be closed or full: an error, never a panic.

use std::fmt::Display;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cli::usage;
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

/// Refuses to write a result over what is read, or two results to one file: options that write, each with its file, and the files that are read.
pub fn keep_apart(written: &[(&str, Option<&Path>)], read: &[Option<&Path>]) -> Result<()> {
    let written: Vec<(&str, &Path)> = written.iter().filter_map(|(option, path)| Some((*option, (*path)?))).collect();
    for (i, (option, path)) in written.iter().enumerate() {
        let read_too = read.iter().flatten().any(|read| same_file(path, read));
        let other = written[..i].iter().find(|(_, other)| same_place(path, other));
        let what = match other {
            _ if read_too => "those that are read".to_owned(),
            Some((other, _)) => format!("that of {other}"),
            None => continue,
        };
        return usage(format!(
            "{option} {}: expected another file than {what}, found the same; give it a name of its own",
            path.display()
        ));
    }
    Ok(())
}

/// Whether two paths name the same file, which may be yet to be made.
fn same_place(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(folder.canonicalize().ok()?.join(path.file_name()?))
    };
    let to_be_made = !a.exists() && !b.exists() && place(a).is_some() && place(a) == place(b);
    to_be_made || same_file(a, b)
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
    fn results_go_to_files_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b, new] = ["a", "b", "new"].map(|name| folder.path().join(name));
        std::fs::write(&a, "").unwrap();
        let null = Some(Path::new("/dev/null"));
        let wrong = |written: &[(&str, Option<&Path>)], read: &[Option<&Path>]| {
            keep_apart(written, read).err().map(|error| error.to_string())
        };
        let (one, two) = (("--one", Some(new.as_path())), ("--two", Some(b.as_path())));
        assert_eq!(wrong(&[one, two, ("--three", None)], &[Some(&a), None]), None);
        assert_eq!(wrong(&[("--one", null), ("--two", null)], &[null]), None, "what is no file takes all");
        let over = wrong(&[one, ("--two", Some(&folder.path().join(".").join("a")))], &[None, Some(&a)]).unwrap();
        assert!(over.starts_with("--two ") && over.contains("those that are read"), "{over}");
        let twice = wrong(&[one, ("--two", Some(&folder.path().join(".").join("new")))], &[]).unwrap();
        assert!(twice.starts_with("--two ") && twice.contains("that of --one"), "{twice}");
    }

    #[test]
    fn a_cause_that_was_told_is_not_told_again() {
        let inner = anyhow::anyhow!("no such file").context("x.plan: no such file").context("cannot read");
        assert_eq!(describe(&inner), "cannot read: x.plan: no such file");
    }
}
