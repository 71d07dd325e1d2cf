//! Weights into a pool on a device: laid out by several threads into pinned memory, copied from there while the next part is
//! laid out. The layout costs no pass of its own: a checkpoint's bytes must be copied into pinned memory in any case.

use anyhow::Result;

use super::CudaExecutor;
use crate::cuda::{Event, HostMemory, Stream};
use crate::runtime::weights::{Origin, Window};

/// Parts in work at a time, and the size of each.
const PARTS: usize = 4;
const PART_BYTES: usize = 32 << 20;

impl CudaExecutor {
    /// Fills the weights region; `progress` hears the bytes done so far.
    ///
    /// # Errors
    /// The checkpoint does not fit the plan, or the device failed.
    pub fn load(&mut self, origin: Origin, progress: &dyn Fn(u64)) -> Result<()> {
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
}
