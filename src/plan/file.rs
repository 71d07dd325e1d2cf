//! The container of a plan: one file of hashed sections.
//!
//! ```text
//! magic            8 bytes, `LFM2PLAN`
//! format version   u32
//! sections         u32, their number
//! table            for each section: kind u32, zero u32, offset u64, bytes u64, BLAKE3 of its bytes
//! header hash      BLAKE3 of all of the above
//! sections         one after the other, without gaps, to the end of the file
//! ```
//!
//! Numbers are little-endian. Sections in order: the manifest (RON), the recipe, then one graph text after the other, then the
//! machine code of one kernel after the other.

mod text;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::plan::validate::{Fault, validate};
use crate::plan::{FORMAT_VERSION, Manifest};

const MAGIC: &[u8; 8] = b"LFM2PLAN";
const HASH_BYTES: usize = blake3::OUT_LEN;
const ENTRY_BYTES: usize = 24 + HASH_BYTES;
/// Magic, version and number of sections.
const PREFIX_BYTES: usize = 16;
/// More sections than any plan has.
const MAX_SECTIONS: usize = 1 << 12;
/// Larger than any plan: a file beyond this is not read.
const MAX_FILE_BYTES: u64 = 1 << 28;

/// A plan file's contents.
#[derive(Clone, PartialEq, Debug)]
pub struct PlanFile {
    /// What the runtime obeys.
    pub manifest: Manifest,
    /// The recipe it was compiled from, RON; empty for a graph in text form.
    pub recipe: String,
    /// The final graphs, in text form, each once; [`crate::plan::Bucket::text`] is a position here.
    pub texts: Vec<String>,
    /// Machine code, each once; [`crate::plan::Kernel::cubin`] is a position here.
    pub cubins: Vec<Vec<u8>>,
}

