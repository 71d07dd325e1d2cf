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
fn so_it_is_without_any_rewrite() {
    assert_tight(&compiled(passes::PIPELINE.iter().map(|pass| pass.name.to_owned()).collect()));
}

#[test]
fn compiling_twice_gives_the_same_bytes() {
    let file = compiled(vec![]);
    let bytes = file.to_bytes();
    assert!(bytes == compiled(vec![]).to_bytes());
    assert!(PlanFile::from_bytes(&bytes).expect("a valid plan") == file);
}
