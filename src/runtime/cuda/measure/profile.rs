//! A bucket step by step: what each takes by itself on the device, beside what the captured graph takes as a whole.

use anyhow::{Context, Result};
use serde::Serialize;

use super::bucket::replays;
use super::experts::Distinct;
use super::inputs::{Inputs, Options};
use super::timing::{Marks, Times, median};
use super::transfer::{Transfer, transfer};
use super::work::{Ceilings, Work, fraction};
use crate::cuda::DeviceMemory;
use crate::runtime::cuda::CudaExecutor;

/// Passes over the steps; medians are taken.
pub(super) const PASSES: usize = 20;
/// Memory that the device fills while the host queues the steps, and what one fill takes at the least.
pub(super) const SCRATCH_BYTES: u64 = 256 << 20;
pub(super) const FILL_US: usize = 60;
/// What the host needs for a step and the mark behind it, at the most.
const QUEUE_US: usize = 10;
/// Replays of each graph of the first steps, of which medians are taken: at the most, and at the least.
const PREFIX_RUNS: (usize, usize) = (30, 3);
/// Milliseconds that all of these may take, as far as the fewest let them.
const PREFIXES_MS: f64 = 20_000.0;

/// One step on the device.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct StepProfile {
    /// Its name.
    pub name: String,
    /// Its kernel, or the library that it is a call of.
    pub kernel: String,
    /// Blocks along x, y and z; zeros here and below of a library's, which does not say.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic and static shared memory of a block, in bytes.
    pub shared: u32,
    /// Registers of a thread.
    pub registers: u32,
    /// Local memory of a thread, in bytes: registers that did not fit.
    pub local: u32,
    /// Blocks that a multiprocessor holds at once.
    pub blocks_per_multiprocessor: u32,
    /// Median time, in microseconds, begun when everything before was done.
    pub us: f64,
    /// What it adds to a graph of the steps before it, in microseconds: the time beside its neighbours. Single steps are as
    /// precise as two such graphs can be compared, groups of them better.
    pub in_graph_us: f64,
    /// What it must do at the least.
    pub work: Work,
    /// How long that takes.
    pub floor_us: f64,
    /// The floor's share of the time in the graph.
    pub fraction: f64,
}

/// A bucket on the device.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Profile {
    /// The bucket's name.
    pub bucket: String,
    /// Rows.
    pub rows: usize,
    /// Positions that each sequence has behind it.
    pub context: usize,
    /// The steps, in order.
    pub steps: Vec<StepProfile>,
    /// Sum of their times.
    pub steps_us: f64,
    /// Time between two marks with nothing between them: part of every step's time.
    pub mark_us: f64,
    /// The whole graph, with what follows the last step: from the end of one replay to the end of the next.
    pub graph: Times,
    /// What the graph takes beyond the sum of its steps, in microseconds. Below 0, overlap of neighbours and shorter gaps save
    /// as much; above, gaps between launches cost it.
    pub graph_less_steps_us: f64,
    /// The copies of a new batch's inputs to the device, none for a graph that is no language model.
    pub transfer: Option<Transfer>,
    /// What all steps must do at the least.
    pub work: Work,
    /// How long that takes.
    pub floor_us: f64,
    /// The floor's share of the graph's median.
    pub fraction: f64,
    /// Distinct experts of the layers.
    pub experts: Option<Distinct>,
}

