//! MPI as a [`Transport`], in one thread that never waits for another rank between the start and the end.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::net::IpAddr;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{sleep, spawn};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::traits::{AsRaw, Communicator};

use super::launcher::Launched;
use super::mpi_group::MpiGroup;
use super::watch::{GiveUp, Watch};
use super::{Groups, HostRanks, NAP, Ranks, Transport, TransportError, connect};

/// How long MPI itself may take to start: it waits for all ranks, and hosts are not equally quick.
const START: Duration = Duration::from_secs(30);
/// How long a process goes on that a launcher has told to end, which may be because a rank is no more, and that the watch has to find
/// and tell. Open MPI ends it for good after a second.
const TERMINATION: Duration = Duration::from_millis(700);
/// Bytes of one part of a message, since MPI counts in i32.
const PART: usize = 64 << 20;
/// Bytes before the first part of a message, which say how long it is.
const HEAD: usize = size_of::<u64>();
const TAG: c_int = 0;

/// Joins the ranks, or ends the process.
pub fn join(launched: &Launched, tell: Arc<dyn Fn(&str) + Send + Sync>) -> Ranks {
    let give_up = GiveUp { tell, exit: Arc::new(end_now), ending: Arc::new(is_terminated) };
    without_multicast();
    end_later_on_termination();
    let alarm = alarm(launched.rank, give_up.clone());
    let joined = Mpi::start(launched).and_then(|mut transport| {
        drop(alarm);
        let host = mpi::environment::processor_name().unwrap_or_else(|_| "unknown".into());
        let (links, peers) = connect::connect(&mut transport, &host, own_addresses())?;
        Ok((transport, links, peers))
    });
    match joined {
        Ok((transport, links, peers)) => {
            let watch = Watch::begin(peers[transport.rank].clone(), links, give_up);
            let world = transport.world;
            let host = transport.host.clone();
            let groups: Groups = Rc::new(move |size| Ok(Box::new(MpiGroup::new(world, size)?)));
            Ranks { transport: Box::new(transport), watch: Some(watch), peers, groups: Some(groups), host: Some(host) }
        }
        Err(error) => {
            if !error.to_string().is_empty() {
                (give_up.tell)(&format!("{error:#}"));
            }
            end_now(1);
            unreachable!("the process has ended")
        }
    }
}

/// What says to NCCL whether it may use multicast over NVLink.
const MULTICAST: &str = "NCCL_NVLS_ENABLE";

/// Keeps NCCL from multicast over NVLink, unless the user has said something of it: where a process ends in the middle of it, the GPUs of
/// the host may stay unusable for all.
fn without_multicast() {
    if std::env::var_os(MULTICAST).is_none() {
        // SAFETY: a process joins the ranks before it starts any thread, and nobody else reads the environment now.
        unsafe { std::env::set_var(MULTICAST, "0") };
    }
}

/// Whether the process was told to end.
static TERMINATED: AtomicBool = AtomicBool::new(false);

fn is_terminated() -> bool {
    TERMINATED.load(Ordering::Relaxed)
}

extern "C" fn on_termination(_: c_int) {
    TERMINATED.store(true, Ordering::Relaxed);
}

/// Makes SIGTERM end the process a little later.
fn end_later_on_termination() {
    let handler: extern "C" fn(c_int) = on_termination;
    // SAFETY: the handler does nothing but to store to an atomic, which may be done at any time.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
    spawn(|| {
        while !is_terminated() {
            sleep(TERMINATION / 20);
        }
        sleep(TERMINATION);
        end_now(128 + libc::SIGTERM as u8)
    });
}

/// Ends the process with a message unless what is returned is dropped in time.
fn alarm(rank: usize, give_up: GiveUp) -> Sender<()> {
    let (armed, received) = channel::<()>();
    spawn(move || {
        if received.recv_timeout(START) == Err(RecvTimeoutError::Timeout) {
            let seconds = START.as_secs();
            (give_up.tell)(&format!(
                "rank {rank}: MPI has not started within {seconds} s; another rank was stopped, or could not be started"
            ));
            (give_up.exit)(1);
        }
    });
    armed
}

/// Ends the process without what usually runs at its end: MPI's part of that would wait for ranks that are no more.
fn end_now(code: u8) {
    // SAFETY: it takes any number and does not return; what was written to files and pipes is not in buffers of this process.
    unsafe { libc::_exit(i32::from(code)) }
}

