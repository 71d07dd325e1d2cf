//! Buckets: sizes, buffers, results.

use std::collections::HashSet;

use super::launch;
use super::library;
use super::order::{self, Accesses};
use super::pool::place;
use super::semantic::Signature;
use super::steps::Walk;
use super::{Faults, MAX_DIM};
use crate::plan::{Bucket, Manifest, Phase, Program, Ref};

const MAX_BUCKETS: usize = 256;
const MAX_STEPS: usize = 1 << 12;
const MAX_BUFFERS: usize = 1 << 13;

/// What a bucket is checked against.
pub(super) struct Context<'a> {
    pub(super) manifest: &'a Manifest,
    pub(super) program: &'a Program,
    /// One for each semantic.
    pub(super) signatures: &'a [Signature],
    pub(super) texts: usize,
    pub(super) language: bool,
}

/// Checks all buckets of a program.
pub(super) fn check_all(context: &Context, at: &str, faults: &mut Faults) {
    let buckets = &context.program.buckets;
    if buckets.is_empty() || buckets.len() > MAX_BUCKETS {
        faults.add(at, format!("expected 1 to {MAX_BUCKETS} buckets, found {}", buckets.len()));
        return;
    }
    launch::check_steps(context, at, faults);
    faults.unique(format_args!("{at}, buckets"), buckets.iter().map(|bucket| bucket.name.as_str()));
    let rank = |bucket: &Bucket| (bucket.phase == Phase::Decode, bucket.tokens);
    for pair in buckets.windows(2) {
        if rank(&pair[0]) >= rank(&pair[1]) {
            faults.add(
                format_args!("{at}, bucket {}", pair[1].name),
                format!("expected prefill, then decode, by ascending rows; found it behind {}", pair[0].name),
            );
        }
    }
    for bucket in buckets {
        if faults.full() {
            return;
        }
        let at = format!("{at}, bucket {}", bucket.name);
        if head_fields(context, bucket, &at, faults) {
            check(context, bucket, &at, faults);
        }
    }
}

/// Everything but the steps; true if the steps can be looked at.
fn head_fields(context: &Context, bucket: &Bucket, at: &str, faults: &mut Faults) -> bool {
    let before = faults.count();
    faults.note(at, sizes(context, bucket));
    if bucket.text as usize >= context.texts {
        faults.add(at, format!("`text`: expected one of {} texts, found {}", context.texts, bucket.text));
    }
    let room = context.program.pool.arena.bytes;
    if bucket.arena_bytes > room || bucket.arena_lower_bound > bucket.arena_bytes {
        faults.add(
            at,
            format!(
                "expected `arena_lower_bound` <= `arena_bytes` <= {room}, found {} and {}",
                bucket.arena_lower_bound, bucket.arena_bytes
            ),
        );
    }
    let counts = [("buffers", bucket.buffers.len(), MAX_BUFFERS), ("steps", bucket.steps.len(), MAX_STEPS)];
    for (what, count, most) in counts {
        if count > most {
            faults.add(at, format!("expected at most {most} {what}, found {count}"));
            return false;
        }
    }
    if bucket.head as usize > bucket.steps.len() {
        faults.add(at, format!("`head`: expected at most {} steps, found {}", bucket.steps.len(), bucket.head));
    }
    faults.unique(format_args!("{at}, buffers"), bucket.buffers.iter().map(|buffer| buffer.0.as_str()));
    faults.unique(format_args!("{at}, steps"), bucket.steps.iter().map(|step| step.name.as_str()));
    faults.unique(format_args!("{at}, outputs"), bucket.outputs.iter().map(|output| output.0.as_str()));
    for buffer in &bucket.buffers {
        faults.note(format_args!("{at}, buffer {}", buffer.0), place(buffer.1, buffer.2, bucket.arena_bytes));
    }
    faults.count() == before
}

fn sizes(context: &Context, bucket: &Bucket) -> Result<(), String> {
    let (tokens, sequences, rows) = (bucket.tokens, bucket.sequences, bucket.rows);
    if [tokens, sequences, rows].iter().any(|&size| size == 0 || size > MAX_DIM) {
        return Err(format!("expected T, S, R from 1 to {MAX_DIM}, found {tokens}, {sequences}, {rows}"));
    }
    let most = context.manifest.limits.max_sequences;
    let expected = match bucket.phase {
        Phase::Fixed if context.language => {
            return Err("a bucket of fixed size beside those of a language model".into());
        }
        Phase::Fixed => return Ok(()),
        Phase::Prefill => tokens.min(most),
        Phase::Decode if tokens > most => return Err(format!("expected at most {most} sequences, found {tokens}")),
        Phase::Decode => tokens,
    };
    if sequences != expected || rows != expected {
        return Err(format!("expected S and R of {expected}, found {sequences} and {rows}"));
    }
    Ok(())
}

fn check(context: &Context, bucket: &Bucket, at: &str, faults: &mut Faults) {
    let before = faults.count();
    let Some(ancestors) = order::ancestors(&bucket.steps, at, faults) else { return };
    library::check_order(bucket, &ancestors, at, faults);
    let mut walk = Walk::new(context, bucket, &ancestors);
    for (i, step) in bucket.steps.iter().enumerate() {
        // What comes after a faulty step would mostly be its echo.
        if !faults.note(format_args!("{at}, step {}", step.name), walk.step(i, step)) {
            return;
        }
    }
    for (name, place) in &bucket.outputs {
        faults.note(format_args!("{at}, output {name}"), walk.output(*place));
    }
    if context.language {
        faults.note(at, walk.language_outputs());
    }
    for (state, uses) in context.program.states.iter().zip(&walk.states) {
        faults.note(format_args!("{at}, state {}", state.name), order::state_uses(uses, &ancestors));
    }
    for (buffer, writer) in bucket.buffers.iter().zip(&walk.arena) {
        if writer.is_none() {
            faults.add(format_args!("{at}, buffer {}", buffer.0), "no step writes it");
        }
    }
    if faults.count() > before {
        return;
    }
    let head = bucket.head as usize;
    let returned: HashSet<Ref> = bucket.outputs.iter().map(|(_, place)| *place).collect();
    let accesses: Vec<Accesses> = walk
        .accesses
        .into_iter()
        .zip(&walk.arena)
        .enumerate()
        .filter_map(|(i, (steps, content))| {
            let writer = content.as_ref()?.step;
            let feeds_head = writer < head && steps.maximum().is_some_and(|last| last >= head);
            Some(Accesses { writer, steps, pinned: feeds_head || returned.contains(&Ref::Arena(i as u32)) })
        })
        .collect();
    order::overlaps(bucket, &accesses, &ancestors, at, faults);
}
