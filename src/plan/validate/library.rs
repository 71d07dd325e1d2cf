//! Steps that are a library's calls.

use fixedbitset::FixedBitSet;

use super::Faults;
use super::bucket::Context;
use crate::plan::{Bucket, LibraryCall, LibraryMatmul, Ref, StateRole, Step, Target};

/// Checks that a step's call computes what the step does, of places of these shapes, types and alignments, and that there is room for it to
/// work in.
pub(super) fn check_call(context: &Context, step: &Step, call: LibraryCall) -> Result<(), String> {
    if context.manifest.target == Target::Cpu {
        return Err("expected no library's call in a plan for the CPU".into());
    }
    if step.launch.is_some() || step.collective.is_some() {
        return Err("expected a library's call, a launch or what ranks do together, found two of them".into());
    }
    let semantics = &context.program.semantics;
    let semantic = semantics.get(step.op as usize).ok_or_else(|| format!("no semantic {}", step.op))?;
    // How much of the workspace it may use is the plan's choice.
    let expected = LibraryCall::of(semantic).map(|LibraryCall::Matmul(matmul)| {
        LibraryCall::Matmul(LibraryMatmul { workspace: call.workspace(), ..matmul })
    });
    if expected != Some(call) {
        let expected = expected.map_or_else(|| "none".to_owned(), |expected| format!("{expected:?}"));
        return Err(format!("`library`: expected {expected}, by what the step computes, found {call:?}"));
    }
    let mut states = (0u32..).zip(&context.program.states).filter(|(_, state)| state.role == StateRole::Workspace);
    let needed = call.workspace();
    let Some((id, state)) = states.next() else {
        return Err(format!("`library`: expected a workspace of {needed} bytes among the states, found none"));
    };
    let room = state.ty.bytes().unwrap_or(0);
    if needed > room {
        return Err(format!("`library`: expected a workspace of {needed} bytes, found one of {room}"));
    }
    let is_read = step.reads.contains(&Ref::State(id));
    if is_read { Err("it reads the workspace, which no step's values lie in".into()) } else { Ok(()) }
}

/// Checks that no two calls can run at a time, because all work in one place.
pub(super) fn check_order(bucket: &Bucket, ancestors: &[FixedBitSet], at: &str, faults: &mut Faults) {
    let calls = bucket.steps.iter().enumerate().filter(|(_, step)| step.library.is_some());
    let calls: Vec<(usize, &Step)> = calls.collect();
    for pair in calls.windows(2) {
        let [(before, first), (after, second)] = pair else { continue };
        if !ancestors[*after].contains(*before) {
            faults.add(
                format_args!("{at}, step {}", second.name),
                format!("a library's call: expected one after step {}, which works in the same place", first.name),
            );
        }
    }
}
