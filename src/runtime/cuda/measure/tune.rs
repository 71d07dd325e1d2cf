//! Times of all steps of a plan, by which kernels are chosen, and what a device refuses to run of it.
//!
//! Each step is timed as in a profile: by itself, begun when everything before it is done. What neighbours gain or lose by
//! overlapping in the captured graph does not show there: [`graph_us`] times whole graphs. Dense products of prompts are timed as a
//! graph of all steps that compute the same, because what a kernel takes to begin and to end is a good part of them, and most of it
//! goes by beside the one before.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::blocks::{Block, replay};
use super::bucket::replays;
use super::inputs::{Inputs, Options};
use super::profile::{PASSES, step_times};
use crate::cuda::Device;
use crate::plan::{Phase, PlanFile};
use crate::runtime::cuda::CudaExecutor;
use crate::runtime::cuda::libraries::Libraries;
use crate::runtime::cuda::program::Kernels;
use crate::runtime::executor::Batch;

/// Passes over a bucket's steps that take longer than this together are fewer, but not fewer than so many.
const PATIENCE_US: f64 = 5e5;
const LEAST_PASSES: usize = 3;
/// Replays of a graph, at the most.
const GRAPH_RUNS: usize = 60;

/// A step whose kernel the device refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Position of its bucket.
    pub bucket: usize,
    /// Its position there.
    pub step: usize,
    /// What the driver said.
    pub error: String,
}

/// What timing a plan gave.
#[derive(Clone, PartialEq, Debug)]
pub enum Timed {
    /// For each bucket, by position, the median time of each step, in microseconds.
    Steps(Vec<(usize, Vec<f64>)>),
    /// Steps that do not run; none was timed. There may be more.
    Refused(Vec<Refused>),
}

/// The steps of a rank whose kernels the device does not even load, or for which a library has no algorithm.
///
/// # Errors
/// No such rank, or no such library.
pub fn refused_kernels(file: &PlanFile, rank: usize, device: &Arc<Device>) -> Result<Vec<Refused>> {
    let program = file.manifest.ranks.get(rank).with_context(|| format!("no rank {rank}"))?;
    let kernels = Kernels::refused(file, program, device)?;
    let mut libraries = Libraries::new(device);
    let mut refused = vec![];
    for (bucket, at) in program.buckets.iter().enumerate() {
        for (step, launch) in at.steps.iter().enumerate().filter_map(|(i, step)| Some((i, step.launch.as_ref()?))) {
            let found = kernels.iter().find(|(kernel, _)| *kernel == launch.kernel);
            refused.extend(found.map(|(_, error)| Refused { bucket, step, error: error.clone() }));
        }
        for (step, call) in at.steps.iter().enumerate().filter_map(|(i, step)| Some((i, step.library?))) {
            // Without the library there is nothing to measure.
            libraries.open(call)?;
            let error = libraries.matmul(call).err();
            refused.extend(error.map(|error| Refused { bucket, step, error: format!("{error:#}") }));
        }
    }
    Ok(refused)
}

/// Times every step of some buckets, over inputs and state as [`Inputs::prepare`] makes them; `progress` hears how many
/// buckets are done.
///
/// # Errors
/// The plan has too little room, or the device failed otherwise than by refusing a step.
pub fn time_steps(
    executor: &mut CudaExecutor,
    buckets: &[usize],
    options: &Options,
    progress: &dyn Fn(usize),
) -> Result<Timed> {
    let mut refused = vec![];
    for &bucket in buckets {
        refused.extend(first_refused(executor, bucket)?);
        // A failure that stays ends everything; a refused launch does not.
        if !refused.is_empty() && executor.stream().synchronize().is_err() {
            break;
        }
    }
    if !refused.is_empty() {
        return Ok(Timed::Refused(refused));
    }
    let mut times = Vec::with_capacity(buckets.len());
    for (done, &bucket) in (1..).zip(buckets) {
        let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
        let name = at.name.clone();
        times.push((bucket, bucket_times(executor, bucket, options).with_context(|| format!("bucket {name}"))?));
        progress(done);
    }
    Ok(Timed::Steps(times))
}

/// The median time of a bucket's whole graph over inputs that were prepared for it, in microseconds.
///
/// # Errors
/// The device refused to run it.
pub fn graph_us(executor: &mut CudaExecutor, bucket: usize, inputs: &Inputs) -> Result<f64> {
    let once = replays(executor, bucket, inputs, 1)?.median_ms;
    let runs = (1e-3 * PATIENCE_US / once) as usize;
    Ok(1e3 * replays(executor, bucket, inputs, runs.clamp(LEAST_PASSES, GRAPH_RUNS))?.median_ms)
}

fn bucket_times(executor: &mut CudaExecutor, bucket: usize, options: &Options) -> Result<Vec<f64>> {
    let inputs = Inputs::prepare(executor, bucket, options)?;
    inputs.upload(executor, bucket)?;
    let count = executor.program().buckets[bucket].steps.len();
    // Warms up, and finds candidates that are no match for their bucket.
    let (_, once) = step_times(executor, bucket, count, 1)?;
    let passes = ((PATIENCE_US / once.iter().sum::<f64>()) as usize).clamp(LEAST_PASSES, PASSES);
    let mut times = step_times(executor, bucket, count, passes)?.1;
    let program = executor.program();
    let at = &program.buckets[bucket];
    if at.phase == Phase::Prefill {
        let mut alike: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for i in Block::Dense.steps(&program.semantics, at) {
            alike.entry(at.steps[i].op).or_default().push(i);
        }
        for steps in alike.values() {
            let each = 1e3 * replay(executor, bucket, steps, passes)?.median_ms / steps.len() as f64;
            steps.iter().for_each(|&i| times[i] = each);
        }
    }
    Ok(times)
}

/// Runs a bucket step by step over padding alone, up to the first step that does not run: what follows would read what nobody
/// wrote.
fn first_refused(executor: &mut CudaExecutor, bucket: usize) -> Result<Option<Refused>> {
    let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let (phase, count) = (at.phase, at.steps.len());
    if phase != Phase::Fixed {
        executor.upload(bucket, &Batch::default())?;
    }
    executor.stream().synchronize()?;
    for step in 0..count {
        let ran = executor.launch_step(bucket, step).and_then(|()| Ok(executor.stream().synchronize()?));
        if let Err(error) = ran {
            return Ok(Some(Refused { bucket, step, error: format!("{error:#}") }));
        }
    }
    Ok(None)
}
