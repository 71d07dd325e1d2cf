//! Bugs that other implementations had; see the table in `main.rs`.

use lfm2c::codegen::CompileOptions;
use lfm2c::plan::PlanFile;
use lfm2c::runtime::{Executor, Finished, Options, Request, SamplingParams};

use crate::common::*;

fn demo(change: impl Fn(&mut CompileOptions)) -> (PlanFile, Box<dyn Executor>) {
    let mut options = options();
    change(&mut options);
    let file = demo_plan(&options);
    let executor = executor(&file, None);
    (file, executor)
}

fn alone(executor: &mut dyn Executor, prompt: &[u32], new: usize) -> Finished {
    run(executor, vec![request(prompt, new)], all_logits(None)).remove(0)
}

fn assert_same(found: &Finished, expected: &Finished, what: &str) {
    assert_same_bits(&found.prompt_logits, &expected.prompt_logits, what);
    assert_same_bits(&found.logits, &expected.logits, what);
    assert_eq!(found.tokens, expected.tokens, "{what}");
}

/// The state of a padded prompt is that of the prompt: what is generated from it shows the state.
#[test]
fn every_prompt_length_in_a_padded_bucket() {
    let (_, mut padded) = demo(|options| options.prefill = Some(vec![16]));
    let (_, mut exact) = demo(|options| options.prefill = Some((1..=16).collect()));
    for length in 1..=16 {
        let prompt = tokens(length as u64, length, vocab(&*padded));
        let what = format!("{length} tokens");
        assert_same(&alone(&mut *padded, &prompt, 6), &alone(&mut *exact, &prompt, 6), &what);
    }
}

#[test]
fn packed_prompts_do_not_see_each_other() {
    let (_, mut executor) = demo(|_| ());
    for (first, second) in [(1, 1), (1, 9), (5, 3), (30, 2), (2, 30), (17, 40)] {
        let vocab = vocab(&*executor);
        let prompts = [tokens(1, first, vocab), tokens(2, second, vocab)];
        let together = run(&mut *executor, prompts.iter().map(|p| request(p, 5)).collect(), all_logits(None));
        for (prompt, found) in prompts.iter().zip(&together) {
            assert_same(found, &alone(&mut *executor, prompt, 5), &format!("{first} and {second} tokens"));
        }
    }
}

#[test]
fn chunks_continue_the_state() {
    let (_, mut executor) = demo(|_| ());
    for length in [1, 2, 3, 8, 23, 70] {
        let prompt = tokens(length as u64, length, vocab(&*executor));
        let whole = alone(&mut *executor, &prompt, 5);
        for chunk in [1, 2, 3, 7] {
            let found = run(&mut *executor, vec![request(&prompt, 5)], all_logits(Some(chunk)));
            assert_same(&found[0], &whole, &format!("{length} tokens in chunks of {chunk}"));
        }
    }
}

#[test]
fn three_sequences_in_a_bucket_of_four() {
    let (_, mut executor) = demo(|options| options.decode = Some(vec![1, 4]));
    let prompts: Vec<Vec<u32>> = (0..3).map(|i| tokens(i, 1 + 4 * i as usize, vocab(&*executor))).collect();
    let together = run(&mut *executor, prompts.iter().map(|p| request(p, 12)).collect(), all_logits(None));
    for (prompt, found) in prompts.iter().zip(&together) {
        assert!(found.logits.iter().all(|x| x.is_finite()));
        assert_same(found, &alone(&mut *executor, prompt, 12), "a batch of three");
    }
}

#[test]
fn a_reused_slot_starts_fresh() {
    let one_slot = |options: &mut CompileOptions| {
        options.max_sequences = Some(1);
        options.decode = Some(vec![1]);
    };
    let (_, mut executor) = demo(one_slot);
    let vocab = vocab(&*executor);
    for length in [1, 2, 3, 9, 70] {
        let (first, second) = (tokens(7, 50, vocab), tokens(8, length, vocab));
        let requests = vec![request(&first, 9), request(&second, 9)];
        let after = run(&mut *executor, requests, all_logits(None)).remove(1);
        let (_, mut fresh) = demo(one_slot);
        assert_same(&after, &alone(&mut *fresh, &second, 9), &format!("{length} tokens in a used slot"));
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let (_, mut executor) = demo(|_| ());
    let vocab = vocab(&*executor);
    let prompt = tokens(3, 6, vocab);
    let expected = alone(&mut *executor, &prompt, 8);
    for company in 1..8 {
        let mut requests: Vec<Request> =
            (0..company).map(|i| request(&tokens(100 + i, 1 + 3 * i as usize, vocab), 8)).collect();
        requests.insert(company as usize / 2, request(&prompt, 8));
        let found = run(&mut *executor, requests, all_logits(None));
        assert_same(&found[company as usize / 2], &expected, &format!("with {company} others"));
    }
}

#[test]
fn more_sequences_than_slots_or_pages_wait() {
    let (_, mut executor) = demo(|options| {
        options.max_sequences = Some(3);
        options.decode = Some(vec![1, 3]);
        options.kv_tokens = Some(192);
    });
    let vocab = vocab(&*executor);
    let prompts: Vec<Vec<u32>> = (0..9).map(|i| tokens(i, 1 + 11 * i as usize, vocab)).collect();
    let found = run(&mut *executor, prompts.iter().map(|p| request(p, 7)).collect(), all_logits(None));
    for (prompt, found) in prompts.iter().zip(&found) {
        assert_same(found, &alone(&mut *executor, prompt, 7), "after waiting");
    }
}

#[test]
fn sampling_depends_on_seed_and_position_alone() {
    let (_, mut executor) = demo(|_| ());
    let vocab = vocab(&*executor);
    let sampled = |seed: u64, prompt: &[u32]| Request {
        sampling: SamplingParams { temperature: 0.9, top_k: 40, top_p: 0.95, min_p: 0.01, seed },
        ..request(prompt, 12)
    };
    let prompt = tokens(5, 4, vocab);
    let first = run(&mut *executor, vec![sampled(1, &prompt)], Options::default()).remove(0);
    let others = vec![sampled(2, &prompt), sampled(1, &prompt), request(&prompt, 12)];
    let together = run(&mut *executor, others, Options::default());
    assert_eq!(together[1].tokens, first.tokens, "the same seed");
    assert_ne!(together[0].tokens, first.tokens, "another seed");
    assert_ne!(together[2].tokens, first.tokens, "greedy");
}
