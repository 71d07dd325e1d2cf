//! What lies in an executor's pool: filled, written and read.

use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::{CudaExecutor, offset};
use crate::plan::{DType, Ref, StateRole, TensorType};
use crate::runtime::convert::write_f32;
use crate::runtime::io;
use crate::runtime::sampling::uniform;

/// Random numbers that memory is filled with again and again: an odd number, so that no two rows get the same.
const RANDOM_NUMBERS: u64 = (1 << 21) + 1009;

impl CudaExecutor {
    /// Fills the arena, caches, rings and io with a byte: what is not live must not matter.
    ///
    /// # Errors
    /// The device failed.
    pub fn poison(&mut self, byte: u8) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let stream = self.streams.main();
        for region in [program.pool.arena, program.pool.io] {
            self.pool.fill(region.offset as usize..(region.offset + region.bytes) as usize, byte, stream)?;
        }
        for (range, _) in self.histories() {
            self.pool.fill(range, byte, stream)?;
        }
        Ok(stream.synchronize()?)
    }

    /// Fills caches and rings with random numbers from [-1, 1): a history as good as any where one step counts, or its time.
    ///
    /// # Errors
    /// The device failed.
    pub fn randomize_state(&mut self, seed: u64) -> Result<()> {
        self.histories().try_for_each(|(range, dtype)| self.randomize(range, dtype, seed))
    }

    /// Places and element types of caches and rings.
    fn histories(&self) -> impl Iterator<Item = (Range<usize>, DType)> {
        let program = self.program();
        let states =
            program.states.iter().filter(|state| matches!(state.role, StateRole::KvPages | StateRole::ConvRing));
        states.map(|state| {
            let start = (program.pool.state.offset + state.offset) as usize;
            (start..start + state.ty.bytes().unwrap_or(0) as usize, state.ty.0)
        })
    }

    /// Fills a part of the pool with random numbers from [-1, 1) of a type.
    pub(super) fn randomize(&self, range: Range<usize>, dtype: DType, seed: u64) -> Result<()> {
        let values: Vec<f32> = (0..RANDOM_NUMBERS).map(|n| 2.0 * uniform(seed, n) - 1.0).collect();
        let mut bytes = vec![0; values.len() * dtype.bytes() as usize];
        write_f32(dtype, &values, &mut bytes);
        for at in range.clone().step_by(bytes.len()) {
            self.pool.write(at, &bytes[..bytes.len().min(range.end - at)], self.streams.main())?;
        }
        Ok(())
    }

    /// Fills the arena with a byte.
    ///
    /// # Errors
    /// The device failed.
    pub fn poison_arena(&mut self, byte: u8) -> Result<()> {
        let region = self.program().pool.arena;
        let stream = self.streams.main();
        self.pool.fill(region.offset as usize..(region.offset + region.bytes) as usize, byte, stream)?;
        Ok(stream.synchronize()?)
    }

    /// Writes an input of the graph by name.
    ///
    /// # Errors
    /// No such input, or more bytes than it has.
    pub fn set_input(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let range = io::input(program, name)?;
        ensure!(bytes.len() <= range.len(), "input `{name}`: {} bytes for a buffer of {}", bytes.len(), range.len());
        Ok(self.pool.write(program.pool.io.offset as usize + range.start, bytes, self.streams.main())?)
    }

    /// The bytes of a result of a bucket's last run, by its name in the graph.
    ///
    /// # Errors
    /// No such bucket or result, or the device failed.
    pub fn output(&self, bucket: usize, name: &str) -> Result<Vec<u8>> {
        let (offset, ty) = self.output_place(bucket, name)?;
        let mut bytes = vec![0; usize::try_from(ty.bytes().context("a result that overflows")?)?];
        self.pool.read(usize::try_from(offset)?, &mut bytes, self.streams.main())?;
        Ok(bytes)
    }

    /// Where a result lies in the pool, and its type.
    pub(super) fn output_place(&self, bucket: usize, name: &str) -> Result<(u64, &TensorType)> {
        let program = &self.manifest.ranks[self.rank];
        let at = program.buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
        let place = at.outputs.iter().find(|(found, _)| found == name).map(|(_, place)| *place);
        let place = place.with_context(|| format!("bucket {} returns no `{name}`", at.name))?;
        let written = at.steps.iter().rev().find_map(|step| {
            let i = step.writes.iter().position(|found| *found == place)?;
            program.semantics.get(step.op as usize)?.outputs.get(i)
        });
        let ty = written.with_context(|| format!("no step of bucket {} writes `{name}`", at.name))?;
        Ok((offset(program, bucket, place)?, ty))
    }

    /// Reads a place of a bucket.
    ///
    /// # Errors
    /// No such place, or the device failed.
    pub fn read(&self, bucket: usize, place: Ref, bytes: &mut [u8]) -> Result<()> {
        let at = offset(self.program(), bucket, place)?;
        Ok(self.pool.read(usize::try_from(at)?, bytes, self.streams.main())?)
    }
}
