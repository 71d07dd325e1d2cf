//! NCCL, the library by which GPUs exchange what is in their memory: one communicator for the GPUs that run steps together, each in a
//! process of its own. What it queues on a stream can be captured, in the same order by all.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::CUstream;
use libloading::Library;
use thiserror::Error;

use super::driver::{Device, DeviceError, Stream};
use super::library;
use super::memory::DeviceMemory;

/// The library's file, by its interface's version.
const FILE: &str = "libnccl.so.2";
/// The oldest version that says in words what went wrong.
const LEAST: u32 = 21300;

/// What went wrong between GPUs.
#[derive(Clone, Debug, Error)]
pub enum NcclError {
    /// The library is not there.
    #[error(
        "collectives between GPUs: expected NCCL's {FILE} in the loader's path, in $CUDA_PATH/lib64, in /usr/local/cuda/lib64 or in the \
         Python package nvidia-nccl-cu13, found none; install NCCL 2 for CUDA 13, or `pip install nvidia-nccl-cu13` and put its \
         nvidia/nccl/lib into LD_LIBRARY_PATH"
    )]
    Missing,
    /// The library is there but is not one that can be used.
    #[error("collectives between GPUs: expected NCCL 2.13 or later, found {found}; install another")]
    Unusable {
        /// Its version, or what it lacks.
        found: String,
    },
    /// A call failed.
    #[error("{what}: NCCL reports {error}; NCCL_DEBUG=INFO makes it tell more")]
    Call {
        /// What was being done.
        what: String,
        /// The library's words.
        error: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What all ranks of a communicator know it by, and nobody else.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; UniqueId::BYTES]);

impl UniqueId {
    /// Its size.
    pub const BYTES: usize = 128;

    /// A new one. The process that makes it has to be one of the ranks.
    ///
    /// # Errors
    /// No library, or it has no way to be reached by the others.
    pub fn new() -> Result<UniqueId, NcclError> {
        let nccl = Nccl::load()?;
        let mut id = UniqueId([0; UniqueId::BYTES]);
        // SAFETY: the library writes as many bytes.
        nccl.check("making an id", std::ptr::null_mut(), unsafe { (nccl.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    /// As it is sent to the other ranks.
    pub fn to_bytes(self) -> [u8; UniqueId::BYTES] {
        self.0
    }

    /// As it was sent.
    pub fn from_bytes(bytes: [u8; UniqueId::BYTES]) -> UniqueId {
        UniqueId(bytes)
    }
}

type Handle = *mut c_void;
type Status = c_int;
const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;
/// The library's number for bytes: what is moved is not computed with.
const BYTE: c_int = 1;

/// The library's functions. The types are those of `nccl.h`, which keeps them for all versions of the interface.
#[derive(Clone, Copy)]
struct Nccl {
    get_version: unsafe extern "C" fn(*mut c_int) -> Status,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> Status,
    abort: unsafe extern "C" fn(Handle) -> Status,
    async_error: unsafe extern "C" fn(Handle, *mut Status) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, CUstream) -> Status,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, CUstream) -> Status,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, CUstream) -> Status,
}

impl Nccl {
    /// Loads the library, once for the process.
    fn load() -> Result<&'static Nccl, NcclError> {
        static LOADED: OnceLock<Result<Nccl, NcclError>> = OnceLock::new();
        LOADED.get_or_init(Nccl::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Nccl, NcclError> {
        let places = library::places(FILE, "nccl");
        let paths = std::iter::once(FILE.into()).chain(places.into_iter().filter(|path| path.is_file()));
        // SAFETY: opening the vendor's library runs its initialisers, as the loader would.
        let library =
            paths.into_iter().find_map(|path| unsafe { Library::new(path) }.ok()).ok_or(NcclError::Missing)?;
        // SAFETY: names and types are those of `nccl.h`; the library is never closed.
        let nccl = unsafe {
            Nccl {
                get_version: symbol(&library, "ncclGetVersion")?,
                get_unique_id: symbol(&library, "ncclGetUniqueId")?,
                init_rank: symbol(&library, "ncclCommInitRank")?,
                abort: symbol(&library, "ncclCommAbort")?,
                async_error: symbol(&library, "ncclCommGetAsyncError")?,
                error_string: symbol(&library, "ncclGetErrorString")?,
                last_error: symbol(&library, "ncclGetLastError")?,
                group_start: symbol(&library, "ncclGroupStart")?,
                group_end: symbol(&library, "ncclGroupEnd")?,
                all_gather: symbol(&library, "ncclAllGather")?,
                send: symbol(&library, "ncclSend")?,
                receive: symbol(&library, "ncclRecv")?,
            }
        };
        std::mem::forget(library);
        match nccl.version()? {
            version if version >= LEAST => Ok(nccl),
            version => Err(NcclError::Unusable { found: version_text(version) }),
        }
    }

    /// 22803 for 2.28.3.
    fn version(&self) -> Result<u32, NcclError> {
        let mut version = 0;
        // SAFETY: the library writes one number.
        self.check("asking for the version", std::ptr::null_mut(), unsafe { (self.get_version)(&raw mut version) })?;
        Ok(version.unsigned_abs())
    }

    /// What a call has answered; `communicator` may be null.
    fn check(&self, what: &str, communicator: Handle, status: Status) -> Result<(), NcclError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: both take any number or a communicator that is alive or null, and give texts with terminators, or null, that last
        // until the next error.
        let texts = unsafe { [(self.error_string)(status), (self.last_error)(communicator)] };
        let texts = texts.into_iter().filter(|text| !text.is_null()).map(|text| {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
        });
        let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
        Err(NcclError::Call { what: what.to_owned(), error: texts.join(": ") })
    }
}

/// A function of the library.
///
/// # Safety
/// `T` is the type of the function of that name.
unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, NcclError> {
    // SAFETY: the caller's word.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|_| NcclError::Unusable { found: format!("one without {name}") })
}

/// `2.28.3` for 22803.
fn version_text(version: u32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// Who sends what to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exchange {
    /// Each rank sends the same to all; what is written is what each sent, in the order of the ranks.
    AllGather,
    /// Each rank sends block i of what it reads to rank i; what is written is what each sent, in the order of the ranks.
    AllToAll,
    /// This rank sends to the one of that number, which receives meanwhile; nothing is written.
    Send(usize),
    /// This rank receives of the one of that number, which sends meanwhile; nothing is read.
    Receive(usize),
}

impl Exchange {
    /// Blocks that are read of each part, and blocks that are written, of a group of so many ranks.
    fn blocks(self, ranks: usize) -> (usize, usize) {
        match self {
            Exchange::AllGather => (1, ranks),
            Exchange::AllToAll => (ranks, ranks),
            Exchange::Send(_) => (1, 0),
            Exchange::Receive(_) => (0, 1),
        }
    }
}

/// Bytes of a block of memory that ranks exchange.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Offset of what this rank sends.
    pub from: usize,
    /// Offset of what it receives, outside of what it sends.
    pub to: usize,
    /// Bytes that it sends to each rank, itself included, or to the one that it sends to.
    pub bytes: usize,
}

