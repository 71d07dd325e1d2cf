//! Checks of a batch, the same for every executor.

use anyhow::{Result, bail, ensure};

use crate::plan::{Bucket, Manifest, Phase};
use crate::runtime::{Batch, PENDING};

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
    let (mut runs, mut apart) = (0u64, None);
    for t in 0..count {
        let (token, pos, slot) = (batch.tokens[t], batch.positions[t], batch.slots[t]);
        ensure!(
            token == PENDING || inside(token, manifest.model.vocab),
            "row {t}: token {token} of a vocabulary of {}",
            manifest.model.vocab
        );
        ensure!(inside(pos, limits.max_context), "row {t}: position {pos}, a sequence has {}", limits.max_context);
        ensure!(inside(slot, limits.max_sequences), "row {t}: slot {slot} of {}", limits.max_sequences);
        if t == 0 || batch.slots[t - 1] != slot {
            runs += 1;
            if batch.slots[..t].contains(&slot) {
                apart = apart.or(Some(slot));
            }
            continue;
        }
        if bucket.phase == Phase::Decode {
            bail!("rows {} and {t} are of slot {slot}: a decode bucket takes one row a sequence", t - 1);
        }
        ensure!(
            token != PENDING && batch.tokens[t - 1] != PENDING,
            "rows {} and {t} are of slot {slot}: a pending token's row must be the only one of its sequence",
            t - 1
        );
        let before = batch.positions[t - 1];
        ensure!(before < pos, "rows {} and {t} of slot {slot}: position {pos} after {before} does not ascend", t - 1);
    }
    ensure!(runs <= bucket.sequences, "{runs} sequences, the bucket has {}", bucket.sequences);
    if let Some(slot) = apart {
        bail!("rows of slot {slot} are not adjacent");
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
