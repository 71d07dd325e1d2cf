//! Executors on the CPU: of a plan of one rank, of one rank of several, or of all of them.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use super::with_origin;
use crate::cli::progress;
use crate::plan::PlanFile;
use crate::runtime::Executor;
use crate::runtime::cpu::{CpuEnsemble, CpuExecutor, HostPool};
use crate::runtime::ranks::Groups;
use crate::runtime::weights::{self, Origin};

/// An executor of this rank of the plan, if `groups` gathers ranks, or of all of them.
pub(super) fn executor(file: &PlanFile, model: Option<&Path>, groups: Option<Groups>) -> Result<Box<dyn Executor>> {
    match (groups, file.manifest.ranks.len()) {
        (_, 1) => Ok(Box::new(cpu_executor(file, model)?)),
        (None, _) => Ok(Box::new(cpu_ensemble(file, model)?)),
        (Some(groups), ranks) => {
            let group = groups(ranks)?;
            Ok(Box::new(cpu_executor_of(file, group.rank(), model)?.with_group(group)?))
        }
    }
}

/// The CPU executor of a plan of one rank, with its weights loaded.
pub fn cpu_executor(file: &PlanFile, model: Option<&Path>) -> Result<CpuExecutor> {
    super::one_rank(&file.manifest)?;
    cpu_executor_of(file, 0, model)
}

/// The executor of all ranks of a plan in this process, with their weights loaded.
fn cpu_ensemble(file: &PlanFile, model: Option<&Path>) -> Result<CpuEnsemble> {
    CpuEnsemble::new(
        (0..file.manifest.ranks.len()).map(|rank| cpu_executor_of(file, rank, model)).collect::<Result<_>>()?,
    )
}

/// The CPU executor of a rank's program, with its weights loaded.
fn cpu_executor_of(file: &PlanFile, rank: usize, model: Option<&Path>) -> Result<CpuExecutor> {
    let manifest = &file.manifest;
    let program = &manifest.ranks[rank];
    let mut pool = HostPool::new(program)?;
    let bar = progress::bytes("loading weights", weights::total_bytes(program));
    let report = |done: u64| bar.set_position(done);
    with_origin(file, model, |origin| {
        match origin {
            Origin::Synthetic(seed) => {
                weights::fill_synthetic(manifest, program, seed, pool.weights_mut(), &report)?;
            }
            Origin::Checkpoint(checkpoint) => {
                weights::load(manifest, program, checkpoint, pool.weights_mut(), &report)?;
            }
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    CpuExecutor::new(Arc::new(manifest.clone()), rank, pool)
}
