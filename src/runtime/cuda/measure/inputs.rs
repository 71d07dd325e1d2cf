//! Inputs for a bucket that is measured: random, never zeros, and as many as it holds.

use anyhow::{Context, Result, bail, ensure};

use super::experts::count_experts;
use super::work::Load;
use crate::plan::{Bucket, DType, Phase, Program, Ref, TensorType};
use crate::runtime::convert::write_f32;
use crate::runtime::cuda::CudaExecutor;
use crate::runtime::executor::{Batch, Executor, PENDING, SamplingParams};
use crate::runtime::sampling::uniform;
use crate::runtime::workload::{History, Workload};

/// What is measured, and how often.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Options {
    /// Positions that each sequence of a decode bucket has behind it; fewer where the plan has no room.
    pub context: usize,
    /// Rows of each prompt of a prefill bucket, at the most; as many as go if not said.
    pub prompt: Option<usize>,
    /// Steps of a decode bucket; a tenth of it, and at least 10, of a prefill bucket.
    pub steps: usize,
    /// Divides the logits that tokens are chosen from; 0 takes the most likely.
    pub temperature: f32,
    /// Of random tokens and inputs.
    pub seed: u64,
    /// How the positions behind sequences come into the state.
    pub history: History,
}

impl Default for Options {
    fn default() -> Self {
        Options { context: 256, prompt: None, steps: 200, temperature: 0.0, seed: 0, history: History::Run }
    }
}

impl Options {
    /// Runs of a bucket whose steps take long.
    pub fn runs(&self) -> usize {
        (self.steps / 10).max(10)
    }
}

/// Positions that a sequence keeps for decode steps where the plan has little room.
const LEAST_ROUND: usize = 16;

/// A bucket's inputs, with what they need in the state.
#[derive(Clone, PartialEq, Debug)]
pub struct Inputs {
    /// Rows of a language model; none of a graph that is none.
    pub batch: Option<Batch>,
    /// Rows.
    pub rows: usize,
    /// Positions that each sequence of a decode bucket has behind it.
    pub context: usize,
    /// Decode steps from there on that the plan has room for.
    pub room: usize,
}

impl Inputs {
    /// Makes inputs for a bucket and sees to what must be in the state before. A decode bucket gets a row of each of its sequences; a
    /// prefill bucket gets whole prompts, as few as fill it unless their rows are said.
    ///
    /// # Errors
    /// The plan has too little room, or the device failed.
    pub fn prepare(executor: &mut CudaExecutor, bucket: usize, options: &Options) -> Result<Inputs> {
        let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
        let (phase, rows, most) = (at.phase, at.tokens as usize, at.sequences as usize);
        if phase == Phase::Fixed {
            let values = random_inputs(executor.program(), bucket, options.seed)?;
            values.iter().try_for_each(|(name, bytes)| executor.set_input(name, bytes))?;
            return Ok(Inputs { batch: None, rows, context: 0, room: usize::MAX });
        }
        if executor.manifest().model.forced_routing.is_some() {
            bail!(
                "the plan has forced routing: expected one whose routers choose; compile it without --forced-routing"
            );
        }
        let max_context = executor.manifest().limits.max_context as usize;
        if phase == Phase::Decode {
            let wanted = (options.context + options.steps + LEAST_ROUND).min(max_context);
            let mut work = workload(executor, rows, wanted, options)?;
            let positions = work.room().min(max_context);
            let context = context(options.context, positions)?;
            work.fill(executor, &vec![context; rows], options.history)?;
            let batch = work.batch(&(0..rows).map(|i| (i, 1)).collect::<Vec<_>>());
            return Ok(Inputs { batch: Some(batch), rows, context, room: positions - context });
        }
        let prompt = options.prompt.unwrap_or(rows).min(rows).min(max_context);
        let sequences = rows.div_ceil(prompt).min(most);
        let mut work = workload(executor, sequences, prompt, options)?;
        let prompt = work.room().min(prompt);
        let shares = shares(rows, prompt, sequences);
        let batch = work.batch(&shares);
        Ok(Inputs { rows: batch.tokens.len(), batch: Some(batch), context: 0, room: usize::MAX })
    }

    /// Queues the copies of the rows to the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn upload(&self, executor: &mut CudaExecutor, bucket: usize) -> Result<()> {
        self.batch.as_ref().map_or(Ok(()), |batch| executor.upload(bucket, batch))
    }

    /// The same rows with the tokens that were chosen last for their sequences.
    pub fn pending(&self) -> Option<Batch> {
        let batch = self.batch.clone()?;
        Some(Batch { tokens: vec![PENDING; batch.tokens.len()], ..batch })
    }

    /// What the bucket's work depends on with these inputs, the sequences being `later` positions further on. Experts are
    /// counted by running these steps over the inputs that the device holds.
    ///
    /// # Errors
    /// The device failed, or a router chose what there is not.
    pub fn load(&self, executor: &CudaExecutor, bucket: usize, steps: &[usize], later: f64) -> Result<Load> {
        let experts = count_experts(executor, bucket, steps)?;
        let Some(batch) = &self.batch else { return Ok(Load { experts, ..Load::default() }) };
        let (history, pairs) = positions(batch);
        let rows = batch.tokens.len() as f64;
        Ok(Load { history: history + rows * later, pairs: pairs + rows * later, experts })
    }
}

