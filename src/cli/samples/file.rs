//! The files of the evaluation form, little-endian, and the run over them.
//!
//! ```text
//! inputs     int32 count, int32 length, int32 tokens [count, length]
//! answers    float32 logits [count, vocab], those of each sample's last position
//! ```

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;

use crate::cli::progress;
use crate::cli::run::Ordered;
use crate::cli::world::World;
use crate::runtime::ranks::{Mode, Summary};
use crate::runtime::{Executor, Finished, Generator, Options, Request, RequestError, SamplingParams, Work};

/// Bytes of an int32 and of a float32.
const WORD: u64 = 4;
/// Count and length.
const HEADER_BYTES: u64 = 2 * WORD;

/// Samples of equal length, read one by one.
#[derive(Debug)]
pub struct Inputs {
    file: BufReader<File>,
    path: PathBuf,
    /// Samples.
    pub count: usize,
    /// Tokens of each.
    pub length: usize,
    next: usize,
}

impl Inputs {
    /// Opens a file of samples.
    ///
    /// # Errors
    /// It cannot be read, or has another size than its header says.
    pub fn open(path: &Path) -> Result<Inputs> {
        let (mut file, found) = open(path)?;
        let name = path.display();
        ensure!(
            found >= HEADER_BYTES,
            "{name}: expected int32 count, int32 length and the tokens, found {found} bytes; `lfm2c samples` makes such files"
        );
        let mut words = vec![];
        read(&mut file, path, 2, &mut words)?;
        let [count, length] = [i32::from_le_bytes(words[0]), i32::from_le_bytes(words[1])];
        ensure!(
            count > 0 && length > 0,
            "{name}: expected a count and a length of at least 1, found count {count}, length {length}"
        );
        let expected = HEADER_BYTES + WORD * count as u64 * length as u64;
        ensure!(
            found == expected,
            "{name}: expected {expected} bytes for {count} samples of {length} tokens, found {found}; the file is damaged, or \
             of another layout than int32 count, int32 length, int32 tokens"
        );
        Ok(Inputs { file, path: path.to_owned(), count: count as usize, length: length as usize, next: 0 })
    }

    /// The next sample. All of its tokens must be below `vocab`.
    fn read(&mut self, vocab: u64) -> Result<Vec<u32>> {
        let mut words = vec![];
        read(&mut self.file, &self.path, self.length, &mut words)?;
        let (path, sample) = (self.path.display(), self.next);
        self.next += 1;
        let token = |(at, &word): (usize, &[u8; 4])| {
            let token = i32::from_le_bytes(word);
            match u32::try_from(token) {
                Ok(token) if u64::from(token) < vocab => Ok(token),
                _ => {
                    bail!("{path}: sample {sample}, token {at}: expected an id from 0 to {}, found {token}", vocab - 1)
                }
            }
        };
        words.iter().enumerate().map(token).collect()
    }
}

/// Logits, read sample by sample.
#[derive(Debug)]
pub struct Answers {
    file: BufReader<File>,
    path: PathBuf,
    vocab: usize,
}

impl Answers {
    /// Opens the answers to `count` samples.
    ///
    /// # Errors
    /// It cannot be read, or has another size.
    pub fn open(path: &Path, count: usize, vocab: u64) -> Result<Answers> {
        let (file, found) = open(path)?;
        let expected = WORD * count as u64 * vocab;
        ensure!(
            found == expected,
            "{}: expected {expected} bytes, float32 logits of {count} samples by {vocab} tokens, found {found}; give the answers \
             to all samples of --input, of the plan's model",
            path.display()
        );
        Ok(Answers { file, path: path.to_owned(), vocab: vocab as usize })
    }

    /// The next sample's logits `[vocab]`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&mut self) -> Result<Vec<f32>> {
        let mut words = vec![];
        read(&mut self.file, &self.path, self.vocab, &mut words)?;
        Ok(words.into_iter().map(f32::from_le_bytes).collect())
    }
}

fn open(path: &Path) -> Result<(BufReader<File>, u64)> {
    let cannot = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(cannot)?;
    let found = file.metadata().with_context(cannot)?;
    ensure!(found.is_file(), "cannot read {}: expected a regular file", path.display());
    Ok((BufReader::new(file), found.len()))
}

fn read(file: &mut impl Read, path: &Path, count: usize, words: &mut Vec<[u8; 4]>) -> Result<()> {
    words.resize(count, [0; 4]);
    file.read_exact(words.as_flattened_mut()).with_context(|| format!("cannot read {}", path.display()))
}

/// How samples run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct How {
    /// Rows of one sample in a step, at the most.
    pub chunk: Option<usize>,
    /// On which ranks, if there are several.
    pub mode: Mode,
}

