//! Machine code: kernels' texts compiled side by side, each once for all time, in a cache on disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rayon::prelude::*;

use super::kernels::HEADERS;
use crate::cuda::{Nvrtc, NvrtcError};
use crate::plan::Target;

/// A kernel's text before it is machine code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// Its symbol.
    pub name: String,
    /// Generated constants and the source file.
    pub text: String,
}

impl Source {
    /// BLAKE3 of all that it is compiled from, in hexadecimal.
    pub fn hash(&self, target: Target) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |part: &str| {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        };
        add(&self.name);
        add(&self.text);
        for (name, text) in included(&self.text) {
            add(name);
            add(text);
        }
        options(target).iter().for_each(|option| add(option));
        hasher.finalize().to_hex().to_string()
    }
}

/// The headers that a text includes, and those that these include, in the order of [`HEADERS`].
fn included(text: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let names = |text: &str| -> Vec<usize> {
        let quoted = text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
        quoted.filter_map(|name| HEADERS.iter().position(|header| header.0 == name)).collect()
    };
    let mut found = [false; HEADERS.len()];
    let mut left = names(text);
    while let Some(header) = left.pop() {
        if !std::mem::replace(&mut found[header], true) {
            left.extend(names(HEADERS[header].1));
        }
    }
    HEADERS.iter().zip(found).filter_map(|(header, found)| found.then_some(*header))
}

/// What compiling did.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Compilation {
    /// Kernels compiled.
    pub compiled: usize,
    /// Kernels found in the cache.
    pub cached: usize,
    /// Bytes of machine code.
    pub bytes: usize,
    /// The compiler's version.
    pub toolkit: (u32, u32),
    /// Time it took.
    pub elapsed: Duration,
}

fn options(target: Target) -> Vec<String> {
    let architecture = match target {
        Target::Cpu => unreachable!("the CPU has no kernels"),
        Target::Sm_90a => "sm_90a",
    };
    vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".into(),
        "--device-as-default-execution-space".into(),
    ]
}

/// Compiles every source that the cache does not have; `progress` hears how many of all are done.
///
/// # Errors
/// No compiler, one that cannot compile for the target, or a source that does not compile.
pub fn build(
    target: Target,
    sources: &[Source],
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(Vec<Vec<u8>>, Compilation)> {
    let started = Instant::now();
    let nvrtc = Nvrtc::load()?;
    let (major, minor) = nvrtc.version();
    if major < 13 {
        return Err(
            NvrtcError::Unable { expected: "sm_90a with CUDA 13".into(), found: format!("{major}.{minor}") }.into()
        );
    }
    let folder = dirs::cache_dir().map(|root| root.join("lfm2c").join(format!("cubins-{major}.{minor}")));
    let (done, cached) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let cubins: Vec<Vec<u8>> = sources
        .par_iter()
        .map(|source| {
            let place = folder.as_ref().map(|folder| folder.join(format!("{}.cubin", source.hash(target))));
            let found = place.as_ref().and_then(|place| fs::read(place).ok()).filter(|cubin| is_elf(cubin));
            let cubin = match found {
                Some(cubin) => {
                    cached.fetch_add(1, Ordering::Relaxed);
                    cubin
                }
                None => {
                    let cubin = nvrtc.compile(&source.name, &source.text, HEADERS, &options(target))?;
                    if let Some(place) = &place {
                        // A cache that cannot be written costs time, nothing else.
                        let _ = store(place, &cubin);
                    }
                    cubin
                }
            };
            progress(1 + done.fetch_add(1, Ordering::Relaxed), sources.len());
            Ok(cubin)
        })
        .collect::<Result<_, NvrtcError>>()?;
    let cached = cached.into_inner();
    let bytes = cubins.iter().map(Vec::len).sum();
    Ok((
        cubins,
        Compilation {
            compiled: sources.len() - cached,
            cached,
            bytes,
            toolkit: (major, minor),
            elapsed: started.elapsed(),
        },
    ))
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Writes a file under another name first, so that nobody ever reads half of one.
fn store(place: &Path, bytes: &[u8]) -> Result<()> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let folder = place.parent().context("a file without a folder")?;
    fs::create_dir_all(folder)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let temporary: PathBuf = folder.join(format!(".{}-{number}.tmp", std::process::id()));
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, place).inspect_err(|_| {
        // The error to report is the first one.
        let _ = fs::remove_file(&temporary);
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_covers_what_is_included_and_no_more() {
        let names = |text: &str| -> Vec<&str> { included(text).map(|header| header.0).collect() };
        assert_eq!(names("// \"wgmma.cuh\"\nint x;"), [""; 0]);
        let found = names("#include \"ring_packed.cuh\"\nint x;");
        let expected =
            ["bulk.cuh", "eight.cuh", "mma.cuh", "packed.cuh", "ring_packed.cuh", "ring_sums.cuh", "types.cuh"];
        assert_eq!(found, expected);
    }
}
