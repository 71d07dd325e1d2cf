use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::runtime::mock::{VOCAB, bucket, manifest};
use crate::runtime::{PENDING, SamplingParams};

pub(super) fn request(id: u64, prompt: usize, max_new_tokens: usize) -> Request {
    let prompt = (0..prompt as u32).map(|i| i % VOCAB as u32).collect();
    Request { id, prompt, max_new_tokens, ..Request::default() }
}

pub(super) fn small(chunk: Option<usize>) -> Scheduler {
    with_lookahead(chunk, 1)
}

pub(super) fn with_lookahead(chunk: Option<usize>, lookahead: usize) -> Scheduler {
    let buckets = vec![
        bucket(Phase::Prefill, 4, 3, 3),
        bucket(Phase::Prefill, 8, 3, 3),
        bucket(Phase::Decode, 1, 1, 1),
        bucket(Phase::Decode, 2, 2, 2),
    ];
    Scheduler::new(&manifest(3, 64, 96, 16, buckets), chunk, lookahead).unwrap()
}

/// A step as `bucket: slot@first position+rows ...`, with `!` where a token is chosen and `?` where one is pending.
fn line(step: &Step) -> String {
    let shares = step.shares.iter().map(|share| {
        let pending = if step.batch.tokens[share.rows.start] == PENDING { "?" } else { "" };
        let end = if share.chooses { "!" } else { "" };
        format!(" {}@{}+{}{pending}{end}", share.slot, step.batch.positions[share.rows.start], share.rows.len())
    });
    format!("{}:{}", step.bucket, shares.collect::<String>())
}

/// Admits and plans what may be.
pub(super) fn plan(scheduler: &mut Scheduler) -> Vec<String> {
    let mut lines = Vec::new();
    loop {
        while scheduler.admit().is_some() {}
        let Some(step) = scheduler.next_step() else { return lines };
        lines.push(line(step));
    }
}

/// Completes the oldest step with these tokens; gives the ends as `index reason`.
pub(super) fn complete(scheduler: &mut Scheduler, chosen: &[i32]) -> Vec<String> {
    let mut ends = Vec::new();
    let on_end = |sequence: Sequence, reason| ends.push(format!("{} {reason}", sequence.index));
    scheduler.complete(chosen, |_, _| ControlFlow::Continue(()), on_end).unwrap();
    ends
}

/// Each step as it is planned, and `-` where one is completed if several may be in flight, until nothing is left; every
/// sequence gets token 1.
fn trace(mut scheduler: Scheduler, requests: &[(usize, usize)]) -> Vec<String> {
    for (index, &(prompt, new)) in requests.iter().enumerate() {
        scheduler.submit(index, request(index as u64, prompt, new)).unwrap();
    }
    let lookahead = scheduler.spare.len();
    let mut lines = Vec::new();
    loop {
        lines.extend(plan(&mut scheduler));
        let Some(step) = scheduler.oldest() else { break };
        let chosen = vec![1; step.batch.rows.len()];
        complete(&mut scheduler, &chosen);
        if lookahead > 1 {
            lines.push("-".to_owned());
        }
    }
    assert_eq!(scheduler.waiting(), 0);
    assert_eq!((scheduler.slots.free(), scheduler.pages.free()), (3, 6), "all slots and pages are free again");
    assert_eq!(scheduler.spare.len(), lookahead);
    lines
}

#[test]
fn a_long_prompt_runs_in_chunks_of_the_largest_bucket() {
    assert_eq!(trace(small(None), &[(19, 2)]), ["1: 0@0+8", "1: 0@8+8", "0: 0@16+3!", "2: 0@19+1!"]);
    assert_eq!(trace(small(Some(3)), &[(7, 1)]), ["0: 0@0+3", "0: 0@3+3", "0: 0@6+1!"]);
    assert_eq!(trace(small(Some(100)), &[(9, 1)]), ["1: 0@0+8", "0: 0@8+1!"], "a chunk is at most a bucket");
}

#[test]
fn prefill_and_decode_take_turns() {
    // The second prompt runs in three chunks, between which the first sequence decodes.
    assert_eq!(
        trace(small(None), &[(6, 4), (17, 2)]),
        ["1: 0@0+6! 1@0+2", "2: 0@6+1!", "1: 1@2+8", "2: 0@7+1!", "1: 1@10+7!", "3: 0@8+1! 1@17+1!",]
    );
}

