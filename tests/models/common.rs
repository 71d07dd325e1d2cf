//! Models, plans, executors and runs for the tests beside.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::cuda::Device;
use lfm2c::ir::DType;
use lfm2c::passes::Target;
use lfm2c::plan::{PlanFile, WeightSource};
use lfm2c::runtime::cpu::{CpuExecutor, HostPool};
use lfm2c::runtime::cuda::{CudaExecutor, Graphs};
use lfm2c::runtime::weights::Origin;
use lfm2c::runtime::weights::{self, Checkpoint};
use lfm2c::runtime::{Executor, Finished, Generator, Options, Request};
use safetensors::SafeTensors;

/// A prompt with what the reference computed for it.
pub struct Golden {
    pub ids: Vec<u32>,
    /// `[length, vocab]`
    pub logits: Vec<f32>,
    pub greedy: Vec<u32>,
    /// `[layers with experts, length, experts a token]`; empty without experts.
    pub experts: Vec<i32>,
}

/// The folder of a file that comes with the project.
pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The model directories with goldens.
pub fn cases() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(project("tests/goldens")).expect("tests/goldens is there");
    let mut cases: Vec<PathBuf> = entries.map(|entry| entry.expect("it can be listed").path()).collect();
    cases.sort();
    assert!(cases.len() >= 12, "expected at least 12 golden models, found {}", cases.len());
    cases
}

/// The golden prompts of a model directory, by number.
pub fn goldens(directory: &Path) -> BTreeMap<usize, Golden> {
    let bytes = std::fs::read(directory.join("golden.safetensors")).expect("the golden file is there");
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is whole");
    let words = |name: String| -> Vec<[u8; 4]> {
        file.tensor(&name).expect("the golden file is complete").data().as_chunks::<4>().0.to_vec()
    };
    let tokens = |name| words(name).into_iter().map(u32::from_le_bytes).collect();
    let numbers = file.names().into_iter().filter_map(|name| name.strip_prefix("ids.")?.parse::<usize>().ok());
    let numbers: Vec<usize> = numbers.collect();
    let golden = |n: usize| Golden {
        ids: tokens(format!("ids.{n}")),
        logits: words(format!("logits.{n}")).into_iter().map(f32::from_le_bytes).collect(),
        greedy: tokens(format!("greedy.{n}")),
        experts: match file.tensor(&format!("experts.{n}")) {
            Ok(_) => words(format!("experts.{n}")).into_iter().map(i32::from_le_bytes).collect(),
            Err(_) => vec![],
        },
    };
    numbers.into_iter().map(|n| (n, golden(n))).collect()
}

/// Whether models run on the GPU: `LFM2C_TEST_DEVICE=cuda`.
pub fn on_gpu() -> bool {
    match std::env::var("LFM2C_TEST_DEVICE") {
        Ok(device) if device == "cuda" => true,
        Ok(device) => panic!("LFM2C_TEST_DEVICE: expected `cuda` or nothing, found `{device}`"),
        Err(_) => false,
    }
}

/// Options with small buckets, so that tests pad, pack and chunk.
pub fn options() -> CompileOptions {
    CompileOptions {
        target: if on_gpu() { Target::Sm90a } else { Target::Cpu },
        without_cubins: !on_gpu(),
        dtype: Some(DType::F32),
        prefill: Some(vec![16, 64, 256]),
        decode: Some(vec![1, 4, 8]),
        max_sequences: Some(8),
        max_context: Some(256),
        kv_tokens: Some(2048),
        ..CompileOptions::default()
    }
}

/// The plan of a model directory.
pub fn directory_plan(directory: &Path, options: &CompileOptions) -> PlanFile {
    let listing = Checkpoint::open(directory).expect("the checkpoint is readable").listing();
    let source = Source::Recipe(Box::new(Recipe::for_directory(directory)), Some(listing));
    compile(&source, options, &Silent).expect("the model compiles").file
}

/// The plan of the demo recipe.
pub fn demo_plan(options: &CompileOptions) -> PlanFile {
    let recipe = Recipe::read(&project("plans/synthetic.ron")).expect("the demo recipe is readable");
    compile(&Source::Recipe(Box::new(recipe), None), options, &Silent).expect("the demo compiles").file
}