/// Why bytes are no plan to run.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Too large to be a plan.
    #[error("the file has {found} bytes, a plan at most {MAX_FILE_BYTES}: this is no plan file")]
    TooLarge {
        /// Its size.
        found: u64,
    },
    /// Something else.
    #[error(
        "this is no plan file: expected \"LFM2PLAN\" at its beginning, found {found:?}; make one with `lfm2c compile`"
    )]
    NotAPlan {
        /// The first bytes.
        found: String,
    },
    /// A plan of another format version.
    #[error("plan format version: expected {expected}, found {found}; compile the plan again with this lfm2c")]
    Version {
        /// What this program reads.
        expected: u32,
        /// The file's.
        found: u32,
    },
    /// The file ends too early.
    #[error("the plan is truncated: expected {expected} bytes, found {found}; copy or compile it again")]
    Truncated {
        /// Bytes by the header.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The file does not end where the last section does.
    #[error("bytes follow the plan's end: expected {expected} bytes, found {found}; copy or compile it again")]
    Trailing {
        /// Bytes by the header.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// Bytes have changed since the plan was written.
    #[error("the plan's {section} is damaged: expected BLAKE3 {expected}, found {found}; copy or compile it again")]
    Damaged {
        /// Header or section.
        section: String,
        /// The hash in the file.
        expected: String,
        /// The hash of the bytes.
        found: String,
    },
    /// The section table, though undamaged, is none that this version writes.
    #[error("the plan's section table: {0}; compile the plan again with this lfm2c")]
    Table(String),
    /// A section that is no text.
    #[error("the plan's {section} is no UTF-8 at byte {at}; compile the plan again with this lfm2c")]
    NotText {
        /// Which.
        section: String,
        /// The first byte that is none.
        at: usize,
    },
    /// The manifest is no manifest.
    #[error("the plan's manifest, line {line}, column {column}: {message}; compile the plan again with this lfm2c")]
    Manifest {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// What was expected.
        message: String,
    },
    /// The manifest states something that does not hold.
    #[error("the plan does not hold:\n{}\ncompile it again with this lfm2c", list(.0))]
    Invalid(Vec<Fault>),
}

fn list(faults: &[Fault]) -> String {
    faults.iter().map(|fault| format!("  {fault}")).collect::<Vec<_>>().join("\n")
}

impl PlanFile {
    /// The manifest as text: RON, with a line for each tensor, weight, state, buffer and step.
    pub fn manifest_text(&self) -> String {
        text::print(&self.manifest)
    }

    /// Reads what [`PlanFile::manifest_text`] wrote, or RON of the same meaning; does not validate it.
    ///
    /// # Errors
    /// The first thing that does not belong into a manifest, with line and column.
    pub fn parse_manifest(text: &str) -> Result<Manifest, PlanError> {
        text::parse(text)
    }

    /// The file's bytes: the same for the same plan.
    pub fn to_bytes(&self) -> Vec<u8> {
        let manifest = self.manifest_text();
        let mut sections = vec![(Kind::Manifest, manifest.as_bytes()), (Kind::Recipe, self.recipe.as_bytes())];
        sections.extend(self.texts.iter().map(|text| (Kind::Text, text.as_bytes())));
        sections.extend(self.cubins.iter().map(|cubin| (Kind::Cubin, &cubin[..])));
        seal(&sections)
    }

    /// Reads and validates a plan.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes, down to the last rule of [`validate`]; never a panic.
    pub fn from_bytes(bytes: &[u8]) -> Result<PlanFile, PlanError> {
        let sections = sections(bytes)?;
        let (mut texts, mut cubins) = (vec![], vec![]);
        for (i, (kind, section)) in sections.into_iter().enumerate() {
            match kind {
                Kind::Cubin => cubins.push(section.to_vec()),
                _ => texts.push(text(kind, section, i)?),
            }
        }
        let mut texts = texts.into_iter();
        let manifest = PlanFile::parse_manifest(texts.next().unwrap_or_default())?;
        let recipe = texts.next().unwrap_or_default().to_owned();
        let texts = texts.map(str::to_owned).collect();
        let file = PlanFile { manifest, recipe, texts, cubins };
        file.validate()?;
        Ok(file)
    }

    /// Checks the manifest against every rule.
    ///
    /// # Errors
    /// All that does not hold.
    pub fn validate(&self) -> Result<(), PlanError> {
        validate(&self.manifest, self.texts.len(), self.cubins.len()).map_err(PlanError::Invalid)
    }

    /// BLAKE3 of the file's bytes, in hexadecimal.
    pub fn hash(&self) -> String {
        blake3::hash(&self.to_bytes()).to_hex().to_string()
    }

    /// Reads and validates a plan file.
    ///
    /// # Errors
    /// As [`PlanFile::from_bytes`], or the file cannot be read.
    pub fn read(path: &Path) -> Result<PlanFile, PlanError> {
        let failed = |source| PlanError::File { path: path.to_owned(), source };
        let found = fs::metadata(path).map_err(failed)?.len();
        if found > MAX_FILE_BYTES {
            return Err(PlanError::TooLarge { found });
        }
        PlanFile::from_bytes(&fs::read(path).map_err(failed)?)
    }

    /// Writes the plan file: under another name first, so that nobody ever sees half a plan. What is there and is no file,
    /// such as a device or a pipe, is written to as it is; a link keeps pointing where it does.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), PlanError> {
        let failed = |source| PlanError::File { path: path.to_owned(), source };
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if fs::metadata(&target).is_ok_and(|found| !found.is_file()) {
            return File::create(&target).and_then(|mut file| file.write_all(&self.to_bytes())).map_err(failed);
        }
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = target.with_file_name(name);
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&self.to_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &target)
        };
        write().map_err(|source| {
            // The error to report is the first one; a leftover file is harmless.
            let _ = fs::remove_file(&temporary);
            failed(source)
        })
    }
}

/// A file of these sections: header, hashes, bytes. For [`PlanFile::to_bytes`], and for tests that need false sections under
/// true hashes.
pub fn seal(sections: &[(Kind, &[u8])]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(FORMAT_VERSION.to_le_bytes());
    bytes.extend((sections.len() as u32).to_le_bytes());
    let mut offset = header_bytes(sections.len()) as u64;
    for (kind, section) in sections {
        bytes.extend(kind.code().to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend((section.len() as u64).to_le_bytes());
        bytes.extend(blake3::hash(section).as_bytes());
        offset += section.len() as u64;
    }
    let header = blake3::hash(&bytes);
    bytes.extend(header.as_bytes());
    sections.iter().for_each(|(_, section)| bytes.extend_from_slice(section));
    bytes
}

/// What a section holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// The manifest, RON.
    Manifest,
    /// The recipe, RON.
    Recipe,
    /// A bucket's final graph.
    Text,
    /// A kernel's machine code.
    Cubin,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Manifest, Kind::Recipe, Kind::Text, Kind::Cubin];

    fn code(self) -> u32 {
        self as u32 + 1
    }

    fn name(self, position: usize) -> String {
        match self {
            Kind::Manifest => "manifest".into(),
            Kind::Recipe => "recipe".into(),
            Kind::Text => format!("graph text {}", position.saturating_sub(2)),
            Kind::Cubin => format!("machine code in section {position}"),
        }
    }
}

