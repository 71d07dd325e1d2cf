//! What ranks of a group tell each other, once in a while.

use anyhow::{Context, Error, Result, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Group;

/// Bytes of what a rank tells the others, as JSON.
const TOLD_BYTES: usize = 4096;

/// Characters of a fault that a rank tells the others.
pub const FAULT_CHARS: usize = 300;

/// A fault, as far as a rank tells it to the others.
pub fn short(error: &Error) -> String {
    format!("{error:#}").chars().take(FAULT_CHARS).collect()
}

/// Tells all ranks of a group, and hears what each of them tells, by rank. All ranks call it.
///
/// # Errors
/// More than a rank may tell, or one of them is no more.
pub fn tell<T: Serialize + DeserializeOwned>(group: &mut dyn Group, own: &T) -> Result<Vec<T>> {
    let mut sent = serde_json::to_vec(own)?;
    ensure!(
        sent.len() <= TOLD_BYTES,
        "what a rank tells the others: expected at most {TOLD_BYTES} bytes, found {}",
        sent.len()
    );
    sent.resize(TOLD_BYTES, b' ');
    let mut received = vec![0; group.size() * TOLD_BYTES];
    group.all_gather(&sent, &mut received)?;
    received.chunks(TOLD_BYTES).map(|told| serde_json::from_slice(told).context("what another rank tells")).collect()
}
