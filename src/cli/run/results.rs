//! Where the results of a batch go: in the order of the input, each as soon as those before it are there. And what an earlier
//! run of the same batch left there.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::cli::output::print;
use crate::cli::usage;

/// Things that come in any order, to be taken in theirs.
#[derive(Debug)]
pub struct Ordered<V> {
    next: usize,
    waiting: BTreeMap<usize, V>,
}

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Ordered { next: 0, waiting: BTreeMap::new() }
    }
}

impl<V> Ordered<V> {
    /// The thing at a place.
    pub fn put(&mut self, place: usize, value: V) {
        self.waiting.insert(place, value);
    }

    /// The next in order, if it is there.
    pub fn take(&mut self) -> Option<V> {
        let value = self.waiting.remove(&self.next)?;
        self.next += 1;
        Some(value)
    }
}

/// A result that an earlier run wrote.
#[derive(Debug)]
pub struct Kept {
    /// The line of the input that it says it is of.
    pub number: usize,
    /// The name of its request.
    pub key: String,
    /// Whether it says that the line could not run.
    pub failed: bool,
    /// Its line in the output, with the newline.
    pub text: String,
}

/// What is read of a result to see what it belongs to.
#[derive(Deserialize)]
struct Header {
    line: usize,
    request: String,
    error: Option<String>,
}

/// What an earlier run left: whole lines, up to a byte offset.
#[derive(Debug)]
struct Earlier {
    lines: std::io::Take<BufReader<File>>,
    count: usize,
}

/// Results in the order of the input.
#[derive(Debug)]
pub struct Results {
    ordered: Ordered<Option<String>>,
    /// Standard output, if none.
    file: Option<File>,
    path: PathBuf,
    /// Bytes of the file to keep: it is cut when the first new result is there, so that a wrong file is refused unharmed.
    cut: Option<u64>,
    earlier: Option<Earlier>,
    /// What is written instead of `path` and takes its place at the end.
    new: Option<PathBuf>,
}

impl Results {
    /// To standard output.
    pub fn to_stdout() -> Results {
        Results::new(None, Path::new("standard output"))
    }

    fn new(file: Option<File>, path: &Path) -> Results {
        Results { ordered: Ordered::default(), file, path: path.to_owned(), cut: None, earlier: None, new: None }
    }

    /// To a file that holds no results yet.
    ///
    /// # Errors
    /// It holds something, or cannot be written.
    pub fn create(path: &Path) -> Result<Results> {
        if std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() > 0) {
            return usage(format!(
                "--output {}: expected no such file, or an empty one, found results of an earlier run; go on with --resume, \
                 or remove it",
                path.display()
            ));
        }
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Results::new(Some(file), path))
    }

    /// To a file that may hold results of an earlier run that was interrupted. With `anew` all results are written again, to
    /// a file that takes this one's place at the end.
    ///
    /// # Errors
    /// It is no file that can be read and written.
    pub fn resume(path: &Path, anew: bool) -> Result<Results> {
        if std::fs::metadata(path).is_err() {
            return Results::create(path);
        }
        let cannot = || format!("cannot resume {}", path.display());
        let mut file = OpenOptions::new().read(true).write(true).open(path).with_context(cannot)?;
        ensure!(file.metadata()?.is_file(), "cannot resume {}: expected a regular file", path.display());
        let whole = whole_lines(&mut BufReader::new(&file)).with_context(cannot)?;
        file.seek(SeekFrom::Start(whole)).with_context(cannot)?;
        let mut torn = vec![];
        (&file).take(TORN_BYTES).read_to_end(&mut torn).with_context(cannot)?;
        ensure!(
            is_torn(&torn),
            "cannot resume {}: expected results of `lfm2c run --input`, found something else after byte {whole}; resume with the file \
             that --output named, or remove it",
            path.display(),
        );
        file.rewind().with_context(cannot)?;
        let lines = BufReader::new(file.try_clone().with_context(cannot)?).take(whole);
        let mut results = Results::new(Some(file), path);
        results.cut = Some(whole);
        results.earlier = Some(Earlier { lines, count: 0 });
        if anew {
            let mut name = path.as_os_str().to_owned();
            name.push(".new");
            let new = PathBuf::from(name);
            results.file = Some(File::create(&new).with_context(|| format!("cannot write {}", new.display()))?);
            (results.new, results.cut) = (Some(new), None);
        }
        Ok(results)
    }

    /// The next result of the earlier run, in the order of the input.
    ///
    /// # Errors
    /// It cannot be read, or it is none.
    pub fn earlier(&mut self) -> Result<Option<Kept>> {
        let Some(Earlier { lines, count }) = &mut self.earlier else { return Ok(None) };
        let mut bytes = vec![];
        lines.read_until(b'\n', &mut bytes).with_context(|| format!("cannot read {}", self.path.display()))?;
        if bytes.is_empty() {
            self.earlier = None;
            return Ok(None);
        }
        *count += 1;
        let none = || {
            format!(
                "{}, line {count}: expected a result of `lfm2c run --input`, found something else; resume with the file that \
                 --output named, or remove it",
                self.path.display(),
            )
        };
        let text = String::from_utf8(bytes).with_context(none)?;
        let Header { line, request, error } = serde_json::from_str(&text).with_context(none)?;
        Ok(Some(Kept { number: line, key: request, failed: error.is_some(), text }))
    }

    /// Keeps a result of the earlier run at a place.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep(&mut self, place: usize, kept: Kept) -> Result<()> {
        // Where results are appended it is there already.
        let text = self.new.is_some().then_some(kept.text);
        self.ordered.put(place, text);
        self.flush()
    }

    /// The result at a place: a line without its newline, or nothing to print.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put(&mut self, place: usize, line: Option<String>) -> Result<()> {
        self.ordered.put(place, line.map(|line| line + "\n"));
        self.flush()
    }

    /// Writes what is next in order, line by line.
    fn flush(&mut self) -> Result<()> {
        while let Some(line) = self.ordered.take() {
            let Some(line) = line else { continue };
            self.write(&line)?;
        }
        Ok(())
    }

    fn write(&mut self, line: &str) -> Result<()> {
        self.cut()?;
        match &mut self.file {
            None => print(line),
            Some(file) => {
                file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))
            }
        }
    }

    /// Cuts away the torn line that the earlier run ended in.
    fn cut(&mut self) -> Result<()> {
        if let (Some(whole), Some(file)) = (self.cut.take(), &mut self.file) {
            let cut = file.set_len(whole).and_then(|()| file.seek(SeekFrom::Start(whole)));
            cut.with_context(|| format!("cannot write {}", self.path.display()))?;
        }
        Ok(())
    }

    /// All is written.
    ///
    /// # Errors
    /// The file cannot be written, or the earlier run left results of lines that the input does not have.
    pub fn finish(mut self) -> Result<()> {
        if let Some(kept) = self.earlier()? {
            bail!(
                "{}: expected no result behind that of the input's last line, found one of line {}; resume with the same input",
                self.path.display(),
                kept.number,
            );
        }
        self.cut()?;
        if let Some(new) = self.new.take() {
            std::fs::rename(&new, &self.path)
                .with_context(|| format!("cannot rename {} to {}", new.display(), self.path.display()))?;
        }
        Ok(())
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        if let Some(new) = &self.new {
            let _ = std::fs::remove_file(new);
        }
    }
}