fn header_bytes(sections: usize) -> usize {
    PREFIX_BYTES + sections * ENTRY_BYTES + HASH_BYTES
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// The sections' bytes, once header and hashes hold.
fn sections(bytes: &[u8]) -> Result<Vec<(Kind, &[u8])>, PlanError> {
    let found = bytes.len() as u64;
    let magic = &bytes[..bytes.len().min(MAGIC.len())];
    if magic != &MAGIC[..magic.len()] || magic.is_empty() {
        return Err(PlanError::NotAPlan { found: String::from_utf8_lossy(magic).into_owned() });
    }
    if bytes.len() < PREFIX_BYTES {
        return Err(PlanError::Truncated { expected: header_bytes(2) as u64, found });
    }
    let version = u32::from_le_bytes(number(bytes, 8));
    if version != FORMAT_VERSION {
        return Err(PlanError::Version { expected: FORMAT_VERSION, found: version });
    }
    let count = u32::from_le_bytes(number(bytes, 12)) as usize;
    if !(2..=MAX_SECTIONS).contains(&count) {
        return Err(PlanError::Table(format!("expected 2 to {MAX_SECTIONS} sections, found {count}")));
    }
    let start = header_bytes(count);
    if bytes.len() < start {
        return Err(PlanError::Truncated { expected: start as u64, found });
    }
    check_hash("header", &bytes[..start - HASH_BYTES], &bytes[start - HASH_BYTES..start])?;
    let mut offset = start as u64;
    let mut ranges = vec![];
    let mut last = Kind::Manifest;
    for i in 0..count {
        let at = PREFIX_BYTES + i * ENTRY_BYTES;
        // The first two are what they are; of the others, machine code comes last.
        let kind = match i {
            0 => Kind::Manifest,
            1 => Kind::Recipe,
            _ => {
                let code = u32::from_le_bytes(number(bytes, at));
                let found = Kind::ALL.into_iter().find(|kind| kind.code() == code && *kind >= Kind::Text.max(last));
                found.unwrap_or(Kind::Cubin)
            }
        };
        last = kind;
        let entry = (u32::from_le_bytes(number(bytes, at)), u32::from_le_bytes(number(bytes, at + 4)));
        let (from, size) = (u64::from_le_bytes(number(bytes, at + 8)), u64::from_le_bytes(number(bytes, at + 16)));
        let end = from.checked_add(size).filter(|&end| end <= MAX_FILE_BYTES);
        let (true, Some(end)) = (entry == (kind.code(), 0) && from == offset, end) else {
            return Err(PlanError::Table(format!(
                "section {i}: expected kind {} ({}) at byte {offset}, found kind {} at byte {from}, {size} bytes",
                kind.code(),
                kind.name(i),
                entry.0,
            )));
        };
        ranges.push((kind, from, end, &bytes[at + 24..at + ENTRY_BYTES]));
        offset = end;
    }
    if found < offset {
        return Err(PlanError::Truncated { expected: offset, found });
    }
    if found > offset {
        return Err(PlanError::Trailing { expected: offset, found });
    }
    let mut sections = vec![];
    for (i, (kind, from, end, hash)) in ranges.into_iter().enumerate() {
        let section = &bytes[from as usize..end as usize];
        check_hash(&kind.name(i), section, hash)?;
        sections.push((kind, section));
    }
    Ok(sections)
}

fn check_hash(section: &str, bytes: &[u8], expected: &[u8]) -> Result<(), PlanError> {
    let found = blake3::hash(bytes);
    if found.as_bytes() == expected {
        return Ok(());
    }
    let expected = expected.iter().map(|byte| format!("{byte:02x}")).collect();
    Err(PlanError::Damaged { section: section.to_owned(), expected, found: found.to_hex().to_string() })
}

fn text(kind: Kind, section: &[u8], position: usize) -> Result<&str, PlanError> {
    std::str::from_utf8(section)
        .map_err(|fault| PlanError::NotText { section: kind.name(position), at: fault.valid_up_to() })
}

#[cfg(test)]
mod tests;
