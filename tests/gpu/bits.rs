//! The same requests give the same bits: from run to run, in any company, and as graphs or step by step.

use std::ops::ControlFlow;

use lfm2c::codegen::CompileOptions;
use lfm2c::ir::DType;
use lfm2c::plan::PlanFile;
use lfm2c::runtime::cuda::{CudaExecutor, Graphs};
use lfm2c::runtime::workload::{History, random_batch};
use lfm2c::runtime::{Executor, Finished, Generator, Options, Request};
use libtest_mimic::{Failed, Trial};

use crate::models::{SHAPES, fail, gpu, plan, small};

/// Replays of one step, each over the same state: prompt rows that go on move the convolution's ring, so it is filled anew.
const REPLAYS: usize = 1000;
/// Executors that share the device.
const CROWD: usize = 8;

/// One bucket a phase, so that a sequence has the same kernels alone and in company.
fn options(dtype: DType) -> CompileOptions {
    small(&[64], &[8], dtype)
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    for (i, shape) in SHAPES.iter().enumerate() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let name = |what: &str| format!("{what} {} {dtype}", shape.name);
            trials.push(Trial::test(name("replays"), move || replays(&plan(&SHAPES[i], &options(dtype)))));
            trials.push(Trial::test(name("replays in a crowd"), move || crowd(&plan(&SHAPES[i], &options(dtype)))));
            trials.push(Trial::test(name("company"), move || company(&plan(&SHAPES[i], &options(dtype)))));
            trials.push(Trial::test(name("graphs"), move || graphs(&plan(&SHAPES[i], &options(dtype)))));
            // A bucket so large that kernels for many rows are the defaults of its steps.
            let many = small(&[512], &[8], dtype);
            trials.push(Trial::test(name("company of many rows"), move || company(&plan(&SHAPES[i], &many))));
        }
    }
    trials
}

fn replays(file: &PlanFile) -> Result<(), Failed> {
    let mut executor = gpu(file, Graphs::Required);
    for bucket in 0..executor.program().buckets.len() {
        let mut first: Option<(Vec<i32>, Vec<f32>)> = None;
        for replay in 0..REPLAYS {
            let batch = random_batch(&mut executor, bucket, 40, 3, History::Run).map_err(fail)?;
            let tokens = executor.run(bucket, &batch).map_err(fail)?;
            let mut logits = vec![];
            if replay % 10 == 0 || first.is_none() {
                executor.logits(&mut logits).map_err(fail)?;
            }
            let (expected_tokens, expected) = first.get_or_insert_with(|| (tokens.clone(), logits.clone()));
            let same = logits.is_empty() || expected.iter().zip(&logits).all(|(a, b)| a.to_bits() == b.to_bits());
            if !same || tokens != *expected_tokens {
                return Err(format!("bucket {bucket}: replay {replay} gave other bits").into());
            }
        }
    }
    Ok(())
}

/// Several executors on one device: blocks of others are beside those of a kernel then, and what it reads and copies takes other times.
fn crowd(file: &PlanFile) -> Result<(), Failed> {
    std::thread::scope(|threads| {
        let crowd: Vec<_> = (0..CROWD).map(|_| threads.spawn(|| replays(file))).collect();
        crowd.into_iter().try_for_each(|member| member.join().map_err(|_| "a thread panicked")?)
    })
}

fn prompts(vocab: u32) -> Vec<Vec<u32>> {
    (0..7u32).map(|i| (0..1 + 9 * i).map(|j| (i * 7919 + j * 104_729 + j * j * 31) % vocab).collect()).collect()
}

fn request(prompt: &[u32], new: usize) -> Request {
    Request { id: 0, prompt: prompt.to_vec(), max_new_tokens: new, ..Request::default() }
}

fn run(executor: &mut CudaExecutor, requests: Vec<Request>, logits: bool) -> Result<Vec<Finished>, Failed> {
    let options = Options { chunk: None, capture_logits: logits, capture_prompt_logits: logits };
    let mut generator = Generator::new(executor, options).map_err(fail)?;
    let results = generator.generate(requests, |_, _| ControlFlow::Continue(())).map_err(fail)?;
    results.into_iter().map(|result| result.map_err(|fault| fault.to_string().into())).collect()
}

fn same(found: &Finished, expected: &Finished, what: &str) -> Result<(), Failed> {
    let bits = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    if found.tokens != expected.tokens
        || !bits(&found.logits, &expected.logits)
        || !bits(&found.prompt_logits, &expected.prompt_logits)
    {
        return Err(format!("{what}: other bits").into());
    }
    if found.logits.iter().chain(&found.prompt_logits).any(|x| !x.is_finite()) {
        return Err(format!("{what}: logits that are no numbers").into());
    }
    Ok(())
}

/// Alone, among others, behind others in used slots, and step by step instead of as a graph.
pub fn company(file: &PlanFile) -> Result<(), Failed> {
    let mut executor = gpu(file, Graphs::Required);
    let prompts = prompts(file.manifest.model.vocab as u32);
    let requests: Vec<Request> = prompts.iter().map(|prompt| request(prompt, 12)).collect();
    let together = run(&mut executor, requests.clone(), true)?;
    for (i, (request, found)) in requests.iter().zip(&together).enumerate() {
        let alone = run(&mut executor, vec![request.clone()], true)?.remove(0);
        same(found, &alone, &format!("prompt {i} in company"))?;
        let tokens = run(&mut executor, vec![request.clone()], false)?.remove(0).tokens;
        if tokens != alone.tokens {
            return Err(format!("prompt {i}: several steps in flight gave other tokens").into());
        }
    }
    let many: Vec<Request> = (0..5).flat_map(|_| requests.clone()).collect();
    for (i, found) in run(&mut executor, many, false)?.iter().enumerate() {
        if found.tokens != together[i % requests.len()].tokens {
            return Err(format!("request {i} of a queue: other tokens").into());
        }
    }
    Ok(())
}

/// Logits of every row of some prompts.
pub fn prompt_logits(file: &PlanFile) -> Result<Vec<f32>, Failed> {
    let prompts = prompts(file.manifest.model.vocab as u32);
    let requests = prompts.iter().map(|prompt| request(prompt, 1)).collect();
    let found = run(&mut gpu(file, Graphs::Required), requests, true)?;
    Ok(found.into_iter().flat_map(|finished| finished.prompt_logits).collect())
}

pub fn graphs(file: &PlanFile) -> Result<(), Failed> {
    let prompts = prompts(file.manifest.model.vocab as u32);
    let requests: Vec<Request> = prompts.iter().map(|prompt| request(prompt, 12)).collect();
    let captured = run(&mut gpu(file, Graphs::Required), requests.clone(), true)?;
    let single = run(&mut gpu(file, Graphs::Off), requests, true)?;
    for (i, (a, b)) in captured.iter().zip(&single).enumerate() {
        same(a, b, &format!("prompt {i} with and without graphs"))?;
    }
    Ok(())
}
