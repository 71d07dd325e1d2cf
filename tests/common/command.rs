//! Calls of the binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A path of this project.
pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Calls the binary.
pub fn lfm2c(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfm2c"));
    command.current_dir(folder).args(arguments).output().expect("the binary starts")
}

/// Standard output of a call that must succeed.
#[track_caller]
pub fn done(folder: &Path, arguments: &[&str]) -> String {
    let output = lfm2c(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the output is UTF-8")
}
