//! Weights into a pool on a device: laid out by several threads into pinned memory, copied from there while the next part is
//! laid out. The layout costs no pass of its own: a checkpoint's bytes must be copied into pinned memory in any case.

use anyhow::Result;

use super::CudaExecutor;
use crate::cuda::{Argument, Event, HostMemory, LaunchShape, Stream};
use crate::plan::{SERVICE_THREADS, ServiceRole, WeightSource};
use crate::runtime::weights::{Origin, Window, places, synthetic};

/// Parts in work at a time, and the size of each.
const PARTS: usize = 4;
const PART_BYTES: usize = 32 << 20;

impl CudaExecutor {
    /// Fills the weights region; `progress` hears the bytes done so far.
    ///
    /// # Errors
    /// The checkpoint does not fit the plan, or the device failed.
    pub fn load(&mut self, origin: Origin, progress: &dyn Fn(u64)) -> Result<()> {
        if let Origin::Synthetic(seed) = origin
            && matches!(self.manifest.model.weights, WeightSource::Synthetic(_))
        {
            return self.synthesize(seed, progress);
        }
        let program = &self.manifest.ranks[self.rank];
        let region = program.pool.weights;
        let window = Window::new(&self.manifest, program, origin)?;
        let stream = Stream::new(&self.device)?;
        let size = PART_BYTES.min(region.bytes as usize).max(1);
        let mut parts = (0..PARTS)
            .map(|_| Ok((HostMemory::new(&self.device, size)?, Event::new(&self.device, false)?)))
            .collect::<Result<Vec<_>>>()?;
        for (i, start) in (0..region.bytes).step_by(size).enumerate() {
            let (memory, copied) = &mut parts[i % PARTS];
            if i >= PARTS {
                copied.synchronize()?;
            }
            let length = (region.bytes - start).min(size as u64) as usize;
            window.write(start, &mut memory.as_mut_slice()[..length]);
            self.pool.write_from((region.offset + start) as usize, memory, 0..length, &stream)?;
            copied.record(&stream)?;
            progress(start + length as u64);
        }
        Ok(stream.synchronize()?)
    }

    /// Makes synthetic weights on the device.
    fn synthesize(&self, seed: u64, progress: &dyn Fn(u64)) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let tensors = &self.manifest.tensors;
        let blocks = self.device.multiprocessors * 8;
        let shape =
            LaunchShape { grid: [blocks, 1, 1], block: SERVICE_THREADS, cluster: 1, shared: 0, dependent: false };
        let mut done = 0;
        for weight in &program.weights {
            let to = self.pool.address() + program.pool.weights.offset + weight.offset;
            for at in places(weight, tensors)? {
                let tensor = &tensors[at.tensor as usize];
                let count = tensor.shape.iter().product();
                let key = synthetic::key(seed, tensor.synthetic.salt);
                let bits = |x: f32| u64::from(x.to_bits());
                let (center, scale) = (bits(tensor.synthetic.center), bits(tensor.synthetic.scale));
                let args = [to, 0, count, key, center, scale, at.part, at.whole, at.run, at.stride, at.offset];
                let kernel = self.kernels.service(ServiceRole::Synthesize(tensor.dtype, weight.ty.0))?;
                self.streams.main().launch(kernel, &shape, &args.map(Argument::Bits))?;
            }
            done += weight.ty.bytes().unwrap_or(0);
            progress(done);
        }
        Ok(self.streams.main().synchronize()?)
    }
}
