//! Parts of a model alone: the steps of one kind of block of all its layers, as a graph of their own.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::experts::Distinct;
use super::inputs::{Inputs, Options};
use super::timing::{Marks, Times};
use super::work::{Ceilings, Work, fraction};
use crate::plan::{Bucket, DType, Instr, Op, Semantic, Step, scope};
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
    /// Products of rows with one matrix, and what follows in their kernels.
    Dense,
}

impl Block {
    /// Positions of its steps in a bucket, in order, by what they compute.
    pub fn steps(self, semantics: &[Semantic], bucket: &Bucket) -> Vec<usize> {
        let is_product = |step: &Step| {
            let semantic = semantics.get(step.op as usize);
            // Integers would be what other steps leave in the arena.
            let floats = |semantic: &Semantic| semantic.inputs.iter().all(|ty| ty.0 != DType::I32);
            semantic.is_some_and(|s| floats(s) && s.body.iter().any(|Instr(op, ..)| matches!(op, Op::Matmul)))
        };
        let scopes = bucket.steps.iter().filter(|step| step.cost.bytes_per_expert > 0).map(|step| scope(&step.name));
        let experts: BTreeSet<&str> = scopes.collect();
        let is_part = |step: &Step| match self {
            Block::Conv => step.name.contains(".conv."),
            Block::Attention => step.name.contains(".attention."),
            Block::Experts => experts.contains(scope(&step.name)),
            Block::Dense => is_product(step),
        };
        (0..bucket.steps.len()).filter(|&i| is_part(&bucket.steps[i])).collect()
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
    /// What the block is made of, in order.
    pub stages: Vec<StageReport>,
}

/// What the steps of one name add to their blocks.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct StageReport {
    /// The name that the steps have in every layer, such as `ffn.expert+swiglu`.
    pub name: String,
    /// Steps of all layers.
    pub steps: usize,
    /// Their kernels.
    pub kernels: Vec<String>,
    /// What they add to the graph of the stages before them, median to median; dense products make a graph of their own.
    pub added_ms: f64,
    /// What they must do at the least.
    pub work: Work,
    /// How long that takes.
    pub floor_ms: f64,
    /// Operations a second of what they add; none if they add nothing that can be measured.
    pub tflops: Option<f64>,
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
    let (name, steps) = (at.name.clone(), block.steps(&executor.program().semantics, at));
    let scopes: BTreeSet<&str> = steps.iter().map(|&i| scope(&at.steps[i].name)).collect();
    let layers = scopes.len();
    ensure!(!steps.is_empty(), "bucket {name}: expected steps of {block:?} blocks, found none");
    inputs.upload(executor, bucket)?;
    fill_arena(executor, bucket, options.seed)?;
    let load = inputs.load(executor, bucket, &steps, 0.0)?;
    let program = executor.program();
    let total = |of: &[usize]| load.total(program, of.iter().map(|&i| &program.buckets[bucket].steps[i]));
    let measured = |part: &[usize], what: &str| {
        let times = replay(executor, bucket, part, options.runs());
        times.with_context(|| format!("{block:?} blocks of bucket {name} up to {what}"))
    };
    let (mut stages, mut so_far, mut before) = (vec![], BTreeSet::new(), 0.0);
    let mut last = None;
    for (stage, own) in by_stage(&program.buckets[bucket], &steps) {
        // Dense products read nothing that each other write and that matters.
        if block == Block::Dense {
            so_far.clear();
            before = 0.0;
        }
        // All layers up to this stage: what a step reads was written by its own block.
        so_far.extend(&own);
        let part: Vec<usize> = so_far.iter().copied().collect();
        let times = measured(&part, &stage)?;
        let added_ms = times.median_ms - before;
        let work = total(&own)?;
        before = times.median_ms;
        let tflops = (added_ms > 0.0).then(|| work.flops / (added_ms * 1e-3) / 1e12);
        let floor_ms = ceilings.floor_ms(&work);
        let kernels = kernels(executor, bucket, &own);
        stages.push(StageReport { name: stage, steps: own.len(), kernels, added_ms, work, floor_ms, tflops });
        last = Some(times);
    }
    let device = match block {
        Block::Dense => measured(&steps, "the end")?,
        _ => last.context("a block without stages")?,
    };
    let work = total(&steps)?;
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
        stages,
    })
}

