//! A group of neighbouring ranks over MPI. Its calls wait for the others within MPI; that one of them is no more is for the watch to find,
//! which ends the process whatever it waits for.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mpi::ffi;

use super::mpi::check;
use crate::runtime::group::Group;

/// How soon the watch has found that a rank has ended, many times over.
const FOUND: Duration = Duration::from_secs(1);

/// What one rank sends to another comes in its order, so there is nothing to tell messages apart by.
const TAG: c_int = 0;

/// Ranks with a communicator of their own, which lives until the process ends.
pub(super) struct MpiGroup {
    communicator: ffi::MPI_Comm,
    rank: usize,
    size: usize,
}

impl MpiGroup {
    /// This rank's group, where a world, or a group, is cut into groups of so many ranks; all ranks of that call it.
    pub(super) fn new(world: ffi::MPI_Comm, size: usize) -> Result<MpiGroup> {
        let (mut all, mut number) = (0, 0);
        // SAFETY: MPI has started, the handle is its own, and it writes one number to each place.
        unsafe {
            check("MPI_Comm_size", ffi::MPI_Comm_size(world, &raw mut all))?;
            check("MPI_Comm_rank", ffi::MPI_Comm_rank(world, &raw mut number))?;
        }
        let (all, number) = (usize::try_from(all)?, usize::try_from(number)?);
        ensure!(size > 0 && all.is_multiple_of(size), "ranks: expected a multiple of {size}, found {all}");
        let mut communicator = world;
        // SAFETY: as above; MPI replaces the handle.
        unsafe {
            let color = c_int::try_from(number / size)?;
            check("MPI_Comm_split", ffi::MPI_Comm_split(world, color, number as c_int, &raw mut communicator))?;
            let code = ffi::MPI_Comm_set_errhandler(communicator, ffi::RSMPI_ERRORS_RETURN);
            check("MPI_Comm_set_errhandler", code)?;
        }
        Ok(MpiGroup { communicator, rank: number % size, size })
    }
}

impl Group for MpiGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        let (expected, found) = (self.size * sent.len(), received.len());
        ensure!(found == expected, "expected room for {expected} bytes, found {found}");
        let count = count(sent.len())?;
        // SAFETY: MPI reads `count` bytes, and writes as many of each rank, before it returns; both places have them.
        let code = unsafe {
            ffi::MPI_Allgather(
                sent.as_ptr().cast(),
                count,
                ffi::RSMPI_UINT8_T,
                received.as_mut_ptr().cast(),
                count,
                ffi::RSMPI_UINT8_T,
                self.communicator,
            )
        };
        exchanged("MPI_Allgather", code)
    }

    fn all_to_all(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        let (expected, found) = (sent.len(), received.len());
        ensure!(found == expected, "expected room for {expected} bytes, found {found}");
        ensure!(
            sent.len().is_multiple_of(self.size),
            "expected {} equal blocks, found {} bytes",
            self.size,
            sent.len()
        );
        let count = count(sent.len() / self.size)?;
        // SAFETY: MPI reads and writes `count` bytes for each rank before it returns; both places have them.
        let code = unsafe {
            ffi::MPI_Alltoall(
                sent.as_ptr().cast(),
                count,
                ffi::RSMPI_UINT8_T,
                received.as_mut_ptr().cast(),
                count,
                ffi::RSMPI_UINT8_T,
                self.communicator,
            )
        };
        exchanged("MPI_Alltoall", code)
    }

    fn send(&mut self, to: usize, sent: &[u8]) -> Result<()> {
        let (to, count) = (self.peer(to)?, count(sent.len())?);
        // SAFETY: MPI reads `count` bytes before it returns; the place has them.
        let code =
            unsafe { ffi::MPI_Send(sent.as_ptr().cast(), count, ffi::RSMPI_UINT8_T, to, TAG, self.communicator) };
        exchanged("MPI_Send", code)
    }

    fn receive(&mut self, from: usize, received: &mut [u8]) -> Result<()> {
        let (from, room) = (self.peer(from)?, count(received.len())?);
        // SAFETY: plain numbers, of which zeros are some; MPI writes it.
        let mut status: ffi::MPI_Status = unsafe { std::mem::zeroed() };
        // SAFETY: MPI writes at most `room` bytes, and the status, before it returns; the places have them.
        let code = unsafe {
            let place = received.as_mut_ptr().cast();
            ffi::MPI_Recv(place, room, ffi::RSMPI_UINT8_T, from, TAG, self.communicator, &raw mut status)
        };
        exchanged("MPI_Recv", code)?;
        let mut found = 0;
        // SAFETY: the status is that of a message that was received; MPI writes one number.
        check("MPI_Get_count", unsafe { ffi::MPI_Get_count(&raw const status, ffi::RSMPI_UINT8_T, &raw mut found) })?;
        ensure!(found == room, "rank {from}: expected {room} bytes, found {found}");
        Ok(())
    }

    fn split(&mut self, size: usize) -> Result<Box<dyn Group>> {
        Ok(Box::new(MpiGroup::new(self.communicator, size)?))
    }
}

impl MpiGroup {
    /// A rank's number, as MPI counts them.
    fn peer(&self, rank: usize) -> Result<c_int> {
        ensure!(rank < self.size, "expected one of {} ranks, found {rank}", self.size);
        Ok(c_int::try_from(rank)?)
    }
}

/// What MPI answered to a collective. Where it failed because a rank is no more, the watch knows which, and ends this process first.
fn exchanged(call: &'static str, code: c_int) -> Result<()> {
    if code != 0 {
        sleep(FOUND);
    }
    Ok(check(call, code)?)
}

/// Bytes for each rank, as MPI counts them.
fn count(bytes: usize) -> Result<c_int> {
    c_int::try_from(bytes).ok().with_context(|| {
        format!("an exchange: expected at most {} bytes for a rank, found {bytes}; use smaller buckets", c_int::MAX)
    })
}
