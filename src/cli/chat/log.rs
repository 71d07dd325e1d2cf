//! The log: a JSON object a line, there as soon as the turn is over.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// Where turns are written, if anywhere.
pub(super) struct Log(Option<(PathBuf, File)>);

impl Log {
    /// Creates the file, or empties it.
    pub(super) fn create(path: Option<&Path>) -> Result<Log> {
        let open = |path: &Path| -> Result<(PathBuf, File)> {
            let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
            Ok((path.to_owned(), file))
        };
        Ok(Log(path.map(open).transpose()?))
    }

    /// Writes a turn.
    pub(super) fn write(&mut self, turn: &Value) -> Result<()> {
        match &mut self.0 {
            Some((path, file)) => {
                // In one piece, since somebody may read along.
                let line = format!("{turn}\n");
                file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
            }
            None => Ok(()),
        }
    }
}
