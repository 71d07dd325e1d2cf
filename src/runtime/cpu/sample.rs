//! The choice of each row's next token.

use anyhow::{Context, Result, ensure};

use super::parallel::{SMALL, map};
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
        ensure!(count > 0 && logits.len().is_multiple_of(count), "{} logits for {count} rows", logits.len());
        let vocab = logits.len() / count;
        ensure!(vocab > 0, "no logits");
        map(logits.len() > SMALL, count, |i| {
            let Ok(row) = usize::try_from(self.rows[i]) else { return Ok(-1) };
            let at = |list: &[i32]| list.get(row).copied().with_context(|| format!("row {row} of {}", list.len()));
            let (Ok(slot), Ok(pos)) = (usize::try_from(at(self.slots)?), u64::try_from(at(self.pos)?)) else {
                return Ok(-1);
            };
            let params = self.params.chunks_exact(SAMPLING_COLUMNS as usize).nth(slot);
            let params = SamplingParams::from_row(params.with_context(|| format!("slot {slot} has no parameters"))?);
            Ok(i32::try_from(choose(&logits.part(i * vocab, vocab)?.to_f32()?, &params, pos))?)
        })
    }
}