/// IPv4 addresses of this host's interfaces, but that of the loopback.
fn own_addresses() -> Vec<IpAddr> {
    let mut found = vec![];
    let mut list = ptr::null_mut();
    // SAFETY: the call makes a list, whose entries are valid until it is freed; an address of family AF_INET is a `sockaddr_in`.
    unsafe {
        if libc::getifaddrs(&raw mut list) != 0 {
            return found;
        }
        let mut entry = list;
        while let Some(interface) = entry.as_ref() {
            entry = interface.ifa_next;
            let Some(address) = interface.ifa_addr.as_ref() else { continue };
            if c_int::from(address.sa_family) == libc::AF_INET {
                let bytes = interface.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned().sin_addr.s_addr;
                found.push(IpAddr::from(bytes.to_ne_bytes()));
            }
        }
        libc::freeifaddrs(list);
    }
    found.retain(|address| !address.is_loopback());
    found
}

/// The world communicator.
struct Mpi {
    /// Ends MPI when it is dropped.
    universe: Option<Universe>,
    world: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    host: HostRanks,
    /// On their way out, in the order in which they were sent.
    sending: VecDeque<Flight>,
    /// By rank: what is on its way in.
    receiving: Vec<Incoming>,
    /// The rank to look at first.
    next: usize,
}

/// A part that MPI reads or writes until its request is complete: the buffer stays where it is and is not touched before.
struct Flight {
    request: ffi::MPI_Request,
    buffer: Vec<u8>,
}

/// A message of which parts may be missing.
#[derive(Default)]
struct Incoming {
    flight: Option<Flight>,
    /// Bytes of the whole message, once the first part is there.
    length: Option<usize>,
    bytes: Vec<u8>,
}

impl Mpi {
    /// Starts MPI, which waits for all ranks.
    fn start(launched: &Launched) -> Result<Mpi> {
        let (universe, threads) = mpi::initialize_with_threading(Threading::Funneled)
            .context("MPI: expected to start it, found it started")?;
        ensure!(
            threads >= Threading::Funneled,
            "MPI: expected a library for programs with threads (MPI_THREAD_FUNNELED), found {threads:?}; use another MPI"
        );
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        ensure!(
            (rank, size) == (launched.rank, launched.size),
            "MPI: expected rank {} of {}, as {} says, found rank {rank} of {size}; build lfm2c with the MPI whose launcher starts it",
            launched.rank,
            launched.size,
            launched.by
        );
        let world = world.as_raw();
        // SAFETY: MPI has started, and the handles are its own.
        check("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(world, ffi::RSMPI_ERRORS_RETURN) })?;
        let host: HostRanks = Rc::new(RefCell::new(MpiGroup::of_host(world)?));
        let receiving = (0..size).map(|_| Incoming::default()).collect();
        Ok(Mpi { universe: Some(universe), world, rank, size, host, sending: VecDeque::new(), receiving, next: 0 })
    }

    /// Lets go of what has been sent.
    fn progress(&mut self) -> Result<()> {
        while let Some(flight) = self.sending.front_mut() {
            if !flight.is_done()? {
                break;
            }
            self.sending.pop_front();
        }
        Ok(())
    }

    fn send_part(&mut self, to: usize, buffer: Vec<u8>) -> Result<()> {
        // SAFETY: a null request is a value that MPI replaces.
        let mut flight = Flight { request: unsafe { ffi::RSMPI_REQUEST_NULL }, buffer };
        let count = c_int::try_from(flight.buffer.len())?;
        // SAFETY: MPI reads `count` bytes of the buffer until the request is complete. The buffer's bytes stay where they are, however
        // the vector itself moves, and the flight is kept until then, or forgotten without being freed.
        let code = unsafe {
            ffi::MPI_Isend(
                flight.buffer.as_ptr().cast(),
                count,
                ffi::RSMPI_UINT8_T,
                to as c_int,
                TAG,
                self.world,
                &raw mut flight.request,
            )
        };
        check("MPI_Isend", code)?;
        self.sending.push_back(flight);
        Ok(())
    }

    /// Begins to receive a part from a rank, if one has come; says so.
    fn begin_part(&mut self, from: usize) -> Result<bool> {
        let mut there = 0;
        let mut count = 0;
        // SAFETY: null handles are values that MPI replaces; the status is written if `there` is true, and only read then.
        let mut flight = unsafe {
            let mut message = ffi::RSMPI_MESSAGE_NULL;
            let mut status = std::mem::MaybeUninit::<ffi::MPI_Status>::uninit();
            let code =
                ffi::MPI_Improbe(from as c_int, TAG, self.world, &raw mut there, &raw mut message, status.as_mut_ptr());
            check("MPI_Improbe", code)?;
            if there == 0 {
                return Ok(false);
            }
            check("MPI_Get_count", ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &raw mut count))?;
            let mut flight = Flight { request: ffi::RSMPI_REQUEST_NULL, buffer: vec![0; usize::try_from(count)?] };
            // MPI writes `count` bytes into the buffer until the request is complete; as for sending, the flight is kept until then.
            let code = ffi::MPI_Imrecv(
                flight.buffer.as_mut_ptr().cast(),
                count,
                ffi::RSMPI_UINT8_T,
                &raw mut message,
                &raw mut flight.request,
            );
            check("MPI_Imrecv", code)?;
            flight
        };
        if flight.is_done()? {
            self.receiving[from].add(&flight.buffer)?;
        } else {
            self.receiving[from].flight = Some(flight);
        }
        Ok(true)
    }

