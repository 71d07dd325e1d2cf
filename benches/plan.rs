//! How long the plan of LFM2-8B-A1B takes: to compile for all default buckets, and to load and validate.
//!
//!     cargo bench

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::passes::Target;
use lfm2c::plan::PlanFile;

fn main() {
    divan::main();
}

fn source() -> Source {
    let text = include_str!("../plans/lfm2-8b-a1b.ron");
    Source::Recipe(Box::new(Recipe::parse(text).expect("the recipe is valid")), None)
}

fn compiled(source: &Source, target: Target) -> PlanFile {
    let options = CompileOptions { target, without_cubins: true, ..CompileOptions::default() };
    compile(source, &options, &Silent).expect("the recipe compiles").file
}

#[divan::bench(args = [Target::Cpu, Target::Sm90a], sample_count = 10)]
fn compile_all_default_buckets(bencher: divan::Bencher, target: Target) {
    let source = source();
    bencher.bench_local(|| compiled(&source, target).to_bytes());
}

#[divan::bench(args = [Target::Cpu, Target::Sm90a], sample_count = 20)]
fn load_and_validate(bencher: divan::Bencher, target: Target) {
    let bytes = compiled(&source(), target).to_bytes();
    bencher.bench_local(|| PlanFile::from_bytes(&bytes).expect("the plan is valid"));
}