/// The kernels of steps, or libraries, each once.
fn kernels(executor: &CudaExecutor, bucket: usize, steps: &[usize]) -> Vec<String> {
    let steps = steps.iter().map(|&i| &executor.program().buckets[bucket].steps[i]);
    let names = steps.filter_map(|step| executor.manifest.runner(step));
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Steps by what they are called in every layer, in the order of the first layer that has them.
fn by_stage(bucket: &Bucket, steps: &[usize]) -> Vec<(String, Vec<usize>)> {
    let mut stages: Vec<(String, Vec<usize>)> = vec![];
    for &i in steps {
        let name = stage(&bucket.steps[i].name);
        match stages.iter_mut().find(|(known, _)| known == name) {
            Some((_, list)) => list.push(i),
            None => stages.push((name.to_owned(), vec![i])),
        }
    }
    stages
}

/// `layers.3.conv.norm+matmul` without the layer.
fn stage(name: &str) -> &str {
    let layer = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
    layer.filter(|(number, _)| number.bytes().all(|b| b.is_ascii_digit())).map_or(name, |(_, rest)| rest)
}

/// Times a graph of some steps of a bucket, one after the other.
pub(super) fn replay(executor: &CudaExecutor, bucket: usize, steps: &[usize], runs: usize) -> Result<Times> {
    let tasks: Vec<_> = steps.iter().map(|&i| executor.tasks[bucket][i].clone()).collect();
    let before: Vec<Vec<u32>> = (0..tasks.len() as u32).map(|i| i.checked_sub(1).into_iter().collect()).collect();
    let lanes = Lanes::new(&before.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let captured = executor.streams.capture(|| executor.queue(&tasks, &lanes)).context("capturing")?;
    let stream = executor.stream();
    let mut marks = Marks::new(executor.gpu(), WARM + runs)?;
    marks.record(stream)?;
    for _ in 0..WARM + runs {
        captured.graph.launch(stream)?;
        marks.record(stream)?;
    }
    Ok(Times::of(marks.spans(stream)?.split_off(WARM)))
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
    use crate::plan::{Cost, Phase, Slot, TensorType};

    #[test]
    fn blocks_are_told_by_names_and_experts() {
        let step = |name: &str, bytes_per_expert: u64| {
            let cost = Cost { bytes: 0, bytes_per_expert, bytes_per_position: 0, flops: 0, ..Cost::default() };
            let (reads, writes, updates, after) = (vec![], vec![], vec![], vec![]);
            Step {
                name: name.into(),
                op: 0,
                reads,
                writes,
                updates,
                after,
                cost,
                launch: None,
                collective: None,
                library: None,
            }
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
        assert_eq!(Block::Conv.steps(&[], &bucket), [1]);
        assert_eq!(Block::Attention.steps(&[], &bucket), [3]);
        assert_eq!(Block::Experts.steps(&[], &bucket), [4, 5, 6]);
        let product = |op: Op, last: DType| Semantic {
            name: "product".into(),
            inputs: vec![TensorType(DType::BF16, vec![2, 8]), TensorType(last, vec![4, 8])],
            outputs: vec![TensorType(DType::BF16, vec![2, 4])],
            temps: vec![],
            body: vec![Instr(op, vec![Slot::In(0), Slot::In(1)], vec![Slot::Out(0)])],
        };
        let dense = |op: Op, last: DType| Block::Dense.steps(&[product(op, last)], &bucket).len();
        assert_eq!(dense(Op::Matmul, DType::BF16), bucket.steps.len(), "all steps are of this one semantic");
        assert_eq!((dense(Op::Matmul, DType::I32), dense(Op::Embed, DType::BF16)), (0, 0));
        let steps = [3, 4, 5, 6];
        let stages = by_stage(&bucket, &steps);
        assert_eq!(stages.iter().flat_map(|(_, steps)| steps.clone()).collect::<Vec<_>>(), steps);
        assert_eq!(stages[0], ("attention.norm+matmul".to_owned(), vec![3]));
        assert_eq!(
            ["layers.12.ffn.combine", "layers.x.y", "head.sample"].map(stage),
            ["ffn.combine", "layers.x.y", "head.sample"]
        );
    }
}
