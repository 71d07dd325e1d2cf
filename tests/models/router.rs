//! The goldens are sensitive: each known router bug, built on purpose, misses them.

use std::path::Path;

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::recipe::ModelSource;
use lfm2c::codegen::{Recipe, Source, compile};
use lfm2c::ir::config::RawConfig;
use lfm2c::runtime::weights::Checkpoint;

use crate::common::*;

/// The error of the longest short prompt if the configuration is changed after the truth was computed.
fn error_with(case: &str, change: impl Fn(&mut RawConfig)) -> f64 {
    let directory = project("tests/goldens").join(case);
    let text = std::fs::read_to_string(directory.join("config.json")).expect("config.json is there");
    let mut raw: RawConfig = serde_json::from_str(&text).expect("config.json is readable");
    change(&mut raw);
    let recipe = Recipe { model: ModelSource::Config(Box::new(raw)), ..Recipe::for_directory(&directory) };
    let listing = Checkpoint::open(&directory).expect("the checkpoint is readable").listing();
    let file =
        compile(&Source::Recipe(Box::new(recipe), Some(listing)), &options(), &Silent).expect("it compiles").file;
    longest_error(&file, &directory)
}

fn longest_error(file: &lfm2c::plan::PlanFile, directory: &Path) -> f64 {
    let mut executor = executor(file, Some(directory));
    let golden = goldens(directory).into_values().filter(|golden| golden.ids.len() <= 40).max_by_key(|g| g.ids.len());
    let golden = golden.expect("there is a short prompt");
    let finished = run(&mut *executor, vec![request(&golden.ids, 1)], all_logits(None));
    relative_l2(&finished[0].prompt_logits, &golden.logits)
}

#[test]
fn goldens_tell_router_variants_apart() {
    assert!(error_with("moe-base", |_| ()) < 1e-5);
    assert!(error_with("moe-scale", |raw| raw.routed_scaling_factor = Some(1.0)) > 1e-2, "scaling dropped");
    assert!(error_with("moe-base", |raw| raw.norm_topk_prob = Some(false)) > 1e-2, "normalisation dropped");
    assert!(error_with("moe-scale", |raw| raw.norm_topk_prob = Some(true)) > 1e-2, "normalisation added");
    assert!(error_with("odd-widths", |raw| raw.norm_eps = Some(1e-6)) > 1e-3, "another epsilon");
}

/// The text of a router with its bias, and what it gives with the faults of others built in.
#[test]
fn bias_selects_and_does_not_weigh() {
    let text = "
graph @router (%scores: f32[2,4], %bias: f32[4], %slot: i32[2]) {
  %selection = add %scores, %bias : f32[2,4]
  %experts = top_k %selection, %slot {k = 2} : i32[2,2]
  %weights = gather_columns %scores, %experts : f32[2,2]
  %sum = row_sum %weights : f32[2,1]
  %total = add %sum, 1e-06 : f32[2,1]
  %share = div %weights, %total : f32[2,2]
  return %share
}
";
    let scores = [0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1];
    let bias = [1.0f32, 0.0, 0.0, 0.0];
    let share = crate::text_graph::run(text, &[("scores", &scores), ("bias", &bias)], &[("slot", &[0, -1])], "share");
    // The bias brings expert 0 in, before expert 3; weights are the unbiased scores over their sum plus 1e-6.
    let expected = [0.1f32 / (0.5 + 1e-6), 0.4 / (0.5 + 1e-6)];
    for (found, expected) in share.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-7, "{share:?}");
    }
    assert_eq!(share[2..], [0.0, 0.0], "a padding row selects no expert");
}
