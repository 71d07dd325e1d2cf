//! What ranks do together: each finds of the others what it expects.

use std::collections::BTreeSet;
use std::fmt::Debug;

use super::{Faults, exchanges, order};
use crate::plan::{Bucket, Collective, CollectiveKind, Manifest, Op, Phase, Program, Ref, StateRole, Step, TURNS};

/// Checks programs that are valid by themselves against each other.
pub(super) fn check(manifest: &Manifest, faults: &mut Faults) {
    // Who has which experts is a matter of each stage.
    if !faults.note("stages", staged(manifest)) || !faults.note("experts", spread(manifest)) {
        return;
    }
    let first = &manifest.ranks[0];
    for (rank, program) in manifest.ranks.iter().enumerate() {
        let at = format!("rank {rank}");
        faults.note(&at, experts(manifest, program, rank));
        faults.note(&at, alike(first, program));
        if faults.count() > 0 {
            return;
        }
        for bucket in &program.buckets {
            let at = format!("{at}, bucket {}", bucket.name);
            for (i, step) in bucket.steps.iter().enumerate() {
                let in_head = i >= bucket.head as usize;
                faults.note(format_args!("{at}, step {}", step.name), collective(manifest, program, step, in_head));
            }
            if faults.count() > 0 {
                return;
            }
            in_order(bucket, &at, faults);
        }
    }
    for (at, bucket) in first.buckets.iter().enumerate() {
        let name = format!("bucket {}", bucket.name);
        faults.note(&name, exchanges::check(manifest, at));
        for stage in manifest.ranks.chunks(manifest.stage_ranks()) {
            faults.note(&name, turns(manifest, stage, at));
        }
    }
}

/// Checks that stages are all layers in order, each on as many ranks, of a language model; on one rank, where experts are not spread.
fn staged(manifest: &Manifest) -> Result<(), String> {
    let (stages, ranks) = (&manifest.stages, manifest.ranks.len());
    if stages.is_empty() {
        return Ok(());
    }
    let count = stages.len();
    if count < 2 || !ranks.is_multiple_of(count) || manifest.experts.is_empty() && ranks != count {
        return Err(format!("expected each on one of {ranks} ranks, or on as many as each other, found {count}"));
    }
    let ends = stages.iter().map(|stage| stage.1);
    let follow = stages.iter().map(|stage| stage.0).eq(std::iter::once(0).chain(ends).take(count));
    if !follow || stages.iter().any(|(first, end)| first >= end) {
        return Err(format!(
            "expected layers from 0 on, each in one stage, in order, some in every one, found {stages:?}"
        ));
    }
    match manifest.ranks.iter().flat_map(|rank| &rank.buckets).find(|bucket| bucket.phase == Phase::Fixed) {
        Some(bucket) => Err(format!("expected a language model, found bucket {} of fixed size", bucket.name)),
        None => Ok(()),
    }
}

/// Checks that each expert is on some rank of every stage, if they are spread.
fn spread(manifest: &Manifest) -> Result<(), String> {
    let (experts, ranks, of_stage) = (&manifest.experts, manifest.ranks.len(), manifest.stage_ranks());
    if experts.is_empty() && of_stage == 1 {
        return Ok(());
    }
    if experts.len() != ranks || of_stage < 2 {
        let found = experts.len();
        return Err(format!("expected those of each of {ranks} ranks, none where a rank has all, found {found}"));
    }
    let count = experts.iter().flatten().max().map_or(0, |last| last.saturating_add(1));
    let has_all = |stage: &[Vec<u64>]| {
        let all: BTreeSet<u64> = stage.iter().flatten().copied().collect();
        all.into_iter().eq(0..count)
    };
    let ascend = experts.iter().all(|local| !local.is_empty() && local.is_sorted_by(|a, b| a < b));
    if ascend && experts.chunks(of_stage).all(has_all) {
        return Ok(());
    }
    Err(format!("expected each on a rank or more of each stage, ascending, and some on every rank, found {experts:?}"))
}

/// Checks that a program has the weights of its rank's experts alone, and finds experts by them.
fn experts(manifest: &Manifest, program: &Program, rank: usize) -> Result<(), String> {
    let local = manifest.experts.get(rank).map_or(&[][..], Vec::as_slice);
    let of = manifest.experts.iter().flatten().max().map_or(0, |last| last.saturating_add(1));
    if let Some(weight) = program.weights.iter().find(|weight| !weight.indices.is_empty() && weight.indices != local) {
        return Err(format!("weight {}: expected experts {local:?}, found {:?}", weight.name, weight.indices));
    }
    for (i, semantic) in program.semantics.iter().enumerate() {
        for instr in &semantic.body {
            if let Op::LocalExperts { of: all, experts, .. } = &instr.0
                && (*all != of || experts != local)
            {
                let name = &semantic.name;
                return Err(format!(
                    "semantic {i} ({name}): expected experts {local:?} of {of}, found {experts:?} of {all}"
                ));
            }
        }
    }
    Ok(())
}