/// Profiles a bucket with its inputs.
///
/// # Errors
/// The device failed, or the bucket cannot be captured.
pub fn profile(
    executor: &mut CudaExecutor,
    bucket: usize,
    inputs: &Inputs,
    options: &Options,
    ceilings: &Ceilings,
) -> Result<Profile> {
    let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let (name, count) = (at.name.clone(), at.steps.len());
    inputs.upload(executor, bucket)?;
    let load = inputs.load(executor, bucket, &(0..count).collect::<Vec<_>>(), 0.0)?;
    let (mark_us, times) = step_times(executor, bucket, count, PASSES)?;
    let transfer = transfer(executor, bucket, inputs)?;
    let graph = replays(executor, bucket, inputs, options.runs())?;
    inputs.upload(executor, bucket)?;
    let in_graph = in_graph_times(executor, bucket, count, prefix_runs(count, graph.median_ms))?;
    let program = executor.program();
    let mut steps = Vec::with_capacity(count);
    let times = times.into_iter().zip(in_graph);
    for (i, (step, (us, in_graph_us))) in program.buckets[bucket].steps.iter().zip(times).enumerate() {
        let kernel = executor.manifest.runner(step).with_context(|| format!("step {} has no launch", step.name))?;
        // Of a library's kernels nothing is known.
        let (grid, block, dynamic) =
            step.launch.as_ref().map_or(([0; 3], 0, 0), |launch| (launch.grid, launch.block, launch.shared));
        let (registers, shared, local, blocks) = executor.occupancy(bucket, i).unwrap_or_default();
        let work = load.work(program, step)?;
        let floor_us = 1e3 * ceilings.floor_ms(&work);
        steps.push(StepProfile {
            name: step.name.clone(),
            kernel,
            grid,
            block,
            shared: dynamic + shared,
            registers,
            local,
            blocks_per_multiprocessor: blocks,
            us,
            in_graph_us,
            work,
            floor_us,
            fraction: fraction(floor_us, in_graph_us),
        });
    }
    let steps_us: f64 = steps.iter().map(|step| step.us).sum();
    let work: Work = steps.iter().map(|step| step.work).sum();
    let floor_us = 1e3 * ceilings.floor_ms(&work);
    let graph_us = 1e3 * graph.median_ms;
    Ok(Profile {
        bucket: name,
        rows: inputs.rows,
        context: inputs.context,
        steps,
        steps_us,
        mark_us,
        graph,
        graph_less_steps_us: graph_us - steps_us,
        transfer,
        work,
        floor_us,
        fraction: fraction(floor_us, graph_us),
        experts: Distinct::of(&load.experts),
    })
}

/// Median times of an empty span and of each step, in microseconds, of so many passes. The device is kept busy until all is queued, so that it
/// never waits for the host.
pub(super) fn step_times(
    executor: &CudaExecutor,
    bucket: usize,
    count: usize,
    passes: usize,
) -> Result<(f64, Vec<f64>)> {
    let stream = executor.stream();
    let (free, _) = executor.gpu().memory()?;
    let bytes = usize::try_from(SCRATCH_BYTES.min(free / 4))?;
    let scratch = DeviceMemory::new(executor.gpu(), bytes)?;
    let fills = (count * QUEUE_US).div_ceil(FILL_US).max(8);
    let mut samples = vec![Vec::with_capacity(passes); count + 1];
    for _ in 0..passes {
        let mut marks = Marks::new(executor.gpu(), count + 1)?;
        (0..fills).try_for_each(|_| scratch.fill(0..bytes, 0, stream))?;
        marks.record(stream)?;
        marks.record(stream)?;
        for step in 0..count {
            executor.launch_step(bucket, step)?;
            marks.record(stream)?;
        }
        for (samples, span) in samples.iter_mut().zip(marks.spans(stream)?) {
            samples.push(1e3 * span);
        }
    }
    let mut medians = samples.into_iter().map(|mut samples| {
        samples.sort_by(f64::total_cmp);
        median(&samples)
    });
    let mark = medians.next().unwrap_or(f64::NAN);
    Ok((mark, medians.collect()))
}

/// How often to replay each of so many graphs, which take half as long as the last one on average.
fn prefix_runs(count: usize, last_ms: f64) -> usize {
    let (most, fewest) = PREFIX_RUNS;
    ((PREFIXES_MS / (count as f64 * last_ms / 2.0)) as usize).clamp(fewest, most)
}

/// What each step adds to the graph of the steps before it, in microseconds: medians of so many runs.
fn in_graph_times(executor: &CudaExecutor, bucket: usize, count: usize, runs: usize) -> Result<Vec<f64>> {
    let mut before = 0.0;
    let mut times = Vec::with_capacity(count);
    for steps in 1..=count {
        let graph = executor.capture_first(bucket, steps)?;
        let mut marks = Marks::new(executor.gpu(), 1 + runs)?;
        executor.replay_captured(&graph)?;
        marks.record(executor.stream())?;
        for _ in 0..=runs {
            executor.replay_captured(&graph)?;
            marks.record(executor.stream())?;
        }
        let us = 1e3 * Times::of(marks.spans(executor.stream())?).median_ms;
        times.push(us - before);
        before = us;
    }
    Ok(times)
}

