//! The packed forms of weights, made on the device of what lies in the pool.

use anyhow::{Context, Result, ensure};

use super::CudaExecutor;
use crate::cuda::{Argument, LaunchShape};
use crate::plan::{DType, SERVICE_THREADS, ServiceRole};
use crate::runtime::weights::WeightError;

impl CudaExecutor {
    /// Makes the packed forms of the weights as they are now, behind what the stream has to do; loading does it by itself. The arena's
    /// contents are lost: it holds a counter for each of them meanwhile.
    ///
    /// # Errors
    /// A weight with rows that do not pack, an arena without room for the counters, or the device failed.
    pub fn pack(&self) -> Result<()> {
        let program = self.program();
        let (pool, stream) = (&program.pool, self.streams.main());
        if program.packed.is_empty() {
            return Ok(());
        }
        let kernel = self.kernels.service(ServiceRole::Pack)?;
        let mut counters = vec![0; program.packed.len() * DType::I32.bytes() as usize];
        let (needed, room) = (counters.len(), pool.arena.bytes);
        ensure!(
            needed as u64 <= room,
            "the plan's arena: expected {needed} bytes for counters of its {} packed weights, found {room}; compile it with larger \
             buckets or with --no-pack",
            program.packed.len()
        );
        let at = pool.arena.offset as usize;
        self.pool.fill(at..at + needed, 0, stream)?;
        let mut packed = vec![];
        for (entry, counter) in program.packed.iter().zip((at as u64..).step_by(DType::I32.bytes() as usize)) {
            let weight = program.weights.get(entry.weight as usize);
            let weight = weight.with_context(|| format!("no weight {} to pack", entry.weight))?;
            let (rows, columns) =
                weight.packed_rows().with_context(|| format!("weight {} cannot be packed", weight.name))?;
            packed.push((weight, rows));
            let address = |offset: u64| self.pool.address() + offset;
            let [to, from] = [entry.offset, weight.offset].map(|offset| address(pool.weights.offset + offset));
            let args = [to, from, rows, columns, address(counter)].map(Argument::Bits);
            // Eight blocks fill a multiprocessor; a warp takes a row.
            let blocks = u64::from(self.device.multiprocessors * 8).min(rows.div_ceil(u64::from(SERVICE_THREADS / 32)));
            let grid = [blocks.max(1) as u32, 1, 1];
            let shape = LaunchShape { grid, block: SERVICE_THREADS, cluster: 1, shared: 0, dependent: false };
            stream.launch(kernel, &shape, &args)?;
        }
        self.pool.read(at, &mut counters, stream)?;
        let failed = counters.as_chunks().0.iter().map(|&bytes| u64::from(u32::from_le_bytes(bytes)));
        match packed.into_iter().zip(failed).find(|(_, failed)| *failed > 0) {
            Some(((weight, rows), failed)) => {
                Err(WeightError::Unpackable { weight: weight.name.clone(), failed, rows }.into())
            }
            None => Ok(()),
        }
    }
}