fn workload(executor: &mut CudaExecutor, sequences: usize, positions: usize, options: &Options) -> Result<Workload> {
    let work = Workload::new(executor, sequences, positions, options.seed)?;
    for slot in 0..sequences as u32 {
        let seed = options.seed.wrapping_add(u64::from(slot));
        let temperature = options.temperature;
        executor.set_sampling(slot, SamplingParams { temperature, seed, ..SamplingParams::default() })?;
    }
    Ok(work)
}

/// Positions to fill of so many that a sequence has room for.
fn context(wanted: usize, positions: usize) -> Result<usize> {
    ensure!(
        positions >= 2,
        "positions of a sequence: expected room for 2 at the least, found {positions}; compile with a larger --max-context and \
         --kv-tokens"
    );
    Ok(wanted.min(positions - LEAST_ROUND.min(positions / 2)))
}

/// Rows of each of at most so many sequences, whole prompts first.
fn shares(rows: usize, prompt: usize, sequences: usize) -> Vec<(usize, usize)> {
    let each = |i: usize| rows.saturating_sub(i * prompt).min(prompt);
    (0..sequences).map(|i| (i, each(i))).filter(|&(_, rows)| rows > 0).collect()
}

/// Positions before a batch, and pairs of a row and a position up to its own.
fn positions(batch: &Batch) -> (f64, f64) {
    let (mut history, mut pairs) = (0.0, 0.0);
    for (i, &position) in batch.positions.iter().enumerate() {
        pairs += f64::from(position) + 1.0;
        if i == 0 || batch.slots[i - 1] != batch.slots[i] {
            history += f64::from(position);
        }
    }
    (history, pairs)
}

/// Random numbers for each input of a bucket, by its name: from [-1, 1), and zeros for integers, because whatever they
/// count or point at, there is a first.
///
/// # Errors
/// No such bucket.
pub fn random_inputs(program: &Program, bucket: usize, seed: u64) -> Result<Vec<(String, Vec<u8>)>> {
    let at = program.buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let inputs = (0..).zip(&program.io).filter(|(_, io)| io.input);
    let read = inputs.filter_map(|(i, io)| Some((i, io, input_type(program, at, i)?)));
    read.map(|(i, io, ty)| {
        let count = usize::try_from(ty.elements().context("an input without a size")?)?;
        let mut bytes = vec![0; count * ty.0.bytes() as usize];
        if ty.0 != DType::I32 {
            let stream = seed.wrapping_add(u64::from(i) << 40);
            let values: Vec<f32> = (0..count as u64).map(|n| 2.0 * uniform(stream, n) - 1.0).collect();
            write_f32(ty.0, &values, &mut bytes);
        }
        Ok((io.name.clone(), bytes))
    })
    .collect()
}

/// The type that a bucket's steps read an io buffer as; none if none does.
fn input_type<'p>(program: &'p Program, bucket: &Bucket, io: u32) -> Option<&'p TensorType> {
    bucket.steps.iter().find_map(|step| {
        let at = step.reads.iter().position(|place| *place == Ref::Io(io))?;
        program.semantics.get(step.op as usize)?.inputs.get(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_leaves_room_for_steps() {
        assert_eq!(context(256, 1000).expect("there is room"), 256);
        assert_eq!(context(256, 256).expect("there is room"), 240);
        assert_eq!(context(256, 20).expect("there is room"), 10);
        assert_eq!(context(0, 2).expect("there is room"), 0);
        assert!(context(5, 1).is_err());
    }

    #[test]
    fn prompts_fill_a_bucket() {
        assert_eq!(shares(512, 512, 1), [(0, 512)]);
        assert_eq!(shares(1000, 400, 3), [(0, 400), (1, 400), (2, 200)]);
        assert_eq!(shares(1000, 400, 2), [(0, 400), (1, 400)]);
    }

    #[test]
    fn positions_before_a_batch_count_once_a_sequence() {
        let batch = Batch { tokens: vec![1; 4], positions: vec![0, 1, 2, 9], slots: vec![0, 0, 0, 1], rows: vec![] };
        assert_eq!(positions(&batch), (9.0, 1.0 + 2.0 + 3.0 + 10.0));
    }
}