/// Bytes by which a torn result is known.
const TORN_BYTES: u64 = 8;

/// Whether these are the first bytes of a result that was torn, or none; a file system that lost its end may have zeros there.
fn is_torn(bytes: &[u8]) -> bool {
    let begins = |head: &[u8]| bytes.iter().zip(head).all(|(a, b)| a == b);
    begins(b"{\"id\":") || begins(b"{\"line\":") || bytes.iter().all(|&byte| byte == 0)
}

/// Bytes of the lines that are whole: the last counts only if it ends in a newline and is JSON.
fn whole_lines(lines: &mut impl BufRead) -> std::io::Result<u64> {
    let (mut whole, mut before, mut line) = (0, 0, vec![]);
    let mut last = vec![];
    loop {
        line.clear();
        let count = lines.read_until(b'\n', &mut line)? as u64;
        if !line.ends_with(b"\n") {
            break;
        }
        (before, whole) = (whole, whole + count);
        std::mem::swap(&mut last, &mut line);
    }
    let torn = whole > 0 && serde_json::from_slice::<IgnoredAny>(&last).is_err();
    Ok(if torn { before } else { whole })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_early_waits() {
        let mut ordered = Ordered::default();
        ordered.put(1, "b");
        assert_eq!(ordered.take(), None);
        ordered.put(0, "a");
        ordered.put(3, "d");
        assert_eq!([ordered.take(), ordered.take(), ordered.take()], [Some("a"), Some("b"), None]);
    }

    #[test]
    fn a_torn_last_line_does_not_count() {
        for (text, whole) in [
            ("", 0),
            ("{}\n", 3),
            ("{}\n{}", 3),
            ("{}\n{\"a\"\n", 3),
            ("{}\n{}\n", 6),
            ("x", 0),
            ("x\n", 0),
            // Only the last can be torn; what is wrong before is told when it is read.
            ("x\n{}\n", 5),
        ] {
            assert_eq!(whole_lines(&mut text.as_bytes()).unwrap(), whole, "{text:?}");
        }
    }

    #[test]
    fn what_is_torn_off_no_result_is_not_cut_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        for (text, torn) in [
            ("my notes", false),
            ("my notes\n", false),
            ("{\"id\"", true),
            ("{\"id\":1,\"li\n", true),
            ("{\"line\":1,\"x", true),
            ("{\"lines\":", false),
            ("{\"name\": 1", false),
            ("{", true),
            ("\0\0\0", true),
            ("", true),
        ] {
            std::fs::write(&path, text).unwrap();
            let found = Results::resume(&path, false);
            assert_eq!(found.is_ok(), torn, "{text:?}");
            drop(found);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_file_with_results_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        std::fs::write(&path, "{}\n").unwrap();
        let error = Results::create(&path).unwrap_err().to_string();
        assert!(error.contains("--resume"), "{error}");
        std::fs::write(&path, "").unwrap();
        Results::create(&path).unwrap().finish().unwrap();
    }

    #[test]
    fn what_is_no_result_is_refused_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        let text = "{\"tokens\": [1]}\n{\"li";
        std::fs::write(&path, text).unwrap();
        for anew in [false, true] {
            let mut results = Results::resume(&path, anew).unwrap();
            let error = results.earlier().unwrap_err().to_string();
            assert!(error.contains("notes.txt, line 1: expected a result"), "{error}");
            drop(results);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}
