//! Conversations whose history stays in the pool, equal to each turn computed from its beginning.

use lfm2c::runtime::{Executor, FinishReason, Finished, Generator, Options, Request, Session};
use std::ops::ControlFlow;

use crate::common::*;

/// Runs requests together, of which the first is stopped after so many tokens; gives the results, and the rows that ran of
/// their prompts.
fn turn(
    generator: &mut Generator<'_, dyn Executor>,
    requests: Vec<Request>,
    stop_after: usize,
) -> (Vec<Finished>, usize) {
    let before = generator.statistics().prefill.rows;
    let (first, mut seen) = (requests[0].id, 0);
    let count = |id, _| {
        seen += usize::from(id == first);
        if id == first && seen == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let results = generator.generate(requests, count).expect("the run ends");
    let results = results.into_iter().map(|result| result.expect("it fits")).collect();
    (results, (generator.statistics().prefill.rows - before) as usize)
}

/// A conversation with cuts against each turn alone; returns how often it went on, and how often it began anew.
fn converse(
    mut talking: Box<dyn Executor>,
    mut alone: Box<dyn Executor>,
    options: Options,
    seed: u64,
) -> (usize, usize) {
    let vocab = vocab(&*alone);
    let mut generator = Generator::new(&mut *talking, options).expect("the plan is of a language model");
    let (mut conversation, mut rows_held): (Vec<u32>, usize) = (vec![], 0);
    let (mut continued, mut anew) = (0, 0);
    for at in 0..10 {
        let draw = tokens(seed ^ (at << 8), 4, 1 << 20);
        let draw = |i: usize, below: usize| draw[i] as usize % below;
        // Often nothing, sometimes a few tokens, sometimes many.
        let cut = [0, 0, 1, 1 + draw(0, 4), draw(0, 20)][draw(1, 5)].min(conversation.len());
        conversation.truncate(conversation.len() - cut);
        conversation.extend(tokens(seed + at, 1 + draw(2, 9), vocab));
        let new = 1 + draw(3, 12);
        // Some answers are stopped by the caller before they end.
        let stop_after = if at % 3 == 2 { new.div_ceil(2) } else { usize::MAX };
        // Some may end by themselves.
        let eos = if at % 4 == 1 { (0..vocab as u32 / 8).collect() } else { vec![] };
        let talking = Request { session: Some(Session(seed)), eos, ..request(&conversation, new) };
        // Another conversation, and requests that are none.
        let beside =
            |id: u64, length: u64| Request { id, ..request(&tokens(seed + id, 1 + length as usize, vocab), 4) };
        let other = Request { session: Some(Session(99)), ..beside(1, 3 * at) };
        let company = vec![talking, other, beside(2, 30), beside(3, at)];
        let (together, ran) = turn(&mut generator, company.clone(), stop_after);
        let new_rows: usize = together.iter().map(|found| found.prompt_tokens - found.kept_rows).sum();
        assert_eq!(ran, new_rows, "turn {at}: rows that ran");
        for (request, found) in company.into_iter().zip(&together) {
            let mut scratch = Generator::new(&mut *alone, options).expect("the plan is of a language model");
            let stop_after = if request.id == 0 { stop_after } else { usize::MAX };
            let (expected, all) = turn(&mut scratch, vec![Request { session: None, ..request }], stop_after);
            assert_eq!(all, found.prompt_tokens);
            assert_eq!((&found.tokens, found.reason), (&expected[0].tokens, expected[0].reason), "turn {at}");
            assert_same_bits(&found.logits, &expected[0].logits, &format!("turn {at}"));
        }
        let found = &together[0];
        if found.kept_rows > 0 {
            continued += 1;
            assert!(found.kept_rows <= rows_held);
            if cut == 0 {
                assert_eq!(found.kept_rows, rows_held, "turn {at}: all but the token chosen last");
            }
        } else if at > 0 {
            anew += 1;
        }
        conversation.extend(&found.tokens);
        rows_held = conversation.len() - 1;
        assert!(stop_after > new || found.reason != FinishReason::Length);
    }
    generator.forget(Session(seed));
    generator.forget(Session(99));
    assert_eq!(generator.free(), slots_and_pages());
    (continued, anew)
}

/// Of the plans of [`options`].
fn slots_and_pages() -> (usize, usize) {
    let options = options();
    (options.max_sequences.unwrap_or(0) as usize, options.kv_tokens.unwrap_or(0) as usize / 64)
}

#[test]
fn a_conversation_goes_on_as_if_computed_from_its_beginning() {
    let mut totals = (0, 0);
    for name in ["moe-base", "conv-cache-4", "attention-first", "dense"] {
        let directory = project("tests/goldens").join(name);
        let file = directory_plan(&directory, &options());
        for (seed, capture_logits) in [(1, true), (2, true), (3, false)] {
            let make = || -> Box<dyn Executor> {
                // Several steps in flight run rows past the end.
                if on_gpu() || capture_logits {
                    executor(&file, Some(&directory))
                } else {
                    Box::new(cpu_executor(&file, Some(&directory)).with_poison(true).with_lookahead(4))
                }
            };
            let kept = Options { capture_logits, ..Options::default() };
            let (continued, anew) = converse(make(), make(), kept, seed);
            totals = (totals.0 + continued, totals.1 + anew);
        }
    }
    assert!(totals.0 > 40 && totals.1 > 5, "went on {} times, began anew {} times", totals.0, totals.1);
}
