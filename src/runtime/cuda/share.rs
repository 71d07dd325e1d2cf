//! Weights that a rank copies from another's pool, over the link between their GPUs.

use anyhow::{Context, Result, ensure};

use super::CudaExecutor;
use super::peers::{NAME_BYTES, name_of};
use crate::cuda::{MappedMemory, MemoryHandle};
use crate::runtime::group::Group;
use crate::runtime::weights::share::{self, Loaded, Offer, Region, Sharing};

impl CudaExecutor {
    /// Fills the weights region, packed forms included: by `read`, which reads them from where they come from, or with what another rank of the host has
    /// read for the same program. `rank` is this one's number among all. All ranks of the host call it at the same time; how each of them got its
    /// weights.
    ///
    /// # Errors
    /// Those of `read`, weights that were to be shared and cannot be, or a rank that is no more.
    pub fn load_with(
        &mut self,
        host: &mut dyn Group,
        rank: usize,
        sharing: Sharing,
        read: &dyn Fn(&mut CudaExecutor) -> Result<()>,
    ) -> Result<Vec<Loaded>> {
        let program = self.rank;
        share::load(host, (rank, program), sharing, &mut Weights { executor: self, read })
    }
}

/// The weights region of a pool.
struct Weights<'a> {
    executor: &'a mut CudaExecutor,
    read: &'a dyn Fn(&mut CudaExecutor) -> Result<()>,
}

impl Weights<'_> {
    /// Bytes of the pool, where in it the region begins, and how many bytes that has.
    fn sizes(&self) -> [u64; 3] {
        let pool = &self.executor.program().pool;
        [pool.bytes(), pool.weights.offset, pool.weights.bytes]
    }
}

impl Region for Weights<'_> {
    type Mapped = MappedMemory;

    fn offer(&mut self) -> Result<Offer> {
        let sizes @ [_, start, bytes] = self.sizes();
        ensure!(bytes >= NAME_BYTES as u64, "weights: expected at least {NAME_BYTES} bytes to share, found {bytes}");
        let pool = self.executor.pool();
        let name = name_of(pool)?;
        // Weights come over it.
        pool.write(usize::try_from(start)?, &name, self.executor.stream())?;
        Ok(Offer { name, handle: MemoryHandle::of(pool)?.to_bytes().to_vec(), sizes })
    }

    fn map(&mut self, offer: &Offer) -> Result<MappedMemory> {
        let sizes @ [pool_bytes, start, _] = self.sizes();
        ensure!(
            offer.sizes == sizes,
            "pool: expected the same sizes of it and of its weights, {sizes:?}, found {:?}",
            offer.sizes
        );
        let handle = offer.handle.as_slice().try_into().ok().map(MemoryHandle::from_bytes);
        let handle = handle.context("a handle of another length")?;
        let mapped = MappedMemory::open(self.executor.gpu(), handle, usize::try_from(pool_bytes)?)?;
        let mut found = [0; NAME_BYTES];
        mapped.read(usize::try_from(start)?, &mut found, self.executor.stream())?;
        ensure!(found[..] == offer.name[..], "expected the name of its pool in what was mapped, found other bytes");
        Ok(mapped)
    }

    fn read(&mut self) -> Result<()> {
        (self.read)(self.executor)
    }

    fn copy(&mut self, from: MappedMemory) -> Result<()> {
        let [_, start, bytes] = self.sizes();
        let range = usize::try_from(start)?..usize::try_from(start + bytes)?;
        Ok(from.copy_to(self.executor.pool(), range, self.executor.stream())?)
    }
}
