//! Logits of prompts' positions: nothing is generated, and no more logits are in memory than a step's head gives at a time.

use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};

use super::buckets::i32_size;
use super::scheduler::Step;
use super::{Executor, Request, SamplingParams, Scheduler};

/// A position whose logits are there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scored {
    /// The prompt, counted from 0.
    pub prompt: usize,
    /// The position in it, whose logits are of the token behind it.
    pub position: usize,
}

/// Runs prompts, as many side by side as the plan has room for, and gives the logits of their positions from `first` on:
/// `visit(positions, logits)` gets `[positions, vocab]`. Positions of a prompt come in order; how those of several mix
/// depends on the plan, the numbers do not.
///
/// # Errors
/// The plan cannot run a prompt, the executor failed, or `visit` did.
pub fn score<E: Executor + ?Sized>(
    executor: &mut E,
    prompts: impl IntoIterator<Item = Vec<u32>>,
    first: usize,
    mut visit: impl FnMut(&[Scored], &[f32]) -> Result<()>,
) -> Result<()> {
    executor.discard()?;
    let manifest = executor.manifest();
    let vocab = i32_size("vocabulary of the plan", manifest.model.vocab)?;
    // One step in flight: the head's logits are those of the last.
    let mut scheduler = Scheduler::new(manifest, None, 1)?;
    let mut scorer = Scorer { vocab, first, prompts: vec![], logits: vec![] };
    let mut prompts = prompts.into_iter().enumerate();
    loop {
        while scheduler.waiting() == 0
            && let Some((index, prompt)) = prompts.next()
        {
            let (max_new_tokens, eos, sampling) = (0, vec![], SamplingParams::default());
            scheduler
                .submit(index, Request { id: index as u64, prompt, max_new_tokens, eos, sampling, session: None })?;
            scorer.admit(&mut scheduler, executor)?;
        }
        scorer.admit(&mut scheduler, executor)?;
        let Some(step) = scheduler.next_step() else { return Ok(()) };
        executor.enqueue(step.bucket, &step.batch)?;
        let mut chosen = vec![];
        executor.collect(&mut chosen)?;
        scorer.step(executor, step, &mut visit)?;
        scheduler.complete(&chosen, |_, _| ControlFlow::Continue(()), |_, _| ())?;
    }
}

struct Scorer {
    vocab: usize,
    first: usize,
    /// By slot: the prompt in it.
    prompts: Vec<usize>,
    logits: Vec<f32>,
}

impl Scorer {
    /// Moves what fits into slots.
    fn admit<E: Executor + ?Sized>(&mut self, scheduler: &mut Scheduler, executor: &mut E) -> Result<()> {
        while let Some(sequence) = scheduler.admit() {
            executor.set_pages(sequence.slot, &sequence.pages)?;
            executor.set_sampling(sequence.slot, sequence.sampling)?;
            let last_position = u32::try_from(sequence.last_position())?;
            executor.set_stops(sequence.slot, &sequence.eos, last_position)?;
            let slot = sequence.slot as usize;
            self.prompts.resize(self.prompts.len().max(slot + 1), 0);
            self.prompts[slot] = sequence.index;
        }
        Ok(())
    }

    /// Runs the head for the step's rows that count, as many at a time as it holds.
    fn step<E: Executor + ?Sized>(
        &mut self,
        executor: &mut E,
        step: &Step,
        visit: &mut impl FnMut(&[Scored], &[f32]) -> Result<()>,
    ) -> Result<()> {
        let bucket = executor.manifest().ranks.first().and_then(|program| program.buckets.get(step.bucket));
        let tile = bucket.context("plan: expected the step's bucket, found none; compile the plan again")?.rows.max(1);
        let (positions, slots) = (&step.batch.positions, &step.batch.slots);
        let wanted = (0..positions.len()).filter(|&row| positions[row] as usize >= self.first);
        let wanted: Vec<i32> = wanted.map(|row| row as i32).collect();
        for rows in wanted.chunks(tile as usize) {
            executor.run_head(step.bucket, rows)?;
            self.logits.clear();
            executor.logits(&mut self.logits)?;
            let (expected, found) = (rows.len() * self.vocab, self.logits.len());
            ensure!(expected == found, "executor: expected {expected} logits, found {found}; this is a bug");
            let scored = |&row: &i32| Scored {
                prompt: self.prompts[slots[row as usize] as usize],
                position: positions[row as usize] as usize,
            };
            visit(&rows.iter().map(scored).collect::<Vec<_>>(), &self.logits)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::{Mock, VOCAB, bucket, logits_after, manifest};
    use super::*;
    use crate::plan::Phase;

    #[test]
    fn every_position_from_the_first_has_its_logits() {
        // Slots and pages for two at a time, steps of four rows, heads of two.
        let buckets = vec![bucket(Phase::Prefill, 4, 2, 2), bucket(Phase::Decode, 2, 2, 2)];
        let mut mock = Mock::new(manifest(2, 12, 24, 4, buckets));
        let prompts: Vec<Vec<u32>> =
            [9, 1, 12, 3, 5].iter().map(|&n| (0..n).map(|i| (i * i + n) % 13).collect()).collect();
        for first in [0, 2] {
            let mut found = vec![];
            let visit = |scored: &[Scored], logits: &[f32]| {
                assert_eq!(scored.len() * VOCAB as usize, logits.len());
                found.extend(scored.iter().copied().zip(logits.chunks(VOCAB as usize).map(<[f32]>::to_vec)));
                Ok(())
            };
            score(&mut mock, prompts.clone(), first, visit).expect("it runs");
            found.sort_by_key(|(scored, _)| (scored.prompt, scored.position));
            let all = prompts.iter().enumerate().flat_map(|(prompt, tokens)| {
                (first..tokens.len())
                    .map(move |position| (Scored { prompt, position }, logits_after(&tokens[..=position])))
            });
            assert_eq!(found, all.collect::<Vec<_>>(), "from {first}");
        }
    }

    #[test]
    fn a_prompt_that_does_not_fit_is_an_error() {
        let buckets = vec![bucket(Phase::Prefill, 4, 2, 2), bucket(Phase::Decode, 2, 2, 2)];
        let mut mock = Mock::new(manifest(2, 12, 24, 4, buckets));
        let error = score(&mut mock, [vec![1; 13]], 0, |_, _| Ok(())).expect_err("too long").to_string();
        assert!(error.contains("max-context = 12"), "{error}");
        let error = score(&mut mock, [vec![1]], 0, |_, _| anyhow::bail!("enough")).expect_err("ended").to_string();
        assert_eq!(error, "enough");
    }
}
