//! Steps of a rank that has some of the experts, or of the layers, on one GPU against the CPU: exchanges are played, as if all ranks had the
//! rows of this one.
//! `tests/gpu_ranks.sh` runs whole plans, exchanges included, on several GPUs.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lfm2c::codegen::CompileOptions;
use lfm2c::codegen::select::Tactics;
use lfm2c::cuda::Device;
use lfm2c::ir::DType;
use lfm2c::plan::{Collective, CollectiveKind, DType as Stored, PlanFile, Program, Ref, StateRole, Step};
use lfm2c::runtime::compare::{bound, compare_step};
use lfm2c::runtime::cpu::{CpuExecutor, HostPool};
use lfm2c::runtime::cuda::{CudaExecutor, Graphs, offset};
use lfm2c::runtime::weights::{self, Origin};
use lfm2c::runtime::workload::{History, random_batch};
use libtest_mimic::Trial;

use crate::models::{SHAPES, Shape, fail, plan};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    for shape in SHAPES {
        for (dtype, ranks) in [(DType::F32, 2), (DType::BF16, 3), (DType::F16, 2)] {
            for nth in [0, 1, 2] {
                trials.push(Trial::test(format!("spread over {ranks} {} {dtype} {nth}", shape.name), move || {
                    check(shape, dtype, (ranks, 1), nth).map_err(fail)
                }));
            }
            trials.push(Trial::test(format!("stages of {ranks} {} {dtype}", shape.name), move || {
                check(shape, dtype, (1, 2), 0).map_err(fail)
            }));
        }
    }
    trials
}

/// Compares every step of the first and the last rank, from what the steps before it left on the GPU.
fn check(shape: &Shape, dtype: DType, (expert_ranks, pipeline_ranks): (u64, u64), nth: usize) -> Result<()> {
    let options = CompileOptions {
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
                    play(&gpu, i, step, collective, ranks)?;
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
fn play(gpu: &CudaExecutor, bucket: usize, step: &Step, collective: &Collective, ranks: usize) -> Result<()> {
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
                bytes = bytes.repeat(ranks);
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