/// Steps that have something in common.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct StepGroup {
    /// What.
    pub label: String,
    /// Steps.
    pub count: usize,
    /// Sum of their times.
    pub us: f64,
    /// Sum of what they add to the graph.
    pub in_graph_us: f64,
    /// Share of all steps' time in the graph.
    pub share: f64,
    /// What they must do at the least.
    pub work: Work,
    /// Sum of their floors.
    pub floor_us: f64,
    /// The floors' share of the times in the graph.
    pub fraction: f64,
}

/// Groups steps by a key of their names, in the order in which the keys come.
pub fn group(steps: &[StepProfile], key: fn(&str) -> &str) -> Vec<StepGroup> {
    let all: f64 = steps.iter().map(|step| step.in_graph_us).sum();
    let mut groups: Vec<StepGroup> = vec![];
    for step in steps {
        let label = key(&step.name);
        let at = groups.iter().position(|group| group.label == label).unwrap_or_else(|| {
            let (label, work) = (label.to_owned(), Work::default());
            let none = StepGroup {
                label,
                count: 0,
                us: 0.0,
                in_graph_us: 0.0,
                share: 0.0,
                work,
                floor_us: 0.0,
                fraction: 0.0,
            };
            groups.push(none);
            groups.len() - 1
        });
        let group = &mut groups[at];
        group.count += 1;
        group.us += step.us;
        group.in_graph_us += step.in_graph_us;
        group.work = group.work + step.work;
        group.floor_us += step.floor_us;
    }
    for group in &mut groups {
        group.share = fraction(group.in_graph_us, all);
        group.fraction = fraction(group.floor_us, group.in_graph_us);
    }
    groups
}

/// What a step does, whatever its layer: `conv.norm+matmul` of `layers.3.conv.norm+matmul`.
pub fn label(name: &str) -> &str {
    let name = match name.rsplit_once('.') {
        Some((rest, number)) if number.bytes().all(|c| c.is_ascii_digit()) => rest,
        _ => name,
    };
    let rest = name.strip_prefix(layer(name)).and_then(|rest| rest.strip_prefix('.'));
    rest.filter(|_| name.starts_with("layers.")).unwrap_or(name)
}

/// The layer of a step, `layers.3`, or what else its name begins with.
pub fn layer(name: &str) -> &str {
    let dots: Vec<usize> = name.match_indices('.').map(|(at, _)| at).collect();
    let end = if name.starts_with("layers.") { dots.get(1) } else { dots.first() };
    &name[..end.copied().unwrap_or(name.len())]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn step(name: &str, us: f64, bytes: f64) -> StepProfile {
        StepProfile {
            name: name.into(),
            kernel: "stream rows=16".into(),
            grid: [132, 1, 1],
            block: 256,
            shared: 0,
            registers: 32,
            local: 0,
            blocks_per_multiprocessor: 2,
            us,
            in_graph_us: us,
            work: Work { bytes, flops: 0.0 },
            floor_us: us / 2.0,
            fraction: 0.5,
        }
    }

    #[test]
    fn names_have_a_layer_and_a_label() {
        let split = |name| (layer(name), label(name));
        assert_eq!(split("layers.3.conv.norm+matmul"), ("layers.3", "conv.norm+matmul"));
        assert_eq!(split("layers.3.ffn.matmul.2"), ("layers.3", "ffn.matmul"));
        assert_eq!(split("head.sample"), ("head", "head.sample"));
        assert_eq!(split("pointwise"), ("pointwise", "pointwise"));
        assert_eq!(split("pointwise.2"), ("pointwise", "pointwise"));
    }

    #[test]
    fn groups_add_up() {
        let steps = [
            step("layers.0.ffn.matmul", 10.0, 100.0),
            step("layers.0.conv.matmul", 30.0, 1.0),
            step("layers.1.ffn.matmul", 20.0, 50.0),
        ];
        let groups = group(&steps, label);
        let found: Vec<_> = groups.iter().map(|g| (&*g.label, g.count, g.us, g.work.bytes, g.fraction)).collect();
        assert_eq!(found, [("ffn.matmul", 2, 30.0, 150.0, 0.5), ("conv.matmul", 1, 30.0, 1.0, 0.5)]);
        assert_eq!(groups[0].share, 0.5);
        assert_eq!(group(&steps, layer).len(), 2);
    }

    #[test]
    fn graphs_of_long_steps_are_replayed_less_often() {
        assert_eq!(prefix_runs(127, 1.0), 30);
        assert_eq!(prefix_runs(244, 14.0), 11);
        assert_eq!(prefix_runs(244, 600.0), 3);
    }
}
