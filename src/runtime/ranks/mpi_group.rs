//! A group of neighbouring ranks over MPI. Its calls wait for the others within MPI; that one of them is no more is for the watch to find,
//! which ends the process whatever it waits for.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mpi::ffi;

use super::NAP;
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
    /// Whether waiting for what all do is no work: for ranks that may come at very different times.
    naps: bool,
}

impl MpiGroup {
    /// This rank's group, where a world, or a group, is cut into groups of so many ranks; all ranks of that call it.
    pub(super) fn new(world: ffi::MPI_Comm, size: usize) -> Result<MpiGroup> {
        let (number, all) = number_and_size(world)?;
        ensure!(size > 0 && all.is_multiple_of(size), "ranks: expected a multiple of {size}, found {all}");
        let mut communicator = world;
        // SAFETY: as above; MPI replaces the handle.
        unsafe {
            let color = c_int::try_from(number / size)?;
            check("MPI_Comm_split", ffi::MPI_Comm_split(world, color, number as c_int, &raw mut communicator))?;
            let code = ffi::MPI_Comm_set_errhandler(communicator, ffi::RSMPI_ERRORS_RETURN);
            check("MPI_Comm_set_errhandler", code)?;
        }
        Ok(MpiGroup { communicator, rank: number % size, size, naps: false })
    }

    /// This rank among those of its host, by their numbers in a world, all ranks of which call it: those that can share memory, which they are for
    /// every launcher.
    pub(super) fn of_host(world: ffi::MPI_Comm) -> Result<MpiGroup> {
        let (number, _) = number_and_size(world)?;
        let mut communicator = world;
        // SAFETY: MPI has started, and the handles are its own, of which it replaces the last.
        unsafe {
            let (kind, info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            let code = ffi::MPI_Comm_split_type(world, kind, number as c_int, info, &raw mut communicator);
            check("MPI_Comm_split_type", code)?;
            let code = ffi::MPI_Comm_set_errhandler(communicator, ffi::RSMPI_ERRORS_RETURN);
            check("MPI_Comm_set_errhandler", code)?;
        }
        let (rank, size) = number_and_size(communicator)?;
        Ok(MpiGroup { communicator, rank, size, naps: true })
    }

    /// As [`Group::all_gather`] of so many bytes a rank, asleep until all are there.
    fn gather_asleep(&self, sent: &[u8], received: &mut [u8], count: c_int) -> Result<()> {
        // MPI may go on with these after an error, so they are its own then.
        let (sent, mut all) = (sent.to_vec(), vec![0; received.len()]);
        // SAFETY: a null request is a value that MPI replaces. MPI reads `count` bytes, and writes as many of each rank, until the request is
        // complete; both places have them, and are freed only when it is.
        let code = unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let (from, to) = (sent.as_ptr().cast(), all.as_mut_ptr().cast());
            let byte = ffi::RSMPI_UINT8_T;
            let mut code = ffi::MPI_Iallgather(from, count, byte, to, count, byte, self.communicator, &raw mut request);
            let mut done = 0;
            while code == 0 {
                code = ffi::MPI_Test(&raw mut request, &raw mut done, ffi::RSMPI_STATUS_IGNORE);
                if done != 0 {
                    break;
                }
                sleep(NAP);
            }
            code
        };
        match exchanged("MPI_Iallgather", code) {
            Ok(()) => received.copy_from_slice(&all),
            Err(error) => {
                std::mem::forget((sent, all));
                return Err(error);
            }
        }
        Ok(())
    }
}

/// This rank's number in a communicator, and how many there are.
fn number_and_size(communicator: ffi::MPI_Comm) -> Result<(usize, usize)> {
    let (mut number, mut size) = (0, 0);
    // SAFETY: MPI has started, the handle is its own, and it writes one number to each place.
    unsafe {
        check("MPI_Comm_size", ffi::MPI_Comm_size(communicator, &raw mut size))?;
        check("MPI_Comm_rank", ffi::MPI_Comm_rank(communicator, &raw mut number))?;
    }
    Ok((usize::try_from(number)?, usize::try_from(size)?))
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
        if self.naps {
            return self.gather_asleep(sent, received, count);
        }
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