    /// A whole message of a rank, if its last part is there.
    fn receive_from(&mut self, from: usize) -> Result<Option<Vec<u8>>> {
        loop {
            let incoming = &mut self.receiving[from];
            if let Some(flight) = &mut incoming.flight {
                if !flight.is_done()? {
                    return Ok(None);
                }
                let part = std::mem::take(&mut flight.buffer);
                incoming.flight = None;
                incoming.add(&part)?;
            }
            if incoming.length == Some(incoming.bytes.len()) {
                return Ok(Some(std::mem::take(incoming).bytes));
            }
            if !self.begin_part(from)? {
                return Ok(None);
            }
        }
    }
}

impl Flight {
    fn is_done(&mut self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: the request is one that MPI gave, or null once it was complete.
        let code = unsafe { ffi::MPI_Test(&raw mut self.request, &raw mut done, ffi::RSMPI_STATUS_IGNORE) };
        check("MPI_Test", code)?;
        Ok(done != 0)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // MPI may still read or write what is in flight, so it is never freed.
        std::mem::forget(std::mem::take(&mut self.sending));
        self.receiving.drain(..).for_each(std::mem::forget);
        // Without a goodbye there is none of MPI either, which would wait for all ranks.
        std::mem::forget(self.universe.take());
    }
}

impl Incoming {
    /// Takes a part.
    fn add(&mut self, part: &[u8]) -> Result<()> {
        let part = match self.length {
            Some(_) => part,
            None => {
                let (length, part) = part.split_first_chunk::<HEAD>().context("MPI: a message without its length")?;
                self.length = Some(usize::try_from(u64::from_le_bytes(*length))?);
                part
            }
        };
        self.bytes.extend_from_slice(part);
        if self.length.is_some_and(|length| self.bytes.len() > length) {
            bail!("MPI: a message is longer than it says");
        }
        Ok(())
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&mut self, to: usize, message: Vec<u8>) -> Result<()> {
        self.progress()?;
        let (first, rest) = message.split_at(message.len().min(PART));
        let head = (message.len() as u64).to_le_bytes();
        self.send_part(to, [&head, first].concat())?;
        rest.chunks(PART).try_for_each(|part| self.send_part(to, part.to_vec()))
    }

    fn receive(&mut self) -> Result<Option<(usize, Vec<u8>)>> {
        self.progress()?;
        for _ in 0..self.size {
            // In turn, so that none is left waiting.
            let from = self.next;
            self.next = (from + 1) % self.size;
            if let Some(message) = self.receive_from(from)? {
                return Ok(Some((from, message)));
            }
        }
        Ok(None)
    }

    fn close(&mut self) -> Result<()> {
        while !self.sending.is_empty() {
            self.progress()?;
            sleep(NAP);
        }
        drop(self.universe.take());
        Ok(())
    }
}

/// What MPI answered.
pub(super) fn check(call: &'static str, code: c_int) -> Result<(), TransportError> {
    if code == 0 { Ok(()) } else { Err(TransportError { call, code }) }
}
