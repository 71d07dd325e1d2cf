//! Devices, streams, events and launches.
//!
//! What a kernel does with its arguments no wrapper can check: a plan contains machine code and is trusted like a program.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use thiserror::Error;

use super::captures::Captures;
pub use super::module::{Function, Module};
use super::tensor::TensorMap;

/// What the driver refused, and while doing what.
#[derive(Clone, Debug, Error)]
pub enum DeviceError {
    /// No driver.
    #[error(
        "the NVIDIA driver: expected libcuda.so.1 in the loader's path, found none; run on a machine with an NVIDIA GPU and its \
         driver, or, where the command has it, use `--device cpu`"
    )]
    NoDriver,
    /// A driver without a device.
    #[error(
        "a GPU: expected device {ordinal}, found {found} devices; set CUDA_VISIBLE_DEVICES, or, where the command has it, use `--device cpu`"
    )]
    NoDevice {
        /// Number of the device.
        ordinal: usize,
        /// Devices there are.
        found: usize,
    },
    /// A call failed.
    #[error("{what}: the CUDA driver reports {error}")]
    Call {
        /// What was being done.
        what: String,
        /// The driver's words.
        error: String,
    },
}

/// Adds to a driver's error what was being done.
pub(super) fn during<T>(what: &str, result: Result<T, DriverError>) -> Result<T, DeviceError> {
    result.map_err(|error| DeviceError::Call { what: what.to_owned(), error: format!("{error:?}") })
}

/// The devices that were opened. Each keeps its primary context until the process ends: one that a thread let go of while another
/// asked for it would be destroyed and made anew for nothing.
static OPEN: Mutex<BTreeMap<usize, Arc<Device>>> = Mutex::new(BTreeMap::new());

/// A GPU with its primary context.
#[derive(Debug)]
pub struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    /// Number by which it was opened.
    pub ordinal: usize,
    /// Its name: `NVIDIA H200`.
    pub name: String,
    /// Compute capability: (9, 0).
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// The newest CUDA version that its driver supports.
    pub driver: (u32, u32),
    /// Captures, and waits for the whole device.
    pub(super) captures: Captures,
}

// SAFETY: the driver's handles may be used by any thread, which makes the context current first.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

impl Device {
    /// How many devices there are; 0 without a driver.
    pub fn count() -> usize {
        // SAFETY: opens a library.
        if !unsafe { sys::is_culib_present() } || result::init().is_err() {
            return 0;
        }
        result::device::get_count().map_or(0, |count| count.max(0) as usize)
    }

    /// A name for each device that no other on any host has, as whoever sees it knows it, by number; none without a driver.
    ///
    /// # Errors
    /// The driver failed.
    pub fn names() -> Result<Vec<String>, DeviceError> {
        let uuid = |ordinal: usize| result::device::get(ordinal as i32).and_then(result::device::get_uuid);
        let text = |uuid: sys::CUuuid| uuid.bytes.map(|byte| format!("{byte:02x}")).concat();
        (0..Device::count()).map(|at| Ok(text(during("reading a device's UUID", uuid(at))?))).collect()
    }

    /// Opens a device, once for the process, and makes its context current in this thread.
    ///
    /// # Errors
    /// No driver, no such device, or the driver failed.
    pub fn open(ordinal: usize) -> Result<Arc<Device>, DeviceError> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&ordinal) {
            device.bind()?;
            return Ok(Arc::clone(device));
        }
        let device = Arc::new(Self::first(ordinal)?);
        device.bind()?;
        open.insert(ordinal, Arc::clone(&device));
        Ok(device)
    }

    /// A device that nobody has opened yet.
    fn first(ordinal: usize) -> Result<Device, DeviceError> {
        // SAFETY: opens a library.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        if let Err(error) = result::init() {
            return match error.0 {
                sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(DeviceError::NoDevice { ordinal, found: 0 }),
                _ => during("initialising", Err(error)),
            };
        }
        let found = during("counting devices", result::device::get_count())?.max(0) as usize;
        if ordinal >= found {
            return Err(DeviceError::NoDevice { ordinal, found });
        }
        let handle = during("opening the device", result::device::get(ordinal as i32))?;
        let name = during("reading the device's name", result::device::get_name(handle))?;
        use sys::CUdevice_attribute as A;
        // SAFETY: the handle is a device's; the context is never released.
        unsafe {
            let attribute = |which: A| {
                during("reading the device's attributes", result::device::get_attribute(handle, which))
                    .map(|value| value as u32)
            };
            let capability = (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            );
            let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let mut version = 0;
            during("reading the driver's version", sys::cuDriverGetVersion(&mut version).result())?;
            let driver = ((version / 1000) as u32, (version % 1000 / 10) as u32);
            let context = during("making a context", result::primary_ctx::retain(handle))?;
            Ok(Device {
                handle,
                context,
                ordinal,
                name,
                capability,
                multiprocessors,
                driver,
                captures: Captures::default(),
            })
        }
    }

    /// Makes the context current in this thread: needed in every thread that uses the device.
    ///
    /// # Errors
    /// The driver failed.
    pub fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as the device.
        during("making the context current", unsafe { result::ctx::set_current(self.context) })
    }

    /// Free and total memory, in bytes.
    ///
    /// # Errors
    /// The driver failed.
    pub fn memory(&self) -> Result<(u64, u64), DeviceError> {
        let (free, total) = during("asking for free memory", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    /// The highest clocks of the multiprocessors and of the memory, in kHz; 0 where the driver does not say.
    pub fn clocks(&self) -> (u32, u32) {
        use sys::CUdevice_attribute as A;
        // SAFETY: the handle is a device's.
        let clock = |which| unsafe { result::device::get_attribute(self.handle, which) }.map_or(0, |khz| khz as u32);
        (clock(A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE), clock(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE))
    }

    /// Waits until everything is done, captures by other threads included. Not to be called within one.
    ///
    /// # Errors
    /// Something that ran has failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        let _nobody_captures = self.captures.exclude();
        during("waiting for the device", result::ctx::synchronize())
    }
}

