//! Parts of a model alone: the steps of one kind of block of all its layers, as a graph of their own.

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::experts::{Distinct, scope};
use super::inputs::{Inputs, Options};
use super::timing::{Marks, Times};
use super::work::{Ceilings, Work, fraction};
use crate::plan::{Bucket, DType};
use crate::runtime::cuda::CudaExecutor;
use crate::runtime::cuda::capture::Lanes;

/// Replays before those that count.
const WARM: usize = 3;

/// A kind of block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Block {
    /// Mixers that convolve.
    Conv,
    /// Mixers that attend.
    Attention,
    /// Feed-forward with experts: router, sorting, products, sum.
    Experts,
}

impl Block {
    /// Positions of its steps in a bucket, in order.
    pub fn steps(self, bucket: &Bucket) -> Vec<usize> {
        let scopes = bucket.steps.iter().filter(|step| step.cost.bytes_per_expert > 0).map(|step| scope(&step.name));
        let experts: std::collections::BTreeSet<&str> = scopes.collect();
        let is_part = |name: &str| match self {
            Block::Conv => name.contains(".conv."),
            Block::Attention => name.contains(".attention."),
            Block::Experts => experts.contains(scope(name)),
        };
        (0..bucket.steps.len()).filter(|&i| is_part(&bucket.steps[i].name)).collect()
    }
}

/// How long the blocks of a bucket take.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BlockReport {
    /// The bucket.
    pub bucket: String,
    /// The kind.
    pub block: Block,
    /// Layers that have one.
    pub layers: usize,
    /// Launches of all layers.
    pub launches: usize,
    /// All layers on the device, from the end of one replay to the end of the next.
    pub device: Times,
    /// One layer's share of the median.
    pub layer_ms: f64,
    /// Distinct experts of the layers.
    pub experts: Option<Distinct>,
    /// What all layers must do at the least.
    pub work: Work,
    /// How long that takes.
    pub floor_ms: f64,
    /// The floor's share of the median.
    pub fraction: f64,
    /// Operations a second.
    pub tflops: f64,
}

/// Times the blocks of one kind over the inputs of a bucket. What they compute means nothing, because the steps between them
/// are left out: what those would have left in the arena is random numbers of the plan's type. Integers mean what they say: a
/// block's own steps write those that it reads, but for positions and slots, which are the inputs'.
///
/// # Errors
/// The bucket has no such block, its steps cannot be captured, or the device failed.
pub fn measure_block(
    executor: &mut CudaExecutor,
    bucket: usize,
    block: Block,
    inputs: &Inputs,
    options: &Options,
    ceilings: &Ceilings,
) -> Result<BlockReport> {
    let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let (name, steps) = (at.name.clone(), block.steps(at));
    let scopes: std::collections::BTreeSet<&str> = steps.iter().map(|&i| scope(&at.steps[i].name)).collect();
    let layers = scopes.len();
    ensure!(!steps.is_empty(), "bucket {name}: expected steps of {block:?} blocks, found none");
    inputs.upload(executor, bucket)?;
    fill_arena(executor, bucket, options.seed)?;
    let load = inputs.load(executor, bucket, &steps, 0.0)?;
    let ready: Vec<_> = steps.iter().map(|&i| executor.ready[bucket][i].clone()).collect();
    let before: Vec<Vec<u32>> = (0..ready.len() as u32).map(|i| i.checked_sub(1).into_iter().collect()).collect();
    let lanes = Lanes::new(&before.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let captured = executor.streams.capture(|| executor.streams.queue(&ready, &lanes));
    let captured = captured.with_context(|| format!("capturing {block:?} blocks of bucket {name}"))?;
    let stream = executor.stream();
    let mut marks = Marks::new(executor.gpu(), WARM + options.runs())?;
    marks.record(stream)?;
    for _ in 0..WARM + options.runs() {
        captured.graph.launch(stream)?;
        marks.record(stream)?;
    }
    let device = Times::of(marks.spans(stream)?.split_off(WARM));
    let program = executor.program();
    let work = load.total(program, steps.iter().map(|&i| &program.buckets[bucket].steps[i]))?;
    let floor_ms = ceilings.floor_ms(&work);
    Ok(BlockReport {
        bucket: name,
        block,
        layers,
        launches: steps.len(),
        layer_ms: device.median_ms / layers as f64,
        experts: Distinct::of(&load.experts),
        work,
        floor_ms,
        fraction: fraction(floor_ms, device.median_ms),
        tflops: work.flops / (device.median_ms * 1e-3) / 1e12,
        device,
    })
}

/// Fills a bucket's arena with random numbers from [-1, 1). A whole step leaves there what its last steps wrote, in place of
/// what a block reads: its halves of f32 numbers would be infinite as bf16, and all rows would go to the same experts.
fn fill_arena(executor: &CudaExecutor, bucket: usize, seed: u64) -> Result<()> {
    let (program, dtype) = (executor.program(), executor.manifest.dtype);
    let dtype = if dtype == DType::I32 { DType::F32 } else { dtype };
    let (start, bytes) = (program.pool.arena.offset as usize, program.buckets[bucket].arena_bytes as usize);
    executor.randomize(start..start + bytes, dtype, seed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Cost, Phase, Step};

    #[test]
    fn blocks_are_told_by_names_and_experts() {
        let step = |name: &str, bytes_per_expert: u64| {
            let cost = Cost { bytes: 0, bytes_per_expert, bytes_per_position: 0, flops: 0 };
            let (reads, writes, updates, after) = (vec![], vec![], vec![], vec![]);
            Step { name: name.into(), op: 0, reads, writes, updates, after, cost, launch: None }
        };
        let steps = vec![
            step("embed.embed", 0),
            step("layers.0.conv.norm+matmul", 0),
            step("layers.0.ffn.norm+matmul+swiglu", 0),
            step("layers.1.attention.norm+matmul", 0),
            step("layers.1.ffn.norm+router+group", 0),
            step("layers.1.ffn.expert+swiglu", 7),
            step("layers.1.ffn.combine", 0),
            step("head.sample", 0),
        ];
        let bucket = Bucket {
            name: "decode_2".into(),
            phase: Phase::Decode,
            tokens: 2,
            sequences: 2,
            rows: 2,
            arena_bytes: 0,
            arena_lower_bound: 0,
            buffers: vec![],
            head: steps.len() as u32,
            steps,
            outputs: vec![],
            text: 0,
        };
        assert_eq!(Block::Conv.steps(&bucket), [1]);
        assert_eq!(Block::Attention.steps(&bucket), [3]);
        assert_eq!(Block::Experts.steps(&bucket), [4, 5, 6]);
    }
}