/// An executor with everything not live poisoned: on the CPU before each step, on the GPU at the beginning.
pub fn executor(file: &PlanFile, directory: Option<&Path>) -> Box<dyn Executor> {
    if !on_gpu() {
        return Box::new(cpu_executor(file, directory).with_poison(true));
    }
    let device = Device::open(0).expect("LFM2C_TEST_DEVICE=cuda needs a GPU");
    let mut executor = CudaExecutor::new(file, 0, &device, Graphs::Required).expect("the plan runs on the GPU");
    with_origin(file, directory, |origin| executor.load(origin, &|_| ()).expect("weights fit"));
    executor.poison(0xff).expect("memory can be filled");
    Box::new(executor)
}

/// The CPU executor, without poison.
pub fn cpu_executor(file: &PlanFile, directory: Option<&Path>) -> CpuExecutor {
    cpu_rank(file, 0, directory)
}

/// The CPU executor of a rank's program.
pub fn cpu_rank(file: &PlanFile, rank: usize, directory: Option<&Path>) -> CpuExecutor {
    let manifest = Arc::new(file.manifest.clone());
    let program = &manifest.ranks[rank];
    let mut pool = HostPool::new(program).expect("the pool fits");
    with_origin(file, directory, |origin| {
        let region = pool.weights_mut();
        let filled = match origin {
            Origin::Synthetic(seed) => weights::fill_synthetic(&manifest, program, seed, region, &|_| ()),
            Origin::Checkpoint(checkpoint) => weights::load(&manifest, program, checkpoint, region, &|_| ()),
        };
        filled.expect("weights fit");
    });
    CpuExecutor::new(manifest.clone(), rank, pool).expect("the plan runs on the CPU")
}

fn with_origin(file: &PlanFile, directory: Option<&Path>, load: impl FnOnce(Origin)) {
    match (&file.manifest.model.weights, directory) {
        (WeightSource::Synthetic(seed), _) => load(Origin::Synthetic(*seed)),
        (WeightSource::Checkpoint, directory) => {
            let directory = directory.expect("a checkpoint needs its directory");
            load(Origin::Checkpoint(&Checkpoint::open(directory).expect("the checkpoint is readable")));
        }
    }
}

/// A greedy request that ignores the end of the sequence.
pub fn request(prompt: &[u32], max_new_tokens: usize) -> Request {
    Request { id: 0, prompt: prompt.to_vec(), max_new_tokens, ..Request::default() }
}

/// Runs requests together; each must succeed.
pub fn run(executor: &mut dyn Executor, requests: Vec<Request>, options: Options) -> Vec<Finished> {
    let mut generator = Generator::new(executor, options).expect("the plan is of a language model");
    let results = generator.generate(requests, |_, _| ControlFlow::Continue(())).expect("the run ends");
    results.into_iter().map(|result| result.expect("the request fits")).collect()
}

/// Options that keep all logits.
pub fn all_logits(chunk: Option<usize>) -> Options {
    Options { chunk, capture_logits: true, capture_prompt_logits: true }
}

/// Distance over norm, in f64; NaN anywhere gives NaN.
pub fn relative_l2(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let pairs = || found.iter().zip(expected).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let distance: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    (distance / pairs().map(|(_, b)| b * b).sum::<f64>()).sqrt()
}

/// Largest relative L2 distance of two runs on the GPU in f32, whose kernels may differ from bucket to bucket.
const BUCKETS_APART: f64 = 5e-6;

/// Asserts that two rows of numbers are the same bits; on the GPU, where other buckets have other kernels, nearly.
/// `tests/gpu` looks at bits within a bucket.
pub fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if on_gpu() && !found.is_empty() {
        let error = relative_l2(found, expected);
        assert!(error <= BUCKETS_APART, "{what}: relative L2 distance {error:e}");
        return;
    }
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits()) {
        panic!("{what}: number {at}: expected {:e}, found {:e}", expected[at], found[at]);
    }
}

/// The vocabulary size of a plan.
pub fn vocab(executor: &dyn Executor) -> u64 {
    executor.manifest().model.vocab
}

/// Tokens from a counter: the same for the same seed.
pub fn tokens(seed: u64, count: usize, vocab: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    (0..count).map(|_| (next() % vocab) as u32).collect()
}