/// A queue of work.
#[derive(Debug)]
pub struct Stream {
    pub(super) handle: sys::CUstream,
    pub(super) device: Arc<Device>,
}

// SAFETY: as of the device.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream that no other waits for.
    ///
    /// # Errors
    /// The driver failed.
    pub fn new(device: &Arc<Device>) -> Result<Stream, DeviceError> {
        let handle = during("making a stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        Ok(Stream { handle, device: Arc::clone(device) })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Waits until all its work is done.
    ///
    /// # Errors
    /// Something that ran has failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream is alive.
        during("waiting for a stream", unsafe { result::stream::synchronize(self.handle) })
    }

    /// Whether all its work is done.
    ///
    /// # Errors
    /// Something that ran has failed.
    pub fn is_done(&self) -> Result<bool, DeviceError> {
        // SAFETY: the stream is alive.
        match unsafe { sys::cuStreamQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => during("asking a stream", other.result()).map(|()| true),
        }
    }

    /// Lets later work of this stream wait for the event.
    ///
    /// # Errors
    /// The driver failed.
    pub fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive; the driver keeps what it needs of the event.
        during("waiting for an event", unsafe { result::stream::wait_event(self.handle, event.handle, flags) })
    }

    /// Launches a kernel.
    ///
    /// # Errors
    /// The driver refused the launch.
    pub fn launch(&self, function: &Function, shape: &LaunchShape, args: &[Argument]) -> Result<(), DeviceError> {
        let mut attributes = [const { std::mem::MaybeUninit::<sys::CUlaunchAttribute>::zeroed() }; 2];
        let mut count = 0;
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGS];
        if args.len() > MAX_ARGS {
            let error = format!("{} arguments, at most {MAX_ARGS} are possible", args.len());
            return Err(DeviceError::Call { what: format!("launching {}", function.name), error });
        }
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = match arg {
                Argument::Bits(bits) => std::ptr::from_ref(bits).cast_mut().cast(),
                Argument::Map(map) => std::ptr::from_ref(&map.0).cast_mut().cast(),
            };
        }
        // SAFETY: zeroed attributes are valid; the pointers are to as many arguments as the module's parameters, which
        // `Module::function` has checked, each of at most 8 bytes or a map; the driver copies all of it before it returns.
        unsafe {
            if shape.cluster > 1 {
                let attribute = attributes[count].assume_init_mut();
                attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
                attribute.value.clusterDim =
                    sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: shape.cluster, y: 1, z: 1 };
                count += 1;
            }
            if shape.dependent {
                let attribute = attributes[count].assume_init_mut();
                attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                attribute.value.programmaticStreamSerializationAllowed = 1;
                count += 1;
            }
            let config = sys::CUlaunchConfig {
                gridDimX: shape.grid[0],
                gridDimY: shape.grid[1],
                gridDimZ: shape.grid[2],
                blockDimX: shape.block,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: shape.shared,
                hStream: self.handle,
                attrs: attributes.as_mut_ptr().cast(),
                numAttrs: count as u32,
            };
            let launched =
                sys::cuLaunchKernelEx(&config, function.handle, pointers.as_mut_ptr(), std::ptr::null_mut()).result();
            launched.map_err(|error| DeviceError::Call {
                what: format!("launching {} with {shape:?}", function.name),
                error: format!("{error:?}"),
            })
        }
    }
}

/// A kernel's argument.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// The bits of an address or number of up to eight bytes.
    Bits(u64),
    /// A tensor map, by value.
    Map(TensorMap),
}

/// Arguments of any kernel.
const MAX_ARGS: usize = 32;

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: destroyed once; work that is queued still runs.
        let _ = unsafe { result::stream::destroy(self.handle) };
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    handle: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: as of the device.
unsafe impl Send for Event {}

impl Event {
    /// An event; `timed` if [`Event::milliseconds_since`] will be asked.
    ///
    /// # Errors
    /// The driver failed.
    pub fn new(device: &Arc<Device>, timed: bool) -> Result<Event, DeviceError> {
        let flags = match timed {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let handle = during("making an event", result::event::create(flags))?;
        Ok(Event { handle, device: Arc::clone(device) })
    }

    /// Moves it to the end of the stream's work.
    ///
    /// # Errors
    /// The driver failed.
    pub fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both are alive.
        during("recording an event", unsafe { result::event::record(self.handle, stream.handle) })
    }

    /// Waits until the stream has reached it.
    ///
    /// # Errors
    /// Something that ran before it has failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: it is alive.
        during("waiting for an event", unsafe { result::event::synchronize(self.handle) })
    }

    /// Time since an earlier event; both have been reached.
    ///
    /// # Errors
    /// One has not been reached, or is not timed.
    pub fn milliseconds_since(&self, earlier: &Event) -> Result<f32, DeviceError> {
        // SAFETY: both are alive.
        during("reading a time", unsafe { result::event::elapsed(earlier.handle, self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: destroyed once.
        let _ = unsafe { result::event::destroy(self.handle) };
    }
}

/// Shape and attributes of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaunchShape {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Blocks of a cluster, along x.
    pub cluster: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// Whether it may start before the work before it is done.
    pub dependent: bool,
}
