//! Whole steps of a bucket: as a user feels them, by the host's clock through the executor's interface, and on the device.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::experts::{Distinct, LayerExperts};
use super::inputs::{Inputs, Options};
use super::timing::{Marks, Times, clocked};
use super::work::{Ceilings, Work, fraction};
use crate::plan::Phase;
use crate::runtime::cuda::CudaExecutor;
use crate::runtime::executor::Executor;

/// Runs before those that count.
const WARM: usize = 3;

/// How long a bucket's steps take.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BucketReport {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub phase: Phase,
    /// Rows of a step.
    pub rows: usize,
    /// Steps of the plan: launches, without what follows the last.
    pub launches: usize,
    /// Mean positions that a sequence has behind it.
    pub context: f64,
    /// By the host's clock: of decode steps the time from one's tokens to the next one's, with as many in flight as the
    /// executor allows; else from the call to the result.
    pub host: Times,
    /// Tokens a second by the host's median.
    pub tokens_per_second: f64,
    /// On the device: from the end of one replay of the graph to the end of the next.
    pub device: Times,
    /// Distinct experts of the layers.
    pub experts: Option<Distinct>,
    /// Each layer's.
    pub layers: Vec<LayerExperts>,
    /// What a step must do at the least.
    pub work: Work,
    /// How long that takes.
    pub floor_ms: f64,
    /// The floor's share of the host's median.
    pub fraction: f64,
    /// The floor's share of the device's median.
    pub device_fraction: f64,
}

/// Measures a bucket with its inputs, which the device need not hold yet.
///
/// # Errors
/// The device failed, or a step cannot be captured.
pub fn measure_bucket(
    executor: &mut CudaExecutor,
    bucket: usize,
    inputs: &Inputs,
    options: &Options,
    ceilings: &Ceilings,
) -> Result<BucketReport> {
    let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let (phase, name, launches) = (at.phase, at.name.clone(), at.steps.len());
    let (host, later) = match phase {
        Phase::Decode => decode(executor, bucket, inputs, options.steps)?,
        Phase::Prefill => (prefill(executor, bucket, inputs, options.runs())?, 0.0),
        Phase::Fixed => (fixed(executor, bucket, options.steps)?, 0.0),
    };
    let runs = if phase == Phase::Prefill { options.runs() } else { options.steps };
    let device = replays(executor, bucket, inputs, runs)?;
    // The experts that tokens choose which the model itself has chosen, as in the steps timed.
    match inputs.pending().filter(|_| phase == Phase::Decode) {
        Some(batch) => executor.upload(bucket, &batch)?,
        None => inputs.upload(executor, bucket)?,
    }
    let load = inputs.load(executor, bucket, &(0..launches).collect::<Vec<_>>(), later)?;
    let program = executor.program();
    let work = load.total(program, &program.buckets[bucket].steps)?;
    let (host, floor_ms) = (Times::of(host), ceilings.floor_ms(&work));
    Ok(BucketReport {
        name,
        phase,
        rows: inputs.rows,
        launches,
        context: inputs.context as f64 + later,
        host,
        tokens_per_second: inputs.rows as f64 / (host.median_ms * 1e-3),
        device,
        experts: Distinct::of(&load.experts),
        layers: load.experts,
        work,
        floor_ms,
        fraction: fraction(floor_ms, host.median_ms),
        device_fraction: fraction(floor_ms, device.median_ms),
    })
}

/// Times between tokens in milliseconds, and how many positions after the inputs' the steps ran on average.
fn decode(executor: &mut CudaExecutor, bucket: usize, inputs: &Inputs, steps: usize) -> Result<(Vec<f64>, f64)> {
    let (mut samples, mut later) = (Vec::with_capacity(steps), 0.0);
    let warm = (WARM + executor.lookahead()).min(inputs.room - 1);
    while samples.len() < steps {
        // Where the plan has room for no more positions, the sequences begin again at the inputs'.
        let count = (steps - samples.len() + warm).min(inputs.room);
        later += (warm..count).map(|step| step as f64).sum::<f64>();
        decode_round(executor, bucket, inputs, (warm, count), &mut samples)?;
    }
    let mean = later / samples.len() as f64;
    Ok((samples, mean))
}

/// Runs so many decode steps, with as many in flight as may be, and keeps the times of those that come after the first
/// `warm`. The first has the inputs' tokens, the others take what was chosen.
fn decode_round(
    executor: &mut dyn Executor,
    bucket: usize,
    inputs: &Inputs,
    (warm, count): (usize, usize),
    samples: &mut Vec<f64>,
) -> Result<()> {
    let mut batch = inputs.batch.clone().context("a decode bucket without rows")?;
    let pending = inputs.pending().context("a decode bucket without rows")?.tokens;
    let lookahead = executor.lookahead();
    let mut chosen = Vec::with_capacity(batch.tokens.len());
    let mut enqueued = 0;
    let mut last = Instant::now();
    for collected in 0..count {
        while enqueued < count && enqueued - collected < lookahead {
            executor.enqueue(bucket, &batch)?;
            batch.tokens.copy_from_slice(&pending);
            batch.positions.iter_mut().for_each(|position| *position += 1);
            enqueued += 1;
        }
        chosen.clear();
        executor.collect(&mut chosen)?;
        let now = Instant::now();
        if collected >= warm {
            samples.push(1e3 * now.duration_since(last).as_secs_f64());
        }
        last = now;
        ensure!(
            chosen.iter().all(|&token| token >= 0),
            "step {collected} chose no token for a row: expected one for each of {}, found {chosen:?}",
            batch.rows.len()
        );
    }
    Ok(())
}

fn prefill(executor: &mut CudaExecutor, bucket: usize, inputs: &Inputs, runs: usize) -> Result<Vec<f64>> {
    let batch = inputs.batch.as_ref().context("a prefill bucket without rows")?;
    let mut chosen = Vec::with_capacity(batch.rows.len());
    timed(runs, || {
        chosen.clear();
        executor.enqueue(bucket, batch)?;
        executor.collect(&mut chosen)
    })
}

fn fixed(executor: &mut CudaExecutor, bucket: usize, runs: usize) -> Result<Vec<f64>> {
    timed(runs, || {
        executor.replay(bucket, true)?;
        Ok(executor.stream().synchronize()?)
    })
}

/// Times of equal runs by the host's clock, in milliseconds, after some that are not counted.
fn timed(runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    (0..WARM).try_for_each(|_| work())?;
    (0..runs).map(|_| clocked(&mut work)).collect()
}

/// Times of replays of a bucket's graph on the device, queued ahead of it.
pub(super) fn replays(executor: &mut CudaExecutor, bucket: usize, inputs: &Inputs, runs: usize) -> Result<Times> {
    executor.capture(bucket)?;
    let mut samples = Vec::with_capacity(runs);
    let warm = WARM.min(inputs.room - 1);
    while samples.len() < runs {
        inputs.upload(executor, bucket)?;
        executor.stream().synchronize()?;
        // Decode steps move on by themselves, so far as there is room.
        let count = (runs - samples.len() + warm).min(inputs.room);
        let mut marks = Marks::new(executor.gpu(), count)?;
        marks.record(executor.stream())?;
        for _ in 0..count {
            executor.replay(bucket, true)?;
            marks.record(executor.stream())?;
        }
        samples.extend(marks.spans(executor.stream())?.drain(warm..));
    }
    Ok(Times::of(samples))
}
