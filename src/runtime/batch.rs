//! Checks of a batch, the same for every executor.

use anyhow::{Result, bail, ensure};

use crate::plan::{Bucket, Manifest, Phase};
use crate::runtime::Batch;

/// Checks that a batch fits a bucket and the plan's limits, and is in order.
///
/// # Errors
/// What does not fit, with expected and found.
pub fn check(batch: &Batch, bucket: &Bucket, manifest: &Manifest) -> Result<()> {
    let (limits, count) = (&manifest.limits, batch.tokens.len());
    ensure!(
        batch.positions.len() == count && batch.slots.len() == count,
        "{count} tokens, {} positions and {} slots: expected as many of each",
        batch.positions.len(),
        batch.slots.len()
    );
    ensure!(count as u64 <= bucket.tokens, "{count} rows, the bucket has {}", bucket.tokens);
    let inside = |value: i32, limit: u64| u64::try_from(value).is_ok_and(|value| value < limit);
    let mut seen = vec![];
    for t in 0..count {
        let (token, pos, slot) = (batch.tokens[t], batch.positions[t], batch.slots[t]);
        ensure!(
            inside(token, manifest.model.vocab),
            "row {t}: token {token} of a vocabulary of {}",
            manifest.model.vocab
        );
        ensure!(inside(pos, limits.max_context), "row {t}: position {pos}, a sequence has {}", limits.max_context);
        ensure!(inside(slot, limits.max_sequences), "row {t}: slot {slot} of {}", limits.max_sequences);
        if t == 0 || batch.slots[t - 1] != slot {
            seen.push(slot);
            continue;
        }
        if bucket.phase == Phase::Decode {
            bail!("rows {} and {t} are of slot {slot}: a decode bucket takes one row a sequence", t - 1);
        }
        let before = batch.positions[t - 1];
        ensure!(before < pos, "rows {} and {t} of slot {slot}: position {pos} after {before} does not ascend", t - 1);
    }
    let runs = seen.len();
    ensure!(runs as u64 <= bucket.sequences, "{runs} sequences, the bucket has {}", bucket.sequences);
    seen.sort_unstable();
    if let Some(pair) = seen.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("rows of slot {} are not adjacent", pair[0]);
    }
    check_rows(&batch.rows, count, bucket)
}

/// Checks the rows that get logits, of a batch of `count` rows.
///
/// # Errors
/// What does not fit, with expected and found.
pub fn check_rows(rows: &[i32], count: usize, bucket: &Bucket) -> Result<()> {
    ensure!(rows.len() as u64 <= bucket.rows, "logits of {} rows, the bucket has {}", rows.len(), bucket.rows);
    let outside = rows.iter().find(|row| !usize::try_from(**row).is_ok_and(|row| row < count));
    if let Some(row) = outside {
        bail!("logits of row {row}, the batch has {count}");
    }
    Ok(())
}
