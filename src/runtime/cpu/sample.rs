//! The choice of each row's next token.

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use super::tensor::View;
use crate::plan::SAMPLING_COLUMNS;
use crate::runtime::SamplingParams;
use crate::runtime::sampling::choose;

/// What sampling takes besides logits.
pub(super) struct Sample<'a> {
    /// The batch's row of each row of logits; negative in padding.
    pub(super) rows: &'a [i32],
    pub(super) pos: &'a [i32],
    pub(super) slots: &'a [i32],
    /// The sampling table.
    pub(super) params: &'a [i32],
}

impl Sample<'_> {
    /// The next token of each row, -1 where the row is negative or padding.
    pub(super) fn compute(&self, logits: View) -> Result<Vec<i32>> {
        let count = self.rows.len();
        ensure!(count > 0 && logits.len() % count == 0, "{} logits for {count} rows", logits.len());
        let vocab = logits.len() / count;
        ensure!(vocab > 0, "no logits");
        self.rows
            .par_iter()
            .enumerate()
            .map(|(i, &row)| {
                let Ok(row) = usize::try_from(row) else { return Ok(-1) };
                let at = |list: &[i32]| list.get(row).copied().with_context(|| format!("row {row} of {}", list.len()));
                let (Ok(slot), Ok(pos)) = (usize::try_from(at(self.slots)?), u64::try_from(at(self.pos)?)) else {
                    return Ok(-1);
                };
                let columns = SAMPLING_COLUMNS as usize;
                let params = self.params.chunks_exact(columns).nth(slot);
                let params =
                    SamplingParams::from_row(params.with_context(|| format!("slot {slot} has no parameters"))?);
                let logits = logits.part(i * vocab, vocab)?.to_f32()?;
                Ok(i32::try_from(choose(&logits, &params, pos))?)
            })
            .collect()
    }
}