/// This process' GPU among those that exchange data.
pub struct Communicator {
    handle: Handle,
    nccl: &'static Nccl,
    rank: usize,
    size: usize,
    device: Arc<Device>,
}

impl Communicator {
    /// Joins the ranks that have the same id, each with another GPU; waits for all of them. The device's context is current.
    ///
    /// # Errors
    /// No library, or the GPUs cannot reach each other.
    pub fn new(device: &Arc<Device>, id: UniqueId, rank: usize, size: usize) -> Result<Communicator, NcclError> {
        let nccl = Nccl::load()?;
        device.bind()?;
        let what = format!("joining GPU {} as rank {rank} of {size}", device.ordinal);
        let numbers = c_int::try_from(size).ok().zip(c_int::try_from(rank).ok());
        let (count, number) =
            numbers.ok_or_else(|| NcclError::Call { what: what.clone(), error: "too many".into() })?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: the library writes the handle, which is ended once, when it is dropped.
        let status = unsafe { (nccl.init_rank)(&raw mut handle, count, id, number) };
        nccl.check(&what, std::ptr::null_mut(), status)?;
        Ok(Communicator { handle, nccl, rank, size, device: Arc::clone(device) })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The library's version: `2.28.3`.
    ///
    /// # Errors
    /// The library failed.
    pub fn version(&self) -> Result<String, NcclError> {
        self.nccl.version().map(version_text)
    }

    /// Queues an exchange of all parts at once, or has it captured. All ranks queue the same ones in the same order, and of those between two
    /// ranks each the ends that it has: in an order of all exchanges that is the same for all ranks.
    ///
    /// # Errors
    /// A part that leaves the memory, another rank that there is not, or the library failed.
    pub fn exchange(
        &self,
        kind: Exchange,
        parts: &[Part],
        memory: &DeviceMemory,
        stream: &Stream,
    ) -> Result<(), NcclError> {
        let (read, written) = kind.blocks(self.size);
        let (what, peer) = match kind {
            Exchange::AllGather => ("an all-gather", self.rank),
            Exchange::AllToAll => ("an all-to-all", self.rank),
            Exchange::Send(to) => ("sending", to),
            Exchange::Receive(from) => ("receiving", from),
        };
        if peer >= self.size {
            let error = format!("expected one of {} ranks, found {peer}", self.size);
            return Err(NcclError::Call { what: what.to_owned(), error });
        }
        let fits = |offset: usize, count: usize, bytes: usize| {
            let end = count.checked_mul(bytes).and_then(|bytes| offset.checked_add(bytes));
            end.is_some_and(|end| end <= memory.bytes())
        };
        if let Some(part) =
            parts.iter().find(|part| !fits(part.from, read, part.bytes) || !fits(part.to, written, part.bytes))
        {
            let error = format!("{part:?} leaves a block of {} bytes", memory.bytes());
            return Err(NcclError::Call { what: what.to_owned(), error });
        }
        let check = |status| self.nccl.check(what, self.handle, status);
        // SAFETY: no arguments; each start has its end, also after a failure.
        check(unsafe { (self.nccl.group_start)() })?;
        let queued = parts.iter().try_for_each(|part| self.queue(kind, part, memory, stream, &check));
        // SAFETY: as above.
        let ended = check(unsafe { (self.nccl.group_end)() });
        queued.and(ended)
    }

    /// Queues what one part needs, within a group of calls.
    fn queue(
        &self,
        kind: Exchange,
        part: &Part,
        memory: &DeviceMemory,
        stream: &Stream,
        check: &dyn Fn(Status) -> Result<(), NcclError>,
    ) -> Result<(), NcclError> {
        let at = |offset: usize| (memory.address() + offset as u64) as *mut c_void;
        let (handle, bytes) = (self.handle, part.bytes);
        match kind {
            // SAFETY: `exchange` has checked that all of it is in the memory, which is freed only when work that uses it is done; the
            // communicator and the stream are alive.
            Exchange::AllGather => {
                check(unsafe { (self.nccl.all_gather)(at(part.from), at(part.to), bytes, BYTE, handle, stream.handle) })
            }
            Exchange::AllToAll => (0..self.size).try_for_each(|peer| {
                let (from, to, number) = (at(part.from + peer * bytes), at(part.to + peer * bytes), peer as c_int);
                // SAFETY: as above.
                check(unsafe { (self.nccl.send)(from, bytes, BYTE, number, handle, stream.handle) })?;
                // SAFETY: as above.
                check(unsafe { (self.nccl.receive)(to, bytes, BYTE, number, handle, stream.handle) })
            }),
            // SAFETY: as above.
            Exchange::Send(peer) => {
                check(unsafe { (self.nccl.send)(at(part.from), bytes, BYTE, peer as c_int, handle, stream.handle) })
            }
            // SAFETY: as above.
            Exchange::Receive(peer) => {
                check(unsafe { (self.nccl.receive)(at(part.to), bytes, BYTE, peer as c_int, handle, stream.handle) })
            }
        }
    }

    /// What has gone wrong since, behind the calls.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<(), NcclError> {
        let mut found = SUCCESS;
        // SAFETY: the communicator is alive; the library writes one number.
        let asked = unsafe { (self.nccl.async_error)(self.handle, &raw mut found) };
        self.nccl.check("asking for errors", self.handle, asked)?;
        match found {
            IN_PROGRESS => Ok(()),
            found => self.nccl.check(&format!("exchanging as rank {} of {}", self.rank, self.size), self.handle, found),
        }
    }
}

