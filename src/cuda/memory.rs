//! Memory of the device, and memory of the host that the device can reach.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::driver::{Device, DeviceError, Stream, during};

/// What the driver itself allocates in.
const DRIVER_BLOCK_BYTES: usize = 2 << 20;

/// A block of device memory.
#[derive(Debug)]
pub struct DeviceMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    device: Arc<Device>,
}

impl DeviceMemory {
    /// Allocates; the contents are whatever was there.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        // SAFETY: freed once, when dropped.
        let address = during(&format!("allocating {bytes} bytes"), unsafe { result::malloc_sync(bytes.max(1)) })?;
        Ok(DeviceMemory { address, bytes, device: Arc::clone(device) })
    }

    /// Allocates a block that other processes can be given, by a [`MemoryHandle`](super::MemoryHandle), without anything else: of whole blocks of the
    /// driver's own.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn shareable(device: &Arc<Device>, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        let mut memory = DeviceMemory::new(device, bytes.max(1).next_multiple_of(DRIVER_BLOCK_BYTES))?;
        memory.bytes = bytes;
        Ok(memory)
    }

    /// Its address, for kernels.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn at(&self, offset: usize, bytes: usize) -> Result<sys::CUdeviceptr, DeviceError> {
        match offset.checked_add(bytes).is_some_and(|end| end <= self.bytes) {
            true => Ok(self.address + offset as u64),
            false => Err(DeviceError::Call {
                what: format!("copying {bytes} bytes at {offset}"),
                error: format!("the block has {}", self.bytes),
            }),
        }
    }

    /// Copies from the host and waits.
    ///
    /// # Errors
    /// Out of range, or the driver failed.
    pub fn write(&self, offset: usize, from: &[u8], stream: &Stream) -> Result<(), DeviceError> {
        let to = self.at(offset, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: in range, and over before the borrow ends.
        during("copying to the device", unsafe { result::memcpy_htod_async(to, from, stream.handle) })?;
        stream.synchronize()
    }

    /// Copies to the host and waits.
    ///
    /// # Errors
    /// Out of range, or the driver failed.
    pub fn read(&self, offset: usize, to: &mut [u8], stream: &Stream) -> Result<(), DeviceError> {
        let from = self.at(offset, to.len())?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: in range, and over before the borrow ends.
        during("copying from the device", unsafe { result::memcpy_dtoh_async(to, from, stream.handle) })?;
        stream.synchronize()
    }

    /// Starts a copy from pinned memory. The caller keeps that memory unchanged until the stream has passed the copy.
    ///
    /// # Errors
    /// Out of range, or the driver failed.
    pub fn write_from(
        &self,
        offset: usize,
        from: &HostMemory,
        range: Range<usize>,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let to = self.at(offset, range.len())?;
        let from = from.slice(range)?;
        // SAFETY: both in range; pinned memory outlives its copies because dropping it waits for the device.
        during("copying to the device", unsafe { result::memcpy_htod_async(to, from, stream.handle) })
    }

    /// Starts a copy of the first bytes of another block to the beginning of this one.
    ///
    /// # Errors
    /// Out of range, or the driver failed.
    pub fn copy_from(&self, from: &DeviceMemory, bytes: usize, stream: &Stream) -> Result<(), DeviceError> {
        let (to, from) = (self.at(0, bytes)?, from.at(0, bytes)?);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both in range, and of different allocations; freeing one waits for work that uses it.
        during("copying on the device", unsafe { result::memcpy_dtod_async(to, from, bytes, stream.handle) })
    }

    /// Starts filling with a byte.
    ///
    /// # Errors
    /// Out of range, or the driver failed.
    pub fn fill(&self, range: Range<usize>, byte: u8, stream: &Stream) -> Result<(), DeviceError> {
        let to = self.at(range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        // SAFETY: in range.
        during("filling memory", unsafe { result::memset_d8_async(to, byte, range.len(), stream.handle) })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: freed once; the driver waits for work that uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Pinned host memory, which the device can also read and write by itself.
#[derive(Debug)]
pub struct HostMemory {
    pointer: *mut u8,
    device_address: u64,
    bytes: usize,
    device: Arc<Device>,
}

// SAFETY: plain memory, and the driver's handles may be used by any thread.
unsafe impl Send for HostMemory {}
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Allocates, filled with zeros.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<HostMemory, DeviceError> {
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: freed once, when dropped; zeroed in full before anyone can read it.
        unsafe {
            let pointer = during("allocating pinned memory", result::malloc_host(bytes.max(1), flags))?.cast::<u8>();
            std::ptr::write_bytes(pointer, 0, bytes.max(1));
            let mut device_address = 0;
            let mapped = sys::cuMemHostGetDevicePointer_v2(&mut device_address, pointer.cast(), 0).result();
            let memory = HostMemory { pointer, device_address, bytes, device: Arc::clone(device) };
            during("mapping pinned memory", mapped)?;
            Ok(memory)
        }
    }

    /// Its address for kernels.
    pub fn device_address(&self) -> u64 {
        self.device_address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The host's view, for memory that no kernel writes meanwhile.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    fn slice(&self, range: Range<usize>) -> Result<&[u8], DeviceError> {
        if range.start > range.end || range.end > self.bytes {
            let what = format!("copying {range:?} of pinned memory");
            return Err(DeviceError::Call { what, error: format!("it has {} bytes", self.bytes) });
        }
        // SAFETY: in range; nobody has a mutable view while this one is borrowed.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer.add(range.start), range.len()) })
    }

    /// Reads the 64-bit number at this position, which a kernel may be writing.
    pub fn load(&self, index: usize) -> u64 {
        assert!((index + 1) * 8 <= self.bytes, "position {index} of {} bytes", self.bytes);
        // SAFETY: in range and aligned, because the allocation is; volatile, because the device writes it. The device stores all
        // eight bytes at once.
        unsafe { self.pointer.cast::<u64>().add(index).read_volatile() }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let _ = self.device.synchronize();
        // SAFETY: freed once, after all work that could use it.
        let _ = unsafe { result::free_host(self.pointer.cast()) };
    }
}