#[test]
fn a_decode_round_runs_every_sequence_before_a_freed_slot_is_prefilled() {
    assert_eq!(
        trace(small(None), &[(1, 2), (2, 3), (1, 2), (3, 1)]),
        [
            "0: 0@0+1! 1@0+2! 2@0+1!",
            // Slot 0 ends and is taken again in the middle of the round, which goes on to slot 2.
            "3: 0@1+1! 1@2+1!",
            "2: 2@1+1!",
            "0: 0@0+3!",
            "2: 1@3+1!",
        ]
    );
}

#[test]
fn one_kind_of_bucket_runs_everything() {
    let scheduler = |bucket| Scheduler::new(&manifest(3, 64, 96, 16, vec![bucket]), None, 1).unwrap();
    let only_decode = scheduler(bucket(Phase::Decode, 2, 2, 2));
    assert_eq!(trace(only_decode, &[(2, 2), (1, 1)]), ["0: 0@0+1 1@0+1!", "0: 0@1+1!", "0: 0@2+1!"]);
    let only_prefill = scheduler(bucket(Phase::Prefill, 8, 3, 1));
    assert_eq!(
        trace(only_prefill, &[(2, 2), (2, 2)]),
        ["0: 0@0+2!", "0: 0@2+1!", "0: 1@0+2!", "0: 1@2+1!"],
        "one row with logits a step"
    );
}

#[test]
fn none_overtakes() {
    let mut scheduler = small(None);
    for (index, (prompt, new)) in [(40, 8), (40, 8), (1, 1)].into_iter().enumerate() {
        scheduler.submit(index, request(0, prompt, new)).unwrap();
    }
    assert_eq!(scheduler.admit().unwrap().pages, [0, 1, 2]);
    assert_eq!(scheduler.admit().unwrap().pages, [3, 4, 5]);
    assert!(scheduler.admit().is_none(), "no page is free");
    let mut scheduler = small(None);
    for (index, (prompt, new)) in [(40, 8), (56, 8), (1, 1)].into_iter().enumerate() {
        scheduler.submit(index, request(0, prompt, new)).unwrap();
    }
    assert_eq!(scheduler.admit().unwrap().slot, 0);
    assert!(scheduler.admit().is_none(), "the second needs four pages, three are free, and the third stays behind it");
    assert_eq!(scheduler.waiting(), 2);
}

#[test]
fn errors_say_what_was_expected() {
    let scheduler = small(None);
    let check = |request: &Request| scheduler.check(request).unwrap_err();
    assert_eq!(check(&request(5, 0, 1)), RequestError::EmptyPrompt { id: 5 });
    let unknown = Request { prompt: vec![1, 12, 13], ..request(5, 1, 1) };
    assert_eq!(check(&unknown), RequestError::UnknownToken { id: 5, index: 2, token: 13, vocab: 13 });
    assert_eq!(scheduler.check(&request(5, 60, 4)), Ok(()), "prompt and new tokens may fill the context");
    assert_eq!(check(&request(5, 60, 5)), RequestError::TooLong { id: 5, prompt: 60, new: 5, max_context: 64 });
    assert!(matches!(check(&request(5, 1, usize::MAX)), RequestError::TooLong { .. }));
    let few = Scheduler::new(&manifest(3, 64, 48, 16, vec![bucket(Phase::Decode, 1, 1, 1)]), None, 1).unwrap();
    assert_eq!(few.check(&request(5, 40, 8)), Ok(()));
    let error = few.check(&request(5, 40, 9)).unwrap_err();
    assert!(matches!(error, RequestError::TooManyPages { needed: 4, pages: 3, page_tokens: 16, .. }));
    for (name, sampling) in [
        ("temperature", SamplingParams { temperature: -1.0, ..SamplingParams::default() }),
        ("temperature", SamplingParams { temperature: f32::NAN, ..SamplingParams::default() }),
        ("top-p", SamplingParams { top_p: 1.5, ..SamplingParams::default() }),
        ("min-p", SamplingParams { min_p: f32::NAN, ..SamplingParams::default() }),
    ] {
        let error = check(&Request { sampling, ..request(5, 1, 1) });
        assert!(matches!(error, RequestError::Sampling { id: 5, name: found, .. } if found == name), "{error}");
    }
    for error in [check(&request(5, 0, 1)), check(&unknown), check(&request(5, 60, 5)), error] {
        let text = error.to_string();
        assert!(text.starts_with("request 5: ") && text.contains("expected") && text.contains("found"), "{text}");
        assert!(text.contains("; "), "says what to do: {text}");
    }
}