/// Runs the first `count` samples, each as a prompt of one new token, and gives `take` their logits in order. The time is that
/// in which steps ran, without reading samples and taking logits; among ranks, that until the last logits were taken.
///
/// # Errors
/// A sample is none for this plan, the executor failed, or `take` did.
pub fn run(
    executor: &mut dyn Executor,
    how: How,
    inputs: &mut Inputs,
    count: usize,
    world: &mut World,
    take: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<Timed> {
    let vocab = executor.manifest().model.vocab;
    let options = Options { chunk: how.chunk, capture_logits: true, capture_prompt_logits: false };
    let bar = progress::count("samples", count as u64);
    let mut run = Run { inputs, vocab, count, asked: 0, taken: 0, ordered: Ordered::default(), take, bar };
    let mut generator = Generator::new(executor, options)?;
    let begun = Instant::now();
    let ranks = world.run(&mut generator, &mut run, options, how.mode)?;
    let elapsed = begun.elapsed();
    run.bar.finish_and_clear();
    let statistics = generator.statistics();
    let steps = statistics.prefill.elapsed + statistics.decode.elapsed;
    Ok(Timed { seconds: if ranks.is_empty() { steps } else { elapsed }.as_secs_f64(), ranks })
}

/// How long samples took.
pub struct Timed {
    /// In all.
    pub seconds: f64,
    /// What each rank did, if there are several.
    pub ranks: Vec<Summary>,
}

struct Run<'r> {
    inputs: &'r mut Inputs,
    vocab: u64,
    count: usize,
    asked: usize,
    taken: usize,
    ordered: Ordered<Vec<f32>>,
    take: &'r mut dyn FnMut(usize, &[f32]) -> Result<()>,
    bar: ProgressBar,
}

impl Work for Run<'_> {
    fn next(&mut self) -> Result<Option<Request>> {
        if self.asked == self.count {
            return Ok(None);
        }
        let id = self.asked as u64;
        self.asked += 1;
        let (prompt, sampling) = (self.inputs.read(self.vocab)?, SamplingParams::default());
        Ok(Some(Request { id, prompt, max_new_tokens: 1, sampling, ..Request::default() }))
    }

    fn token(&mut self, _: u64, _: u32) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn finished(&mut self, sample: usize, result: std::result::Result<Finished, RequestError>) -> Result<()> {
        let finished = result.with_context(|| format!("{}: sample {sample}", self.inputs.path.display()))?;
        self.ordered.put(sample, finished.logits);
        while let Some(logits) = self.ordered.take() {
            (self.take)(self.taken, &logits)?;
            self.taken += 1;
        }
        self.bar.inc(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, words: &[i32], more: usize) -> PathBuf {
        let path = folder.join("inputs.bin");
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize(bytes.len() + more, 0);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn samples_are_read_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut inputs = Inputs::open(&write(folder.path(), &[2, 3, 1, 2, 3, 4, 5, 96], 0)).unwrap();
        assert_eq!((inputs.count, inputs.length), (2, 3));
        assert_eq!(inputs.read(96).unwrap(), [1, 2, 3]);
        let error = inputs.read(96).unwrap_err().to_string();
        assert!(error.ends_with("sample 1, token 2: expected an id from 0 to 95, found 96"), "{error}");
        let mut inputs = Inputs::open(&write(folder.path(), &[1, 1, -1], 0)).unwrap();
        assert!(inputs.read(96).unwrap_err().to_string().contains("found -1"));
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cases: [(&[i32], usize, &str); 8] = [
            (&[], 0, "found 0 bytes"),
            (&[2], 3, "found 7 bytes"),
            (&[0, 3], 0, "count 0, length 3"),
            (&[2, 0], 0, "count 2, length 0"),
            (&[-2, 3], 0, "count -2"),
            (&[2, 2, 1, 2, 3], 0, "expected 24 bytes for 2 samples of 2 tokens, found 20"),
            (&[1, 2, 1, 2], 1, "expected 16 bytes for 1 samples of 2 tokens, found 17"),
            (&[i32::MAX, i32::MAX], 0, "found 8"),
        ];
        for (words, more, expected) in cases {
            let error = Inputs::open(&write(folder.path(), words, more)).unwrap_err().to_string();
            assert!(error.contains(expected), "{words:?}: {error}");
        }
        let path = write(folder.path(), &[0; 6], 0);
        let error = Answers::open(&path, 3, 4).unwrap_err().to_string();
        assert!(error.contains("expected 48 bytes") && error.contains("found 24"), "{error}");
        let mut answers = Answers::open(&path, 2, 3).unwrap();
        assert_eq!(answers.read().unwrap(), [0.0; 3]);
    }
}
