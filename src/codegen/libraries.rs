//! What steps that are calls of libraries need beside them: room to work in, and turns.

use crate::codegen::kernels::Problem;
use crate::codegen::select::{Libraries, Selector, library_call};
use crate::plan::{Bucket, LibraryCall, Phase, Semantic, Step};

/// Whether a step has its turn among the calls whatever is chosen for it, because it could be one in another plan that is to have the same
/// pool and dependencies.
pub(super) fn might_be(selector: &Selector, semantic: &Semantic, phase: Phase) -> bool {
    selector.libraries() == Libraries::All && library_call(&Problem { semantic, phase }).is_some()
}

/// Bytes that the calls of some buckets work in; one after the other, so in the same place.
pub(super) fn workspace(selector: &Selector, semantics: &[Semantic], buckets: &[Bucket]) -> u64 {
    let of_bucket = |bucket: &Bucket| {
        let of_step = |step: &Step| {
            let semantic = semantics.get(step.op as usize)?;
            let might_be = might_be(selector, semantic, bucket.phase);
            step.library.or_else(|| LibraryCall::of(semantic).filter(|_| might_be))
        };
        bucket.steps.iter().filter_map(of_step).map(LibraryCall::workspace).max()
    };
    buckets.iter().filter_map(of_bucket).max().unwrap_or(0)
}

/// Lets the last of some steps wait for the call before it, unless it does so anyway; `last` is the position of that call, and becomes the
/// step's own.
pub(super) fn follow(steps: &mut [Step], last: &mut Option<u32>) {
    let Some(at) = steps.len().checked_sub(1) else { return };
    if let Some(before) = last.replace(at as u32)
        && !comes_after(steps, at as u32, before)
    {
        let after = &mut steps[at].after;
        after.push(before);
        after.sort_unstable();
    }
}

/// Whether a step starts only when an earlier one is done.
fn comes_after(steps: &[Step], step: u32, earlier: u32) -> bool {
    let mut seen = vec![false; step as usize + 1];
    let mut left = vec![step];
    while let Some(at) = left.pop() {
        for &before in &steps[at as usize].after {
            if before == earlier {
                return true;
            }
            // What is before the earlier one does not come after it.
            if before > earlier && !std::mem::replace(&mut seen[before as usize], true) {
                left.push(before);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Cost;

    fn step(after: &[u32]) -> Step {
        Step {
            name: String::new(),
            op: 0,
            reads: vec![],
            writes: vec![],
            updates: vec![],
            after: after.to_vec(),
            cost: Cost::default(),
            launch: None,
            collective: None,
            library: None,
        }
    }

    #[test]
    fn calls_of_branches_wait_for_each_other_and_those_of_a_chain_do_anyway() {
        // 0 feeds 1 and 2; 3 follows 2, and 4 both.
        let mut steps: Vec<Step> = vec![];
        let mut last = None;
        for after in [&[][..], &[0], &[0], &[2], &[1, 3]] {
            steps.push(step(after));
            follow(&mut steps, &mut last);
        }
        let found: Vec<&[u32]> = steps.iter().map(|step| &step.after[..]).collect();
        assert_eq!(found, [&[][..], &[0], &[0, 1], &[2], &[1, 3]]);
        let mut steps = vec![step(&[]), step(&[0]), step(&[0]), step(&[1, 2])];
        let mut last = Some(1);
        follow(&mut steps, &mut last);
        assert_eq!((&steps[3].after[..], last), (&[1, 2][..], Some(3)));
    }
}