/// Checks that the ranks of a stage share the rows of experts that several of them have: each time that they look up their experts in a
/// bucket, one of them runs each expert at each turn.
fn turns(manifest: &Manifest, stage: &[Program], bucket: usize) -> Result<(), String> {
    let look_ups: Vec<Vec<LookUp>> = stage.iter().map(|program| look_ups(program, bucket)).collect();
    for (rank, found) in look_ups.iter().enumerate() {
        if found.len() != look_ups[0].len() {
            let expected = look_ups[0].len();
            return Err(format!(
                "rank {rank} of its stage: expected {expected} look-ups of experts, as on the first, found {}",
                found.len()
            ));
        }
    }
    let of = manifest.experts.iter().flatten().max().map_or(0, |last| last + 1);
    for at in 0..look_ups[0].len() {
        for expert in 0..of {
            let part = |ranks: &Vec<LookUp>| -> Option<(u64, u64)> {
                let (_, experts, parts) = ranks[at];
                let position = experts.binary_search(&expert).ok()?;
                Some(parts.get(position).copied().unwrap_or((0, TURNS))).filter(|(from, to)| from < to)
            };
            let mut found: Vec<(u64, u64)> = look_ups.iter().filter_map(part).collect();
            found.sort_unstable();
            let end = found.iter().try_fold(0, |end, &(from, to)| (from == end).then_some(to));
            if end != Some(TURNS) {
                let step = look_ups[0][at].0;
                return Err(format!(
                    "step {step}: expert {expert}: expected each of {TURNS} turns on one rank, found {found:?}"
                ));
            }
        }
    }
    Ok(())
}

/// A look-up of experts: its step, the rank's experts, and the turns that it runs them at.
type LookUp<'a> = (&'a str, &'a [u64], &'a [(u64, u64)]);

/// Those of a bucket's steps, in their order; collectives stand between them.
fn look_ups(program: &Program, bucket: usize) -> Vec<LookUp<'_>> {
    let of_step = |step: &'_ Step| program.semantics[step.op as usize].body.iter();
    let steps = program.buckets[bucket].steps.iter();
    let ops = steps.flat_map(|step| of_step(step).map(move |instr| (step.name.as_str(), &instr.0)));
    ops.filter_map(|(name, op)| match op {
        Op::LocalExperts { experts, parts, .. } => Some((name, &experts[..], &parts[..])),
        _ => None,
    })
    .collect()
}

/// Checks that a program takes the same batches as another.
fn alike(expected: &Program, found: &Program) -> Result<(), String> {
    let sizes = |program: &Program| -> Vec<_> {
        let buckets = program.buckets.iter();
        buckets
            .map(|bucket| (bucket.name.clone(), bucket.phase, bucket.tokens, bucket.sequences, bucket.rows))
            .collect()
    };
    let io =
        |program: &Program| -> Vec<_> { program.io.iter().map(|io| (io.name.clone(), io.bytes, io.input)).collect() };
    same("bucket", &sizes(expected), &sizes(found))?;
    same("io", &io(expected), &io(found))
}

/// Checks that a rank has a list's entries as rank 0 has them.
fn same<T: PartialEq + Debug>(what: &str, expected: &[T], found: &[T]) -> Result<(), String> {
    let all = 0..expected.len().max(found.len());
    let show = |list: &[T], at: usize| list.get(at).map_or("none".to_owned(), |entry| format!("{entry:?}"));
    match all.into_iter().find(|&at| expected.get(at) != found.get(at)) {
        Some(at) => {
            Err(format!("{what} {at}: expected {}, as on rank 0, found {}", show(expected, at), show(found, at)))
        }
        None => Ok(()),
    }
}

/// Checks that a step exchanges what its semantic says, with the ranks of its stage or with one of all.
fn collective(manifest: &Manifest, program: &Program, step: &Step, in_head: bool) -> Result<(), String> {
    let expected = Collective::of(&program.semantics[step.op as usize]);
    if step.collective != expected {
        return Err(format!("`collective`: expected {expected:?}, found {:?}", step.collective));
    }
    let Some(found) = &step.collective else { return Ok(()) };
    if in_head {
        return Err("a collective of the head, which a rank may run again alone".into());
    }
    let (whose, size) = match found.kind.peer() {
        None if !manifest.stages.is_empty() => ("a stage's ranks", manifest.stage_ranks()),
        _ => ("the plan's ranks", manifest.ranks.len()),
    };
    if found.size != size as u64 || size < 2 {
        return Err(format!("expected a collective of {whose}, of which there are {size}, found {}", found.size));
    }
    // A link is never read; of states, a rank sends its pages alone.
    let sent = step.reads.iter().skip(found.kind.first_read());
    let may_be = |place: &Ref| match place {
        Ref::Arena(_) | Ref::Io(_) => true,
        Ref::State(id) => {
            let role = program.states.get(*id as usize).map(|state| state.role);
            matches!(found.kind, CollectiveKind::Send(_)) && role == Some(StateRole::BlockTable)
        }
        Ref::Weight(_) => false,
    };
    if let Some(place) = sent.clone().find(|place| !may_be(place)) {
        return Err(format!("a collective: expected reads of the arena or io, found {place:?}"));
    }
    match step.writes.iter().find(|place| !matches!(place, Ref::Arena(_))) {
        Some(place) => Err(format!("a collective: expected writes to the arena, found {place:?}")),
        None => Ok(()),
    }
}

/// Checks that no two collectives can run at a time, which ranks could then begin in different orders.
pub(super) fn in_order(bucket: &Bucket, at: &str, faults: &mut Faults) {
    let steps = bucket.steps.iter().enumerate().filter(|(_, step)| step.collective.is_some());
    let steps: Vec<usize> = steps.map(|(i, _)| i).collect();
    if steps.len() < 2 {
        return;
    }
    let Some(ancestors) = order::ancestors(&bucket.steps, at, faults) else { return };
    for pair in steps.windows(2) {
        if !ancestors[pair[1]].contains(pair[0]) {
            let names = (&bucket.steps[pair[0]].name, &bucket.steps[pair[1]].name);
            faults.add(at, format!("collectives {} and {} are in no order", names.0, names.1));
        }
    }
}
