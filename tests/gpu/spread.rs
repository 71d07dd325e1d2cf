//! Steps of a rank that has some of the experts, or of the layers, on one GPU against the CPU: exchanges are played, as if all ranks had the
//! rows of this one.
//! `tests/gpu_ranks.sh` runs whole plans, exchanges included, on several GPUs.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lfm2c::codegen::CompileOptions;
use lfm2c::codegen::select::Tactics;
use lfm2c::cuda::Device;
use lfm2c::ir::DType;
use lfm2c::ir::config::FeedForward;
use lfm2c::plan::{Collective, CollectiveKind, DType as Stored, ExpertCounts, PlanFile, Program, Ref, StateRole, Step};
use lfm2c::runtime::compare::{bound, compare_step};
use lfm2c::runtime::cpu::{CpuExecutor, HostPool};
use lfm2c::runtime::cuda::{CudaExecutor, Graphs, offset};
use lfm2c::runtime::group::Echo;
use lfm2c::runtime::weights::{self, Origin};
use lfm2c::runtime::workload::{History, random_batch};
use lfm2c::runtime::{Executor, Generator, Options, Request};
use libtest_mimic::Trial;

use crate::models::{SHAPES, Shape, cpu, fail, gpu, plan, recipe, small};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    for shape in SHAPES {
        for (dtype, ranks) in [(DType::F32, 2), (DType::BF16, 3), (DType::F16, 2)] {
            for (nth, replicas) in [(0, 0), (1, 0), (2, 0), (0, 1), (1, 2)] {
                let name = format!("spread over {ranks} {} {dtype} {nth} with {replicas} replicas", shape.name);
                trials.push(Trial::test(name, move || check(shape, dtype, (ranks, 1), nth, replicas).map_err(fail)));
            }
            for (of_stage, what) in [(1, ""), (2, " on two ranks each")] {
                trials.push(Trial::test(format!("two stages of {} {dtype}{what}", shape.name), move || {
                    check(shape, dtype, (of_stage, 2), 0, 0).map_err(fail)
                }));
            }
        }
    }
    for shape in SHAPES {
        let name = format!("spread by itself {}", shape.name);
        trials.push(Trial::test(name, move || by_itself(shape).map_err(fail)));
    }
    trials
}

/// A rank that exchanges with itself, as it does where its steps are timed: captured graphs choose the tokens that the CPU chooses where what is
/// sent comes back.
fn by_itself(shape: &Shape) -> Result<()> {
    let options = CompileOptions { expert_ranks: 2, ..small(&[64], &[8], DType::F32) };
    let file = plan(shape, &options);
    let vocab = file.manifest.model.vocab as u32;
    let requests: Vec<Request> = (0..20)
        .map(|id| Request {
            id,
            prompt: (0..1 + id as u32 * 3).map(|i| (i * 37 + id as u32 * 11) % vocab).collect(),
            max_new_tokens: 12,
            ..Request::default()
        })
        .collect();
    let mut looped = gpu(&file, Graphs::Required).looped()?;
    let found = tokens(&mut looped, &requests)?;
    let mut echoed = cpu(&file).with_group(Box::new(Echo::new(0, 2)))?;
    let expected = tokens(&mut echoed, &requests)?;
    ensure!(found.iter().all(|tokens| tokens.len() == 12), "expected 12 tokens of each request, found {found:?}");
    ensure!(found == expected, "expected the tokens of the CPU, {expected:?}, found {found:?}");
    let alone = CompileOptions { expert_ranks: 1, ..options };
    ensure!(
        gpu(&plan(shape, &alone), Graphs::Required).looped().is_err(),
        "a plan of one rank has nobody to stand in for"
    );
    Ok(())
}

/// The tokens that follow each request, in their order.
fn tokens<E: Executor>(executor: &mut E, requests: &[Request]) -> Result<Vec<Vec<u32>>> {
    let mut generator = Generator::new(executor, Options::default())?;
    let found = generator.generate(requests.to_vec(), |_, _| ControlFlow::Continue(()))?;
    found.into_iter().map(|finished| Ok(finished?.tokens)).collect()
}

