//! Which step happens before which, and that nothing live is overwritten.

use fixedbitset::FixedBitSet;

use super::Faults;
use crate::plan::{Bucket, Step};

/// For each step, the steps that happen before it.
pub(super) fn ancestors(steps: &[Step], at: &str, faults: &mut Faults) -> Option<Vec<FixedBitSet>> {
    let mut ancestors: Vec<FixedBitSet> = Vec::with_capacity(steps.len());
    for (i, step) in steps.iter().enumerate() {
        let mut before = FixedBitSet::with_capacity(steps.len());
        for &earlier in &step.after {
            let earlier = earlier as usize;
            if earlier >= i {
                faults.add(
                    format_args!("{at}, step {}", step.name),
                    format!("`after`: expected steps before {i}, found {earlier}"),
                );
                return None;
            }
            before.union_with(&ancestors[earlier]);
            before.insert(earlier);
        }
        ancestors.push(before);
    }
    Some(ancestors)
}

/// Who touches a buffer.
pub(super) struct Accesses {
    pub(super) writer: usize,
    /// Writer and readers.
    pub(super) steps: FixedBitSet,
    /// Lives to the end.
    pub(super) pinned: bool,
}

/// Checks that of two buffers which share bytes, one is no longer needed when the other is written.
pub(super) fn overlaps(
    bucket: &Bucket,
    accesses: &[Accesses],
    ancestors: &[FixedBitSet],
    at: &str,
    faults: &mut Faults,
) {
    let mut by_offset: Vec<usize> = (0..bucket.buffers.len()).collect();
    by_offset.sort_by_key(|&buffer| bucket.buffers[buffer].1);
    let before = |one: &Accesses, other: &Accesses| !one.pinned && one.steps.is_subset(&ancestors[other.writer]);
    for (i, &low) in by_offset.iter().enumerate() {
        let end = bucket.buffers[low].1 + bucket.buffers[low].2;
        for &high in by_offset[i + 1..].iter().take_while(|&&high| bucket.buffers[high].1 < end) {
            let (one, other) = (&accesses[low], &accesses[high]);
            if before(one, other) || before(other, one) {
                continue;
            }
            let (a, b) = (&bucket.buffers[low], &bucket.buffers[high]);
            let writers = (&bucket.steps[one.writer].name, &bucket.steps[other.writer].name);
            faults.add(
                at,
                format!(
                    "`{}` at {} and `{}` at {} share bytes while both are needed (written by {} and {})",
                    a.0, a.1, b.0, b.1, writers.0, writers.1
                ),
            );
            if faults.full() {
                return;
            }
        }
    }
}

/// Checks that every update of a state is ordered against every other use of it; `uses` are (step, updates).
pub(super) fn state_uses(uses: &[(usize, bool)], ancestors: &[FixedBitSet]) -> Result<(), String> {
    for &(update, _) in uses.iter().filter(|(_, updates)| *updates) {
        for &(step, _) in uses {
            let (first, last) = (update.min(step), update.max(step));
            if first != last && !ancestors[last].contains(first) {
                return Err(format!("steps {first} and {last} use it in no order, and one updates it"));
            }
        }
    }
    Ok(())
}