impl Communicator {
    /// Ends it, and whatever of it is still on the device, while `work` lets go of the graphs that it was captured in: the library waits
    /// for these, and where another rank is no more, these wait for that end.
    pub fn end(self, work: impl FnOnce()) {
        std::thread::scope(|scope| {
            scope.spawn(|| drop(self));
            work();
        });
    }
}

// SAFETY: the library's calls may come from any thread, one at a time.
unsafe impl Send for Communicator {}

impl Drop for Communicator {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: ended once. Unlike `ncclCommDestroy` it waits for no other rank, which may be no more.
        let _ = unsafe { (self.nccl.abort)(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_the_library_names_them() {
        assert_eq!(version_text(22803), "2.28.3");
        assert_eq!(version_text(21304), "2.13.4");
    }

    #[test]
    fn what_is_missing_is_told_with_a_way_out() {
        let text = NcclError::Missing.to_string();
        assert!(text.contains("libnccl.so.2") && text.contains("nvidia-nccl-cu13"), "{text}");
        // Where the library is, it says which it is; a machine without a GPU has none, as a rule.
        match Nccl::load() {
            Ok(nccl) => assert!(nccl.version().expect("it knows") >= LEAST),
            Err(error) => assert!(error.to_string().starts_with("collectives between GPUs"), "{error}"),
        }
    }
}
