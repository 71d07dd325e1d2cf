//! All ranks of a plan in one process, which meet in collectives: rank 0 has the sequences, the others run padding and their experts or
//! layers.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::CpuExecutor;
use crate::plan::{Bucket, Collective, CollectiveKind, ExpertCounts, Manifest, Step, meeting};
use crate::runtime::executor::{Batch, Executor, SamplingParams};
use crate::runtime::group::block;

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

    /// Runs a bucket's steps on all ranks, each its own from one collective to the next: between those, ranks need not have the same.
    ///
    /// # Errors
    /// A step failed, or ranks wait for each other's collectives for ever.
    pub fn run_steps(&mut self, bucket: usize) -> Result<()> {
        let manifest = Arc::clone(&self.ranks[0].manifest);
        // By rank: the collective that it has come to; none behind the last.
        let mut reached = vec![];
        for rank in 0..self.ranks.len() {
            reached.push(self.run_from(rank, bucket, 0)?);
        }
        loop {
            let next: Vec<Option<&Collective>> = (0..self.ranks.len())
                .map(|rank| manifest.ranks[rank].buckets[bucket].steps[reached[rank]?].collective.as_ref())
                .collect();
            let Some(together) = (0..next.len()).find_map(|rank| meeting(rank, |other| *next.get(other)?)) else {
                ensure!(
                    next.iter().all(Option::is_none),
                    "expected collectives that ranks run together, found {next:?}"
                );
                return Ok(());
            };
            match together[..] {
                [from, to] if next[from].is_some_and(|one| one.kind.peer().is_some()) => {
                    self.transfer(bucket, (from, to), &reached)?;
                }
                _ => self.exchange(bucket, &together, &reached)?,
            }
            for rank in together {
                reached[rank] = self.run_from(rank, bucket, reached[rank].map_or(0, |at| at + 1))?;
            }
        }
    }

    /// Runs a rank's steps from one on up to its next collective: its position, if there is one.
    fn run_from(&mut self, rank: usize, bucket: usize, from: usize) -> Result<Option<usize>> {
        self.ranks[rank].run_to_collective(bucket, from).with_context(|| format!("rank {rank}"))
    }

    /// Runs what one rank sends to another, both of which have reached it.
    fn transfer(&mut self, bucket: usize, (from, to): (usize, usize), reached: &[Option<usize>]) -> Result<()> {
        let manifest = Arc::clone(&self.ranks[0].manifest);
        let mut sent = vec![];
        for rank in [from, to] {
            let at = reached[rank].context("a rank behind its last collective; this is a bug")?;
            self.ranks[rank].poison_before(bucket, at);
            let bucket = &manifest.ranks[rank].buckets[bucket];
            let step = &bucket.steps[at];
            if rank == from {
                sent = self.ranks[rank].sent(bucket, step)?;
            } else {
                self.ranks[rank].receive(bucket, step, &sent)?;
            }
        }
        Ok(())
    }

    /// Runs what these ranks do together, all of which have reached it.
    fn exchange(&mut self, bucket: usize, members: &[usize], reached: &[Option<usize>]) -> Result<()> {
        let manifest = Arc::clone(&self.ranks[0].manifest);
        let found = |rank: usize| -> Result<(usize, &Bucket, &Step)> {
            let bucket = &manifest.ranks[rank].buckets[bucket];
            let at = reached[rank].context("a rank behind its last collective; this is a bug")?;
            Ok((at, bucket, &bucket.steps[at]))
        };
        let (_, _, first) = found(members[0])?;
        let collective = first.collective.as_ref().context("a step that is no collective; this is a bug")?;
        let mut sent = vec![];
        for &rank in members {
            let (at, of, step) = found(rank)?;
            self.ranks[rank].poison_before(bucket, at);
            sent.push(self.ranks[rank].sent(of, step)?);
        }
        for (to, &rank) in members.iter().enumerate() {
            let from_all = |part: usize| -> Vec<u8> {
                let of_rank = sent.iter().map(|parts| &parts[part][..]);
                match collective.kind {
                    CollectiveKind::AllGather => of_rank.flatten().copied().collect(),
                    _ => of_rank.flat_map(|all| block(all, to, sent.len())).copied().collect(),
                }
            };
            let received: Vec<Vec<u8>> = (0..collective.parts.len()).map(from_all).collect();
            let (_, of, step) = found(rank)?;
            self.ranks[rank].receive(of, step, &received)?;
        }
        Ok(())
    }
}

impl Executor for CpuEnsemble {
    fn manifest(&self) -> &Manifest {
        self.ranks[0].manifest()
    }

    fn device(&self) -> String {
        format!("the CPU, {} ranks in one process", self.ranks.len())
    }

    fn expert_counts(&self) -> Option<ExpertCounts> {
        // Each rank counts the choices that it made.
        self.ranks.iter().filter_map(CpuExecutor::expert_counts).reduce(ExpertCounts::and)
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
        let padding = Batch::default();
        for (i, rank) in self.ranks.iter_mut().enumerate() {
            rank.begin(bucket, if i == 0 { batch } else { &padding })?;
        }
        self.run_steps(bucket)?;
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
