//! All ranks of a plan in one process, step by step: rank 0 has the sequences, the others run padding and their experts.

use anyhow::{Context, Result, ensure};

use super::CpuExecutor;
use crate::plan::{CollectiveKind, Manifest, Step};
use crate::runtime::executor::{Batch, Executor, SamplingParams};

/// Runs the programs of all ranks.
pub struct CpuEnsemble {
    /// By rank, at least one.
    ranks: Vec<CpuExecutor>,
}

impl CpuEnsemble {
    /// Of the executors of all ranks, by number.
    ///
    /// # Errors
    /// They are not those of one plan.
    pub fn new(ranks: Vec<CpuExecutor>) -> Result<CpuEnsemble> {
        let expected = ranks.first().context("expected ranks, found none")?.manifest.ranks.len();
        let in_order = ranks.iter().enumerate().all(|(rank, executor)| executor.rank == rank);
        ensure!(in_order && ranks.len() == expected, "expected {expected} ranks in order, found {}", ranks.len());
        Ok(CpuEnsemble { ranks })
    }

    fn first(&mut self) -> &mut CpuExecutor {
        &mut self.ranks[0]
    }

    /// Runs one step on all ranks.
    fn run_step(&mut self, bucket: usize, step: usize) -> Result<()> {
        let found = &self.ranks[0].program().buckets[bucket].steps[step];
        let Some(collective) = found.collective.clone() else {
            return self.ranks.iter_mut().try_for_each(|rank| rank.run_step(bucket, step));
        };
        self.ranks.iter_mut().for_each(|rank| rank.poison_before(bucket, step));
        let mut sent = vec![];
        for rank in &self.ranks {
            let (program, at, step) = of_rank(rank, bucket, step);
            sent.push(rank.sent(program, at, step)?);
        }
        for (to, rank) in self.ranks.iter_mut().enumerate() {
            let received: Vec<Vec<u8>> = (0..sent[to].len())
                .map(|part| {
                    let from = sent.iter().map(|sent| &sent[part][..]);
                    let own = |bytes: &[u8]| {
                        let each = bytes.len() / sent.len();
                        bytes[to * each..(to + 1) * each].to_vec()
                    };
                    match collective.kind {
                        CollectiveKind::AllGather => from.flatten().copied().collect(),
                        CollectiveKind::AllToAll => from.flat_map(own).collect(),
                    }
                })
                .collect();
            let manifest = std::sync::Arc::clone(&rank.manifest);
            let program = &manifest.ranks[to];
            let at = &program.buckets[bucket];
            rank.receive(program, at, &at.steps[step], &received)?;
        }
        Ok(())
    }
}

fn of_rank(rank: &CpuExecutor, bucket: usize, step: usize) -> (&crate::plan::Program, &crate::plan::Bucket, &Step) {
    let program = rank.program();
    let at = &program.buckets[bucket];
    (program, at, &at.steps[step])
}

impl Executor for CpuEnsemble {
    fn manifest(&self) -> &Manifest {
        self.ranks[0].manifest()
    }

    fn device(&self) -> String {
        format!("the CPU, {} ranks in one process", self.ranks.len())
    }

    fn force_experts(&mut self, slot: i32, choices: Vec<i32>) {
        self.first().force_experts(slot, choices);
    }

    fn lookahead(&self) -> usize {
        self.ranks[0].lookahead()
    }

    fn set_pages(&mut self, slot: u32, pages: &[u32]) -> Result<()> {
        self.first().set_pages(slot, pages)
    }

    fn set_sampling(&mut self, slot: u32, params: SamplingParams) -> Result<()> {
        self.first().set_sampling(slot, params)
    }

    fn set_stops(&mut self, slot: u32, eos: &[u32], last_position: u32) -> Result<()> {
        self.first().set_stops(slot, eos, last_position)
    }

    fn enqueue(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        let steps = super::bucket_of(self.ranks[0].program(), bucket)?.steps.len();
        let padding = Batch::default();
        for (i, rank) in self.ranks.iter_mut().enumerate() {
            rank.begin(bucket, if i == 0 { batch } else { &padding })?;
        }
        (0..steps).try_for_each(|step| self.run_step(bucket, step))?;
        self.first().finish(bucket, batch)
    }

    fn collect(&mut self, tokens: &mut Vec<i32>) -> Result<()> {
        self.first().collect(tokens)
    }

    fn discard(&mut self) -> Result<()> {
        self.first().discard()
    }

    fn run_head(&mut self, bucket: usize, rows: &[i32]) -> Result<()> {
        self.first().run_head(bucket, rows)
    }

    fn logits(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        self.first().logits(logits)
    }
}
