//! The lines of a batch file.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result};

use crate::cli::progress::Sequences;

/// Whether a file has an end that is known, and can be read twice.
pub fn is_regular(input: &Path) -> bool {
    std::fs::metadata(input).is_ok_and(|found| found.is_file())
}

/// How many lines there are to run, where it is worth to read the file twice for it: it is `wanted`, or a bar shows it.
pub fn count(input: &Path, most: Option<usize>, wanted: bool) -> Result<Option<usize>> {
    if !is_regular(input) || !(wanted || Sequences::visible()) {
        return Ok(None);
    }
    let mut lines = Lines::open(input, most)?;
    let mut count = 0;
    while lines.next()?.is_some() {
        count += 1;
    }
    Ok(Some(count))
}

/// The lines of a file that are not blank.
pub struct Lines<R> {
    input: R,
    /// What to call it.
    pub name: String,
    /// Lines read, blank ones too.
    number: usize,
    /// Lines given.
    place: usize,
    most: usize,
    bytes: Vec<u8>,
}

impl Lines<Box<dyn BufRead>> {
    /// A file, or standard input for `-`; of it at most the first lines.
    pub fn open(path: &Path, most: Option<usize>) -> Result<Self> {
        if path == Path::new("-") {
            return Ok(Lines::new(Box::new(std::io::stdin().lock()), "standard input", most));
        }
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Lines::new(Box::new(BufReader::new(file)), &path.display().to_string(), most))
    }
}

impl<R: BufRead> Lines<R> {
    /// Lines of what can be read.
    pub fn new(input: R, name: &str, most: Option<usize>) -> Self {
        let most = most.unwrap_or(usize::MAX);
        Lines { input, name: name.to_owned(), number: 0, place: 0, most, bytes: vec![] }
    }

    /// The next line's number from 1, its place among those that are not blank from 0, and its bytes without blanks around.
    pub fn next(&mut self) -> Result<Option<(usize, usize, &[u8])>> {
        if self.place == self.most {
            return Ok(None);
        }
        loop {
            self.bytes.clear();
            let read = self.input.read_until(b'\n', &mut self.bytes);
            if read.with_context(|| format!("cannot read {}", self.name))? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if self.number == 1 && self.bytes.starts_with("\u{feff}".as_bytes()) {
                // Some editors begin a file so.
                self.bytes.drain(..3);
            }
            if !self.bytes.trim_ascii().is_empty() {
                break;
            }
        }
        self.place += 1;
        Ok(Some((self.number, self.place - 1, self.bytes.trim_ascii())))
    }
}
