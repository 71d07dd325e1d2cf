//! The pool in host memory: one run of bytes, divided into the plan's regions.

use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;

use crate::plan::{Program, Region};

/// One program's pool. Memory is zero until written, and is committed only when touched.
#[derive(Debug)]
pub struct HostPool {
    bytes: MmapMut,
    /// Starts and ends of weights, state, arena, io.
    regions: [(usize, usize); 4],
}

/// The regions of a pool, borrowed side by side.
#[derive(Debug)]
pub struct Regions<'a> {
    /// Written once, when weights are loaded.
    pub weights: &'a [u8],
    /// Lives from step to step.
    pub state: &'a mut [u8],
    /// Reused within a bucket.
    pub arena: &'a mut [u8],
    /// Exchanged with the host.
    pub io: &'a mut [u8],
}

impl HostPool {
    /// Maps a pool of the program's size.
    ///
    /// # Errors
    /// Regions that overlap or leave the address space, or memory that the system does not give.
    pub fn new(program: &Program) -> Result<Self> {
        let pool = &program.pool;
        let mut regions = [(0, 0); 4];
        let mut end = 0;
        let listed = [("weights", pool.weights), ("state", pool.state), ("arena", pool.arena), ("io", pool.io)];
        for (slot, (name, region)) in regions.iter_mut().zip(listed) {
            let range = bounds(region).with_context(|| format!("region `{name}` does not fit this machine"))?;
            ensure!(
                range.0 >= end,
                "region `{name}` starts at {}, inside the region before, which ends at {end}",
                range.0
            );
            end = range.1;
            *slot = range;
        }
        let bytes = MmapMut::map_anon(end.max(1)).with_context(|| format!("no memory for a pool of {end} bytes"))?;
        Ok(HostPool { bytes, regions })
    }

    /// The weights region, to be filled before the first run.
    pub fn weights_mut(&mut self) -> &mut [u8] {
        let (start, end) = self.regions[0];
        &mut self.bytes[start..end]
    }

    /// The regions side by side.
    pub fn split(&mut self) -> Regions<'_> {
        let [weights, state, arena, io] = self.regions;
        let (head, rest) = self.bytes.split_at_mut(state.0);
        let (state_bytes, rest) = rest.split_at_mut(arena.0 - state.0);
        let (arena_bytes, io_bytes) = rest.split_at_mut(io.0 - arena.0);
        Regions {
            weights: &head[weights.0..weights.1],
            state: &mut state_bytes[..state.1 - state.0],
            arena: &mut arena_bytes[..arena.1 - arena.0],
            io: &mut io_bytes[..io.1 - io.0],
        }
    }

    /// The state region.
    pub fn state(&self) -> &[u8] {
        &self.bytes[self.regions[1].0..self.regions[1].1]
    }

    /// The arena.
    pub fn arena(&self) -> &[u8] {
        &self.bytes[self.regions[2].0..self.regions[2].1]
    }

    /// The io region.
    pub fn io(&self) -> &[u8] {
        &self.bytes[self.regions[3].0..self.regions[3].1]
    }

    /// The whole pool, at the plan's offsets.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The whole pool, for a tool that replaces its contents.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

fn bounds(region: Region) -> Option<(usize, usize)> {
    let start = usize::try_from(region.offset).ok()?;
    Some((start, start.checked_add(usize::try_from(region.bytes).ok()?)?))
}