/// Compares every step of the first and the last rank, from what the steps before it left on the GPU.
fn check(
    shape: &Shape,
    dtype: DType,
    (expert_ranks, pipeline_ranks): (u64, u64),
    nth: usize,
    replicas: u64,
) -> Result<()> {
    let counts = counts(shape)?;
    let options = CompileOptions {
        expert_counts: (replicas > 0).then(|| counts.path().to_owned()),
        expert_replicas: replicas,
        dtype: Some(dtype),
        prefill: Some(vec![5, 300]),
        decode: Some(vec![1, 8, 33]),
        max_sequences: Some(33),
        max_context: Some(320),
        kv_tokens: Some(6400),
        expert_ranks,
        pipeline_ranks,
        tactics: Tactics { nth: Some(nth), ..Tactics::default() },
        ..CompileOptions::default()
    };
    let file = plan(shape, &options);
    let mut faults = vec![];
    let ranks = file.manifest.ranks.len();
    for rank in [0, ranks - 1] {
        let (mut gpu, mut cpu) = executors(&file, rank)?;
        for (i, bucket) in gpu.program().buckets.clone().iter().enumerate() {
            gpu.poison(0xff)?;
            gpu.randomize_state(i as u64)?;
            let batch = random_batch(&mut gpu, i, 40, 11 + i as u64, History::Held)?;
            gpu.poison_arena(0xff)?;
            gpu.upload(i, &batch)?;
            for (at, step) in bucket.steps.iter().enumerate() {
                if let Some(collective) = &step.collective {
                    play(&gpu, i, step, collective)?;
                    continue;
                }
                for written in compare_step(&mut cpu, &gpu, i, at)? {
                    if !written.holds(bound(file.manifest.dtype)) {
                        let place = format!("rank {rank}, {} {}", bucket.name, step.name);
                        faults.push(format!("{place}, %{}: {:e}, {:?}", written.name, written.error, written.first));
                    }
                }
            }
        }
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// Counts of a shape's experts that differ from expert to expert and from layer to layer.
fn counts(shape: &Shape) -> Result<tempfile::NamedTempFile> {
    let config = recipe(shape).config()?;
    let mut counts = ExpertCounts::new(&config.hash());
    for (i, layer) in config.layers.iter().enumerate() {
        if let FeedForward::Experts(experts) = &layer.feed_forward {
            let count = |expert: u64| 10 + 7 * (expert * (i as u64 + 3) % experts.count) + 90 * u64::from(expert == 3);
            counts.layers.insert(format!("layers.{i}.ffn"), (0..experts.count).map(count).collect());
        }
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), serde_json::to_string(&counts)?)?;
    Ok(file)
}

/// A rank's executors, with the same weights.
fn executors(file: &PlanFile, rank: usize) -> Result<(CudaExecutor, CpuExecutor)> {
    let mut gpu = CudaExecutor::new(file, rank, &Device::open(0)?, Graphs::Off)?;
    gpu.load(Origin::Synthetic(5), &|_| ())?;
    let program = &file.manifest.ranks[rank];
    let mut pool = HostPool::new(program)?;
    weights::fill_synthetic(&file.manifest, program, 5, pool.weights_mut(), &|_| ())?;
    Ok((gpu, CpuExecutor::new(Arc::new(file.manifest.clone()), rank, pool)?))
}

/// Receives from all ranks what this one sends; from one rank random numbers, and positions, slots and pages as this one has them.
fn play(gpu: &CudaExecutor, bucket: usize, step: &Step, collective: &Collective) -> Result<()> {
    let (pool, stream) = (gpu.pool(), gpu.stream());
    let at = |place: Ref| -> Result<usize> { Ok(usize::try_from(offset(gpu.program(), bucket, place)?)?) };
    let part = |list: &[Ref], i: usize| list.get(i).copied().context("a part without a place").and_then(at);
    let mut integers = 0;
    for (i, (dtype, count)) in collective.parts.iter().enumerate() {
        let mut bytes = vec![0; usize::try_from(count * dtype.bytes())?];
        match collective.kind {
            CollectiveKind::Send(_) => continue,
            CollectiveKind::Receive(_) if *dtype == Stored::I32 => {
                pool.read(at(own(gpu.program(), integers)?)?, &mut bytes, stream)?;
                integers += 1;
            }
            CollectiveKind::Receive(_) => {
                // Numbers of every type between 2^-7 and 2, of both signs.
                for (n, pair) in (0u32..).zip(bytes.chunks_mut(2)) {
                    let [low, high, ..] = n.wrapping_mul(0x9e37_79b9).rotate_left(16).to_le_bytes();
                    pair.copy_from_slice(&[low, 0x3c | (high & 0x83)]);
                }
            }
            // Of an all-to-all, the first block goes for all.
            CollectiveKind::AllGather | CollectiveKind::AllToAll => {
                pool.read(part(&step.reads, i)?, &mut bytes, stream)?;
                bytes = bytes.repeat(usize::try_from(collective.size)?);
            }
        }
        pool.write(part(&step.writes, i)?, &bytes, stream)?;
    }
    Ok(())
}

/// Where a rank has what goes with rows: positions, slots and pages, in the order in which they are sent.
fn own(program: &Program, integers: usize) -> Result<Ref> {
    let input = |name: &str| program.io.iter().position(|io| io.name == name).map(|id| Ref::Io(id as u32));
    let table = || program.states.iter().position(|state| state.role == StateRole::BlockTable);
    let place = match integers {
        0 => input("pos"),
        1 => input("slot"),
        _ => table().map(|id| Ref::State(id as u32)),
    };
    place.context("a rank without what it sends")
}