#[test]
fn unusable_plans_are_refused() {
    let decode = || vec![bucket(Phase::Decode, 1, 1, 1)];
    let no_rank = crate::plan::Manifest { ranks: vec![], ..manifest(1, 1, 1, 1, vec![]) };
    for (manifest, chunk, part) in [
        (no_rank, None, "found no rank"),
        (manifest(1, 8, 8, 8, vec![]), None, "expected a prefill or a decode bucket"),
        (manifest(0, 8, 8, 8, decode()), None, "max_sequences = 0"),
        (manifest(1, 0, 8, 8, decode()), None, "max_context = 0"),
        (manifest(1, 8, 7, 8, decode()), None, "kv_tokens = 7"),
        (manifest(u64::MAX, 8, 8, 8, decode()), None, "max_sequences: expected at most"),
        (manifest(1, 8, 8, 8, decode()), Some(0), "--chunk"),
    ] {
        let error = Scheduler::new(&manifest, chunk, 1).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let error = Scheduler::new(&manifest(1, 8, 8, 8, decode()), None, 0).unwrap_err().to_string();
    assert!(error.contains("lookahead"), "{error}");
}

#[test]
fn bad_tokens_change_nothing() {
    let mut scheduler = small(None);
    scheduler.submit(0, request(0, 2, 2)).unwrap();
    scheduler.admit().unwrap();
    scheduler.next_step().unwrap();
    let before = scheduler.sequences().next().unwrap().clone();
    for chosen in [&[][..], &[1, 1], &[-1], &[13]] {
        let mut calls = 0;
        let count = |_: &Sequence, _: u32| {
            calls += 1;
            ControlFlow::Continue(())
        };
        assert!(scheduler.complete(chosen, count, |_, _| {}).is_err());
        assert_eq!(calls, 0);
        assert_eq!(scheduler.sequences().next(), Some(&before));
    }
    scheduler.clear();
    assert!(scheduler.next_step().is_none() && scheduler.oldest().is_none());
    assert!(scheduler.complete(&[], |_, _| ControlFlow::Continue(()), |_, _| {}).is_err(), "no step is in flight");
    assert_eq!((scheduler.slots.free(), scheduler.pages.free()), (3, 6));
}

#[test]
fn steps_are_planned_as_far_ahead_as_may_be() {
    assert_eq!(
        trace(with_lookahead(None, 3), &[(3, 4)]),
        ["0: 0@0+3!", "2: 0@3+1?!", "2: 0@4+1?!", "-", "2: 0@5+1?!", "-", "-", "-"],
        "three in flight, until no rows are left"
    );
    // Each sequence's token is known by the time a round comes to it again.
    assert_eq!(
        trace(with_lookahead(None, 2), &[(2, 3), (2, 3), (2, 3)]),
        [
            "1: 0@0+2! 1@0+2! 2@0+2!",
            "3: 0@2+1?! 1@2+1?!",
            "-",
            "2: 2@2+1!",
            "-",
            "3: 0@3+1! 1@3+1!",
            "-",
            "2: 2@3+1!",
            "-",
            "-"
        ]
    );
    // Prefill and decode take turns by what was planned.
    assert_eq!(
        trace(with_lookahead(None, 4), &[(2, 2), (20, 1)])[..5],
        ["1: 0@0+2! 1@0+6", "2: 0@2+1?!", "1: 1@6+8", "1: 1@14+6!", "-"]
    );
}

#[test]
fn rows_of_an_ended_sequence_are_dropped_and_its_place_is_free_at_once() {
    let buckets = vec![bucket(Phase::Decode, 1, 1, 1)];
    let mut scheduler = Scheduler::new(&manifest(1, 64, 64, 64, buckets), None, 3).unwrap();
    scheduler.submit(0, Request { eos: vec![7], ..request(0, 1, 9) }).unwrap();
    scheduler.submit(1, request(1, 1, 2)).unwrap();
    assert_eq!(plan(&mut scheduler), ["0: 0@0+1!", "0: 0@1+1?!", "0: 0@2+1?!"]);
    assert_eq!(complete(&mut scheduler, &[7]), ["0 eos"]);
    assert_eq!(scheduler.oldest().unwrap().wanted_rows(), 0);
    assert_eq!(plan(&mut scheduler), ["0: 0@0+1!"], "the next sequence begins in the same slot");
    assert!(complete(&mut scheduler, &[-1]).is_empty(), "a token of the ended one is nobody's");
    assert_eq!(plan(&mut scheduler), ["0: 0@1+1?!"]);
    assert!(complete(&mut scheduler, &[3]).is_empty());
    assert!(plan(&mut scheduler).is_empty());
    assert_eq!(scheduler.sequences().next().unwrap().new_tokens(), 0);
    assert!(complete(&mut scheduler, &[4]).is_empty());
    assert_eq!(complete(&mut scheduler, &[5]), ["1 length"]);
    assert!(plan(&mut scheduler).is_empty() && scheduler.oldest().is_none());
}

#[test]
fn a_round_ends_when_those_it_had_left_have_ended() {
    for waiting in [false, true] {
        let mut scheduler = with_lookahead(None, 2);
        for index in 0..3 {
            scheduler.submit(index, Request { eos: vec![7], ..request(0, 1, 9) }).unwrap();
        }
        if waiting {
            scheduler.submit(3, request(0, 1, 9)).unwrap();
        }
        assert_eq!(plan(&mut scheduler), ["0: 0@0+1! 1@0+1! 2@0+1!", "3: 0@1+1?! 1@1+1?!"]);
        assert_eq!(complete(&mut scheduler, &[1, 1, 7]), ["2 eos"]);
        let next = if waiting { "0: 2@0+1!" } else { "3: 0@2+1?! 1@2+1?!" };
        assert_eq!(plan(&mut scheduler), [next]);
    }
}

proptest! {
    /// Pages and slots have one owner, the queue is first come, first served, and waits only for what is not free.
    #[test]
    fn places_have_one_owner(
        (slots, pages) in (1u64..5, 1u64..12),
        requests in prop::collection::vec((1usize..12, 0usize..8), 1..20),
        stops in prop::collection::vec(any::<bool>(), 1..20),
        lookahead in 1usize..5,
    ) {
        let buckets = vec![bucket(Phase::Prefill, 8, 2, 2), bucket(Phase::Decode, 2, 2, 2)];
        let mut scheduler = Scheduler::new(&manifest(slots, 20, pages * 3, 3, buckets), None, lookahead).unwrap();
        let mut accepted = Vec::new();
        for (index, &(prompt, new)) in requests.iter().enumerate() {
            if scheduler.submit(index, request(0, prompt, new)).is_ok() {
                accepted.push(index);
            } else {
                prop_assert!((prompt + new).div_ceil(3) as u64 > pages);
            }
        }
        let (mut admitted, mut ended, mut steps) = (Vec::new(), BTreeSet::new(), 0);
        loop {
            while let Some(sequence) = scheduler.admit() {
                prop_assert_eq!(sequence.pages.len(), (sequence.prompt_tokens + sequence.max_new_tokens).div_ceil(3));
                admitted.push(sequence.index);
            }
            let live: Vec<&Sequence> = scheduler.sequences().collect();
            let used: BTreeSet<u32> = live.iter().flat_map(|sequence| sequence.pages.iter().copied()).collect();
            prop_assert_eq!(used.len(), live.iter().map(|sequence| sequence.pages.len()).sum::<usize>());
            prop_assert!(used.iter().all(|&page| u64::from(page) < pages));
            let taken: BTreeSet<u32> = live.iter().map(|sequence| sequence.slot).collect();
            prop_assert!(taken.len() == live.len() && taken.iter().all(|&slot| u64::from(slot) < slots));
            if let Some((_, first)) = scheduler.queue.front() {
                let needed = (first.prompt.len() + first.max_new_tokens).div_ceil(3);
                prop_assert!(live.len() as u64 == slots || needed > pages as usize - used.len());
            }
            if let Some(step) = scheduler.next_step() {
                prop_assert!(!step.shares.is_empty());
                prop_assert!(scheduler.in_flight() <= lookahead);
                continue;
            }
            let Some(step) = scheduler.oldest() else { break };
            let chosen = vec![1; step.batch.rows.len()];
            steps += 1;
            let stop = stops[steps % stops.len()];
            scheduler
                .complete(
                    &chosen,
                    |_, _| if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) },
                    |sequence, _| assert!(ended.insert(sequence.index), "ended twice"),
                )
                .unwrap();
        }
        prop_assert_eq!(&admitted, &accepted, "admitted in the order submitted");
        prop_assert_eq!(ended.into_iter().collect::<Vec<_>>(), accepted);
        prop_assert_eq!((scheduler.slots.free(), scheduler.pages.free()), (slots as usize, pages as usize));
    }
}
