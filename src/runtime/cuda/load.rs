//! Weights into a pool on a device. Threads of the host copy tensors as they are into pinned memory, and while they fill the next
//! part of it, the device takes the last: what lies in a weight as in the checkpoint is copied there, the rest goes through a
//! staging area, from which a kernel puts it in its places. That area is the arena, which nothing else uses yet. Packed forms are
//! made when all weights are in place.

use anyhow::{Context, Result, ensure};

use super::CudaExecutor;
use crate::cuda::{Argument, Event, Function, HostMemory, LaunchShape};
use crate::plan::{DType, SERVICE_THREADS, ServiceRole, WeightSource};
use crate::runtime::weights::{Origin, Places, Room, Span, Transfer, Unpackable, WeightError, places, synthetic};

/// Parts in work at a time, and the most bytes of each.
const PARTS: usize = 4;
const PART_BYTES: usize = 32 << 20;

/// An arena below this is no staging area: starting a copy and a kernel takes longer than they do. Kernels read pinned memory
/// themselves then.
const LEAST_STAGING_BYTES: u64 = 1 << 20;

impl CudaExecutor {
    /// Fills the weights region, packed forms included; `progress` hears the bytes of weights done so far. The arena's contents are lost.
    ///
    /// # Errors
    /// The checkpoint does not fit the plan, a weight does not pack, or the device failed.
    pub fn load(&mut self, origin: Origin, progress: &dyn Fn(u64)) -> Result<()> {
        if let Origin::Synthetic(seed) = origin
            && matches!(self.manifest.model.weights, WeightSource::Synthetic(_))
        {
            return self.synthesize(seed, progress);
        }
        let program = &self.manifest.ranks[self.rank];
        let arena = program.pool.arena.bytes;
        let staged = arena >= LEAST_STAGING_BYTES;
        let placed_bytes = if staged { arena.min(PART_BYTES as u64) as usize } else { PART_BYTES };
        let room = Room { part_bytes: PART_BYTES, placed_bytes };
        let transfer = Transfer::new(&self.manifest, program, origin, room)?;
        let parts = transfer.parts();
        let mut buffers = (0..PARTS.min(parts.len()))
            .map(|_| Ok((HostMemory::new(&self.device, transfer.part_bytes())?, Event::new(&self.device, false)?)))
            .collect::<Result<Vec<_>>>()?;
        // One stream, the one that steps will run on, keeps everything in order: the staging area is written when the kernel before
        // has read it, and the arena by steps when all of this is done. Only the host has to wait, before it fills a buffer again.
        let stream = self.streams.main();
        let mut done = 0;
        for (i, part) in parts.iter().enumerate() {
            let (memory, taken) = &mut buffers[i % PARTS];
            if i >= PARTS {
                taken.synchronize()?;
            }
            transfer.read(part, memory.as_mut_slice());
            for span in part {
                self.take(span, memory, staged)?;
                done += span.elements * program.weights[span.weight].ty.0.bytes();
            }
            taken.record(stream)?;
            progress(done);
        }
        self.pack()?;
        Ok(stream.synchronize()?)
    }

    /// Queues what makes a span of pinned memory part of its weight. The memory stays as it is until the stream has passed that.
    fn take(&self, span: &Span, memory: &HostMemory, staged: bool) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let weight = &program.weights[span.weight];
        let to = program.pool.weights.offset + weight.offset;
        let stream = self.streams.main();
        if span.is_copy {
            let at = to + span.places.of(span.first) * span.dtype.bytes();
            return Ok(self.pool.write_from(at as usize, memory, span.bytes(), stream)?);
        }
        let from = if staged {
            let staging = program.pool.arena.offset;
            self.pool.write_from(staging as usize, memory, span.bytes(), stream)?;
            self.pool.address() + staging
        } else {
            memory.device_address() + span.start as u64
        };
        let kernel = self.kernels.service(ServiceRole::Place(span.dtype, weight.ty.0))?;
        let first = span.first - span.places.skipped;
        self.launch_with_places(kernel, &[self.pool.address() + to, from, first, span.elements], &span.places)
    }

    /// Queues a kernel over the elements of a tensor that ends its parameters with their places.
    fn launch_with_places(&self, kernel: &Function, args: &[u64], places: &Places) -> Result<()> {
        let &Places { part, whole, run, stride, offset, .. } = places;
        let args: Vec<Argument> =
            args.iter().copied().chain([part, whole, run, stride, offset]).map(Argument::Bits).collect();
        // Eight blocks fill a multiprocessor.
        let blocks = self.device.multiprocessors * 8;
        let shape =
            LaunchShape { grid: [blocks, 1, 1], block: SERVICE_THREADS, cluster: 1, shared: 0, dependent: false };
        Ok(self.streams.main().launch(kernel, &shape, &args)?)
    }

    /// Makes synthetic weights on the device.
    fn synthesize(&self, seed: u64, progress: &dyn Fn(u64)) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let tensors = &self.manifest.tensors;
        let mut done = 0;
        for weight in &program.weights {
            let to = self.pool.address() + program.pool.weights.offset + weight.offset;
            for at in places(weight, tensors)? {
                let tensor = &tensors[at.tensor as usize];
                let first = at.first - at.skipped;
                let key = synthetic::key_behind(synthetic::key(seed, tensor.synthetic.salt), at.skipped);
                let bits = |x: f32| u64::from(x.to_bits());
                let (center, scale) = (bits(tensor.synthetic.center), bits(tensor.synthetic.scale));
                let kernel = self.kernels.service(ServiceRole::Synthesize(tensor.dtype, weight.ty.0))?;
                self.launch_with_places(kernel, &[to, first, at.count, key, center, scale], &at)?;
            }
            done += weight.ty.bytes().unwrap_or(0);
            progress(done);
        }
        self.pack()?;
        Ok(self.streams.main().synchronize()?)
    }

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
             buckets or without --pack",
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
                Err(WeightError::Unpackable(Unpackable { weight: weight.name.clone(), failed, rows }).into())
            }
            None => Ok(()),
        }
    }
}
