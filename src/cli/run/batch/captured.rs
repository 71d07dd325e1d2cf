//! The logits of a batch, kept until all of them can be written.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{Arguments, write_npy};
use crate::runtime::{Finished, logits_table};

/// Sequences whose logits are to be written, by place.
#[derive(Default)]
pub struct Captured {
    sequences: BTreeMap<usize, Finished>,
    max_new_tokens: usize,
}

impl Captured {
    /// Keeps a sequence that may have had so many new tokens.
    pub fn keep(&mut self, place: usize, max_new_tokens: usize, finished: Finished) {
        self.max_new_tokens = self.max_new_tokens.max(max_new_tokens);
        self.sequences.insert(place, finished);
    }

    /// Writes what was asked for, if any sequence of `count` ran.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, arguments: &Arguments, count: usize, vocab: u64) -> Result<()> {
        let Some(first) = self.sequences.values().next() else { return Ok(()) };
        if let Some(path) = &arguments.logits {
            let rows = (0..count).map(|place| self.sequences.get(&place));
            let table = logits_table(rows, self.max_new_tokens, vocab as usize);
            write_npy(path, &[count as u64, self.max_new_tokens as u64, vocab], &table)?;
        }
        if let Some(path) = &arguments.prompt_logits {
            write_npy(path, &[first.prompt_tokens as u64, vocab], &first.prompt_logits)?;
        }
        Ok(())
    }
}
