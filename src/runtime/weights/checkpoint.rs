//! A Hugging Face checkpoint directory, mapped into memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;

use super::header::{HeaderError, UniqueMap, parse_header};
use crate::plan::DType;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a checkpoint directory: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
///
/// The files are mapped, not read: they must not be changed or cut while this lives.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: DType,
    shape: Vec<u64>,
    bytes: Range<usize>,
}

/// A tensor of a checkpoint.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CheckpointTensor<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: &'a [u64],
    /// Elements, row-major and little-endian, of any alignment.
    pub data: &'a [u8],
}

/// Why a checkpoint directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// No weights in the directory.
    #[error("{dir}: expected `{SINGLE}` or `{INDEX}`, found neither; name a Hugging Face checkpoint directory", dir = .dir.display())]
    NotFound {
        /// The directory.
        dir: PathBuf,
    },
    /// A file cannot be read.
    #[error("{file}: cannot be read: {source}", file = .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A shard is not what safetensors files are.
    #[error("{file}: {source}", file = .file.display())]
    Header {
        /// The shard.
        file: PathBuf,
        /// Why.
        source: HeaderError,
    },
    /// The index is no index.
    #[error("{file}: expected JSON with `weight_map` from each tensor's name, once, to its file, found: {found}; download it again", file = .file.display())]
    Index {
        /// The index.
        file: PathBuf,
        /// What the parser says.
        found: String,
    },
    /// The index names a file outside the directory.
    #[error("{file}: tensor `{tensor}`: expected the name of a file beside the index, found `{found}`; download the index again", file = .file.display())]
    ShardName {
        /// The index.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard's name.
        found: String,
    },
    /// The index names a shard that is not there.
    #[error("{file}: expected this shard, which `{INDEX}` names for {tensors} tensors such as `{tensor}`, found no such file; download it", file = .file.display())]
    NoShard {
        /// The shard.
        file: PathBuf,
        /// The first of its tensors.
        tensor: String,
        /// How many it should hold.
        tensors: usize,
    },
    /// A shard lacks tensors that the index places there.
    #[error(
        "{file}: expected {count} more tensors that `{INDEX}` places here: {names}; shard and index are of different checkpoints, download both again",
        file = .file.display(), count = .tensors.len(), names = .tensors.join(", ")
    )]
    NotInShard {
        /// The shard.
        file: PathBuf,
        /// The tensors.
        tensors: Vec<String>,
    },
    /// Two shards hold a tensor of the same name.
    #[error("{file}: expected tensor `{tensor}` in one file, found it in {other} too; download the shards again", file = .file.display(), other = .other.display())]
    Duplicate {
        /// The later shard.
        file: PathBuf,
        /// The earlier shard.
        other: PathBuf,
        /// The tensor.
        tensor: String,
    },
}

/// What is used of the index.
#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl Checkpoint {
    /// Opens the directory's files and checks all headers; `model.safetensors` goes before an index.
    ///
    /// # Errors
    /// A file is missing or damaged, or index and shards disagree.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let mut checkpoint = Checkpoint { dir: dir.to_owned(), files: Vec::new(), entries: BTreeMap::new() };
        if dir.join(SINGLE).exists() {
            checkpoint.add(dir.join(SINGLE), &[])?;
            return Ok(checkpoint);
        }
        let index = dir.join(INDEX);
        let text = match std::fs::read(&index) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CheckpointError::NotFound { dir: dir.to_owned() });
            }
            Err(source) => return Err(CheckpointError::Io { file: index, source }),
        };
        for (shard, tensors) in shards(&index, &text)? {
            let file = dir.join(shard);
            if !file.exists() {
                let tensor = tensors.first().cloned().unwrap_or_default();
                return Err(CheckpointError::NoShard { file, tensor, tensors: tensors.len() });
            }
            checkpoint.add(file, &tensors)?;
        }
        Ok(checkpoint)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = CheckpointTensor<'_>> {
        self.entries.iter().map(|(name, entry)| self.view(name, entry))
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<CheckpointTensor<'_>> {
        self.entries.get_key_value(name).map(|(name, entry)| self.view(name, entry))
    }

    /// Element type and shape of each tensor.
    pub fn listing(&self) -> BTreeMap<String, (DType, Vec<u64>)> {
        self.entries.iter().map(|(name, entry)| (name.clone(), (entry.dtype, entry.shape.clone()))).collect()
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> CheckpointTensor<'a> {
        let data = &self.files[entry.file].map[entry.bytes.clone()];
        CheckpointTensor { name, dtype: entry.dtype, shape: &entry.shape, data }
    }

    /// Adds a file's tensors, among which must be the ones named.
    fn add(&mut self, path: PathBuf, expected: &[String]) -> Result<(), CheckpointError> {
        let map = match map(&path) {
            Ok(map) => map,
            Err(source) => return Err(CheckpointError::Io { file: path, source }),
        };
        let header = match parse_header(&map) {
            Ok(header) => header,
            Err(source) => return Err(CheckpointError::Header { file: path, source }),
        };
        let found: BTreeSet<&str> = header.iter().map(|entry| entry.name.as_str()).collect();
        let missing: Vec<String> = expected.iter().filter(|name| !found.contains(name.as_str())).cloned().collect();
        if !missing.is_empty() {
            return Err(CheckpointError::NotInShard { file: path, tensors: missing });
        }
        for entry in header {
            if let Some(earlier) = self.entries.get(&entry.name) {
                let other = self.files[earlier.file].path.clone();
                return Err(CheckpointError::Duplicate { file: path, other, tensor: entry.name });
            }
            let value = Entry { file: self.files.len(), dtype: entry.dtype, shape: entry.shape, bytes: entry.bytes };
            self.entries.insert(entry.name, value);
        }
        self.files.push(Shard { path, map });
        Ok(())
    }
}

/// Reads an index: the tensors of each shard.
fn shards(index: &Path, text: &[u8]) -> Result<BTreeMap<String, Vec<String>>, CheckpointError> {
    let Index { weight_map: UniqueMap(places) } = serde_json::from_slice(text)
        .map_err(|error| CheckpointError::Index { file: index.to_owned(), found: error.to_string() })?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in places {
        if Path::new(&shard).file_name() != Some(shard.as_ref()) {
            return Err(CheckpointError::ShardName { file: index.to_owned(), tensor, found: shard });
        }
        shards.entry(shard).or_default().push(tensor);
    }
    Ok(shards)
}

fn map(path: &Path) -> io::Result<Mmap> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("expected a file, found a directory or a device"));
    }
    let file = File::open(path)?;
    // SAFETY: the map is read-only and private to `Checkpoint`, whose documentation asks that nobody changes or cuts the
    // file while it lives. All ranges of it that are used were checked against its length.
    #[allow(unsafe_code)]
    unsafe {
        Mmap::map(&file)
    }
}
