//! f32 on the CPU against Hugging Face `transformers`: logits and greedy tokens.

use lfm2c::codegen::CompileOptions;
use lfm2c::ir::DType;
use lfm2c::passes::{self, Target};
use proptest::test_runner::{Config, TestRunner};

use crate::common::*;

/// Largest relative L2 error of a prompt's logits in f32.
const TOLERANCE: f64 = 1e-5;
/// Passes left out, by name, and a chunk size.
type Variant<'a> = (&'a [&'a str], Option<usize>);

/// Checks every golden prompt of a model that is at most `longest`, each alone or all at once.
fn check(directory: &std::path::Path, (disabled, chunk): Variant<'_>, longest: usize, together: bool) {
    let compile = CompileOptions { disabled: disabled.iter().map(|name| (*name).to_owned()).collect(), ..options() };
    check_compiled(directory, &compile, chunk, longest, together);
}

fn check_compiled(
    directory: &std::path::Path,
    compile: &CompileOptions,
    chunk: Option<usize>,
    longest: usize,
    together: bool,
) {
    let disabled = &compile.disabled;
    let file = directory_plan(directory, compile);
    let mut executor = executor(&file, Some(directory));
    let goldens: Vec<Golden> = goldens(directory).into_values().filter(|golden| golden.ids.len() <= longest).collect();
    assert!(goldens.iter().any(|golden| golden.ids.len() == 1), "a prompt of one token is among them");
    let requests = goldens.iter().map(|golden| request(&golden.ids, golden.greedy.len()));
    let finished = if together {
        run(&mut *executor, requests.collect(), all_logits(chunk))
    } else {
        requests.flat_map(|request| run(&mut *executor, vec![request], all_logits(chunk))).collect()
    };
    for (golden, finished) in goldens.iter().zip(finished) {
        let what = format!(
            "{}, {} tokens, without {disabled:?}, chunk {chunk:?}, together {together}",
            directory.display(),
            golden.ids.len()
        );
        let error = relative_l2(&finished.prompt_logits, &golden.logits);
        assert!(error <= TOLERANCE, "{what}: relative L2 error {error:e}");
        assert_eq!(finished.tokens, golden.greedy, "{what}");
    }
}

#[test]
fn alone() {
    cases().iter().for_each(|case| check(case, (&[], None), usize::MAX, false));
}

#[test]
fn batched() {
    cases().iter().for_each(|case| check(case, (&[], None), usize::MAX, true));
}

#[test]
fn chunked() {
    for chunk in [1, 2, 3, 7] {
        cases().iter().for_each(|case| check(case, (&[], Some(chunk)), usize::MAX, true));
    }
}

/// A plan for a GPU runs on the CPU too, and is cut into other steps.
#[test]
fn lowered_for_a_gpu() {
    let compile = CompileOptions { target: Target::Sm90a, ..options() };
    cases().iter().for_each(|case| check_compiled(case, &compile, None, usize::MAX, true));
}

#[test]
fn every_single_pass_disabled() {
    for name in passes::names() {
        cases().iter().for_each(|case| check(case, (&[name], None), 40, true));
    }
}

#[test]
fn no_pass_at_all() {
    let all = passes::names();
    cases().iter().for_each(|case| check(case, (&all, None), usize::MAX, true));
}

#[test]
fn random_subsets_of_passes() {
    let names = passes::names();
    let strategy = proptest::sample::subsequence(names.clone(), 0..=names.len());
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 24, failure_persistence: None, ..Config::default() },
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let cases = cases();
    let turn = std::cell::Cell::new(0);
    let result = runner.run(&strategy, |disabled| {
        turn.set(turn.get() + 1);
        check(&cases[turn.get() % cases.len()], (&disabled, None), 20, true);
        Ok(())
    });
    assert!(result.is_ok(), "{result:?}");
}

/// Narrow types against the f32 truth, with the truth's choice of experts: a choice near a tie flips in any narrow run, in
/// `transformers` as well, and moves a position's logits far.
#[test]
fn narrow_types_with_forced_routing() {
    for (dtype, bound) in [(DType::F32, TOLERANCE), (DType::BF16, 0.06), (DType::F16, 0.015)] {
        for case in cases() {
            let compile = CompileOptions { dtype: Some(dtype), forced_routing: true, ..options() };
            let file = directory_plan(&case, &compile);
            let mut executor = executor(&file, Some(&case));
            for golden in goldens(&case).into_values() {
                executor.force_experts(0, golden.experts);
                let finished = run(&mut *executor, vec![request(&golden.ids, 0)], all_logits(Some(50)));
                let error = relative_l2(&finished[0].prompt_logits, &golden.logits);
                let length = golden.ids.len();
                assert!(error <= bound, "{} in {dtype}, {length} tokens: error {error:e}", case.display());
            }
        }
    }
}
