//! Steps that ranks run together: what a rank sends lies in its pool, and what it receives is written there.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::tensor::byte_len;
use super::{CpuExecutor, bucket_of, part, place_of};
use crate::plan::{Bucket, Collective, CollectiveKind, Ref, Step, TensorType};
use crate::runtime::group::{Group, Mates};

impl CpuExecutor {
    /// Makes the rank one of a group, with which it runs the plan's collectives.
    ///
    /// # Errors
    /// The group is not one of the plan's ranks.
    pub fn with_group(mut self, group: Box<dyn Group>) -> Result<Self> {
        self.mates = Some(Mates::new(group, self.rank, &self.manifest)?);
        Ok(self)
    }

    /// Runs a bucket's steps from one on, up to the next collective: its position, if there is one.
    pub(super) fn run_to_collective(&mut self, bucket: usize, from: usize) -> Result<Option<usize>> {
        let manifest = Arc::clone(&self.manifest);
        let steps = &bucket_of(&manifest.ranks[self.rank], bucket)?.steps;
        for (at, step) in steps.iter().enumerate().skip(from) {
            if step.collective.is_some() {
                return Ok(Some(at));
            }
            self.run_step(bucket, at)?;
        }
        Ok(None)
    }

    /// Runs a collective with the group.
    pub(super) fn run_collective(&mut self, bucket: &Bucket, step: &Step, collective: &Collective) -> Result<()> {
        let sent = self.sent(bucket, step)?;
        let size = self.manifest.ranks.len();
        let mates = self.mates.as_mut().with_context(|| {
            format!("collectives: expected {size} ranks, as the plan has, found one; start it with `mpirun -n {size}`")
        })?;
        let group = mates.of(collective);
        let mut all = Vec::with_capacity(sent.len());
        match collective.kind {
            CollectiveKind::Send(to) => group.send(usize::try_from(to)?, &sent.concat())?,
            CollectiveKind::Receive(from) => {
                let sizes = collective.parts.iter().map(|(dtype, count)| usize::try_from(count * dtype.bytes()));
                let sizes: Vec<usize> = sizes.collect::<Result<_, _>>()?;
                let mut received = vec![0; sizes.iter().sum()];
                group.receive(usize::try_from(from)?, &mut received)?;
                let mut rest = received.into_iter();
                all.extend(sizes.into_iter().map(|size| rest.by_ref().take(size).collect::<Vec<u8>>()));
            }
            CollectiveKind::AllGather | CollectiveKind::AllToAll => {
                for sent in &sent {
                    let mut received = vec![0; sent.len() * collective.growth()];
                    if collective.kind == CollectiveKind::AllGather {
                        group.all_gather(sent, &mut received)?;
                    } else {
                        group.all_to_all(sent, &mut received)?;
                    }
                    all.push(received);
                }
            }
        }
        self.receive(bucket, step, &all)
    }

    /// What the rank sends in a collective: the bytes of each of the step's reads but for a link.
    pub(super) fn sent(&self, bucket: &Bucket, step: &Step) -> Result<Vec<Vec<u8>>> {
        let program = self.program();
        let semantic = program.semantics.get(step.op as usize).context("no such semantic")?;
        let read = |(&place, ty): (&Ref, &TensorType)| {
            let region = match place {
                Ref::Arena(_) => self.pool.arena(),
                Ref::Io(_) => self.pool.io(),
                Ref::State(_) => self.pool.state(),
                Ref::Weight(_) => bail!("ranks may not send {place:?}"),
            };
            Ok(part(region, place_of(program, bucket, place)?, byte_len(ty)?, place)?.to_vec())
        };
        let link = step.collective.as_ref().map_or(0, |collective| collective.kind.first_read());
        step.reads.iter().zip(&semantic.inputs).skip(link).map(read).collect()
    }

    /// Writes what the rank has received to each of the step's writes.
    pub(super) fn receive(&mut self, bucket: &Bucket, step: &Step, all: &[Vec<u8>]) -> Result<()> {
        ensure!(all.len() == step.writes.len(), "{} places for {} parts", step.writes.len(), all.len());
        for (&place, bytes) in step.writes.iter().zip(all) {
            ensure!(matches!(place, Ref::Arena(_)), "ranks may not write {place:?} together");
            let start = place_of(self.program(), bucket, place)?;
            let room = self.pool.split().arena.get_mut(start..start.saturating_add(bytes.len()));
            room.with_context(|| format!("{place:?} leaves its region"))?.copy_from_slice(bytes);
        }
        Ok(())
    }
}
