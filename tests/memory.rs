//! The memory plan of the full model: close to the lower bound in every bucket.

use std::path::Path;

use lfm2c::codegen::compile::{CompileOptions, Silent, Source, compile};
use lfm2c::codegen::recipe::Recipe;
use lfm2c::passes;
use lfm2c::plan::PlanFile;

fn compiled(disabled: Vec<String>) -> PlanFile {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("plans/lfm2-8b-a1b.ron");
    let recipe = Recipe::read(&path).expect("the recipe is valid");
    let options = CompileOptions { disabled, ..CompileOptions::default() };
    compile(&Source::Recipe(Box::new(recipe), None), &options, &Silent).expect("it compiles").file
}

fn assert_tight(file: &PlanFile) {
    let buckets = &file.manifest.ranks[0].buckets;
    assert!(buckets.len() >= 17, "the defaults cover all sizes");
    for bucket in buckets {
        let (found, bound) = (bucket.arena_bytes, bucket.arena_lower_bound);
        let most = bound + (bound / 20).max(64 << 10);
        assert!(found <= most, "{}: {found} bytes, the lower bound is {bound}", bucket.name);
    }
}

#[test]
fn the_arena_is_within_5_percent_of_the_lower_bound() {
    assert_tight(&compiled(vec![]));
}

#[test]
fn so_it_is_without_any_other_pass() {
    let others = passes::names().into_iter().filter(|name| *name != passes::PLAN_MEMORY);
    assert_tight(&compiled(others.map(str::to_owned).collect()));
}

#[test]
fn without_plan_memory_no_bytes_are_shared() {
    for bucket in compiled(vec![passes::PLAN_MEMORY.to_owned()]).manifest.ranks.iter().flat_map(|rank| &rank.buckets) {
        assert!(bucket.arena_bytes >= 2 * bucket.arena_lower_bound, "{}", bucket.name);
    }
}

#[test]
fn without_schedule_each_step_waits_for_the_one_before() {
    for bucket in compiled(vec![passes::SCHEDULE.to_owned()]).manifest.ranks.iter().flat_map(|rank| &rank.buckets) {
        for (at, step) in bucket.steps.iter().enumerate() {
            assert_eq!(step.after, at.checked_sub(1).map(|before| before as u32).into_iter().collect::<Vec<_>>());
        }
    }
}

#[test]
fn compiling_twice_gives_the_same_bytes() {
    let file = compiled(vec![]);
    let bytes = file.to_bytes();
    assert!(bytes == compiled(vec![]).to_bytes());
    assert!(PlanFile::from_bytes(&bytes).expect("a valid plan") == file);
}
