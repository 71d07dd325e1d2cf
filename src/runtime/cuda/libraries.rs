//! Steps that are calls of libraries: what the host needs for them, made once when a plan is loaded.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::collective::Task;
use super::program::{element, offset, state};
use crate::cuda::{Cublaslt, Device, DeviceMemory, Matmul, MatmulPlaces, MatmulShape, Stream};
use crate::plan::{LibraryCall, LibraryMatmul, Program, Ref, StateRole, Step};

/// A call of a library over the pool.
#[derive(Clone, Debug)]
pub(super) struct Call {
    matmul: Arc<Matmul>,
    places: MatmulPlaces,
}

impl Call {
    /// Queues it. It waits for all before it in the stream, and no dependent launch may follow it.
    pub(super) fn queue(&self, pool: &DeviceMemory, stream: &Stream) -> Result<()> {
        Ok(self.matmul.queue(pool, &self.places, stream)?)
    }
}

/// Libraries that a plan's steps call, each opened when it is first needed.
pub(super) struct Libraries<'a> {
    device: &'a Arc<Device>,
    cublaslt: Option<Arc<Cublaslt>>,
    /// One for all steps that do the same.
    made: HashMap<LibraryCall, Arc<Matmul>>,
}

impl<'a> Libraries<'a> {
    /// None opened yet.
    pub(super) fn new(device: &'a Arc<Device>) -> Self {
        Libraries { device, cublaslt: None, made: HashMap::new() }
    }

    /// Opens the library of a call.
    pub(super) fn open(&mut self, call: LibraryCall) -> Result<&Arc<Cublaslt>> {
        match call {
            LibraryCall::Matmul(_) => {
                if self.cublaslt.is_none() {
                    self.cublaslt = Some(Cublaslt::new(self.device)?);
                }
                self.cublaslt.as_ref().context("opened just now")
            }
        }
    }

    /// What a call needs of the host.
    pub(super) fn matmul(&mut self, call: LibraryCall) -> Result<Arc<Matmul>> {
        if let Some(made) = self.made.get(&call) {
            return Ok(Arc::clone(made));
        }
        let LibraryCall::Matmul(LibraryMatmul { dtype, made, rows, columns, depth, residual, workspace, .. }) = call;
        let shape = MatmulShape {
            multiplied: element(dtype),
            made: element(made),
            rows,
            columns,
            depth,
            adds: residual.is_some(),
            workspace: usize::try_from(workspace)?,
        };
        let matmul = Arc::new(Matmul::new(self.open(call)?, shape)?);
        self.made.insert(call, Arc::clone(&matmul));
        Ok(matmul)
    }

    /// A step of a bucket that is a call.
    pub(super) fn task(&mut self, program: &Program, bucket: usize, step: &Step, call: LibraryCall) -> Result<Task> {
        let LibraryCall::Matmul(LibraryMatmul { x, weight, residual, result, .. }) = call;
        let at = |list: &[Ref], i: u32| -> Result<usize> {
            let place = list.get(i as usize).with_context(|| format!("step {} has no operand {i}", step.name))?;
            Ok(usize::try_from(offset(program, bucket, *place)?)?)
        };
        let places = MatmulPlaces {
            x: at(&step.reads, x)?,
            weight: at(&step.reads, weight)?,
            residual: residual.map(|i| at(&step.reads, i)).transpose()?,
            result: at(&step.writes, result)?,
            workspace: usize::try_from(offset(program, bucket, state(program, StateRole::Workspace)?)?)?,
        };
        let matmul = self.matmul(call).with_context(|| format!("step {}", step.name))?;
        Ok(Task::Library(Call { matmul, places }))
    }
}

/// Runs each product of some buckets once, over whatever lies in the pool: libraries load machine code with the first use, which no capture
/// allows. What steps wrote is lost.
pub(super) fn warm(tasks: &[Vec<Task>], pool: &DeviceMemory, stream: &Stream) -> Result<()> {
    let mut done: Vec<&Arc<Matmul>> = vec![];
    for task in tasks.iter().flatten() {
        let Task::Library(Call { matmul, places }) = task else { continue };
        if !done.iter().any(|known| Arc::ptr_eq(known, matmul)) {
            matmul.run_once(pool, places, stream)?;
            done.push(matmul);
        }
    }
    Ok(())
}
