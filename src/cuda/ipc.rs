//! Device memory that processes of one host share: one exports a block, others map it, and kernels write to it over the link between GPUs.
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Device, DeviceError, Stream, during};
use super::memory::DeviceMemory;

/// By which another process of the host maps a block of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryHandle([u8; MemoryHandle::BYTES]);

impl MemoryHandle {
    /// Its size.
    pub const BYTES: usize = 64;

    /// That of a block of [`DeviceMemory::shareable`], which the owner frees when no process has mapped it any more.
    ///
    /// # Errors
    /// The system shares no memory between processes.
    pub fn of(memory: &DeviceMemory) -> Result<MemoryHandle, DeviceError> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; MemoryHandle::BYTES] };
        // SAFETY: the address is an allocation's beginning; the driver writes the handle.
        let made = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, memory.address()) };
        during("sharing memory with other processes", made.result())?;
        Ok(MemoryHandle(handle.reserved.map(|byte| byte as u8)))
    }

    /// As it is sent to another process.
    pub fn to_bytes(self) -> [u8; MemoryHandle::BYTES] {
        self.0
    }

    /// As it was sent.
    pub fn from_bytes(bytes: [u8; MemoryHandle::BYTES]) -> MemoryHandle {
        MemoryHandle(bytes)
    }
}

/// A block of device memory that other processes may map. It is never freed before the process ends: only that is sure to come after the
/// last write of another process, which may have ended its own mapping or not.
#[derive(Debug)]
pub struct SharedMemory(ManuallyDrop<DeviceMemory>);

impl SharedMemory {
    /// Allocates; the contents are whatever was there.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<SharedMemory, DeviceError> {
        Ok(SharedMemory(ManuallyDrop::new(DeviceMemory::shareable(device, bytes)?)))
    }

    /// The memory.
    pub fn memory(&self) -> &DeviceMemory {
        &self.0
    }

    /// Frees it, because no process has mapped it.
    pub fn free(self) {
        drop(ManuallyDrop::into_inner(self.0));
    }

    /// The handle for other processes.
    ///
    /// # Errors
    /// The system shares no memory between processes.
    pub fn handle(&self) -> Result<MemoryHandle, DeviceError> {
        MemoryHandle::of(&self.0)
    }
}

/// Another process' memory, mapped here.
#[derive(Debug)]
pub struct MappedMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    device: Arc<Device>,
}

impl MappedMemory {
    /// Maps a block of so many bytes, on this GPU or on one that it reaches.
    ///
    /// # Errors
    /// No such memory on this host, or the GPUs do not reach each other.
    pub fn open(device: &Arc<Device>, handle: MemoryHandle, bytes: usize) -> Result<MappedMemory, DeviceError> {
        device.bind()?;
        let handle = sys::CUipcMemHandle { reserved: handle.0.map(|byte| byte as _) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the driver checks the handle, and writes the address.
        let opened = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, flags) };
        during("mapping another process' memory", opened.result())?;
        Ok(MappedMemory { address, bytes, device: Arc::clone(device) })
    }

    /// Its address here, for kernels.
    pub fn address(&self) -> u64 {
        self.address
    }

    fn at(&self, offset: usize, bytes: usize) -> Result<sys::CUdeviceptr, DeviceError> {
        match offset.checked_add(bytes).is_some_and(|end| end <= self.bytes) {
            true => Ok(self.address + offset as u64),
            false => Err(DeviceError::Call {
                what: format!("reading {bytes} bytes at {offset} of another process' memory"),
                error: format!("it has {}", self.bytes),
            }),
        }
    }

    /// Copies to the host and waits.
    ///
    /// # Errors
    /// Out of range, or the driver failed.
    pub fn read(&self, offset: usize, to: &mut [u8], stream: &Stream) -> Result<(), DeviceError> {
        let from = self.at(offset, to.len())?;
        // SAFETY: in range, and over before the borrow ends.
        let read = unsafe { cudarc::driver::result::memcpy_dtoh_async(to, from, stream.handle) };
        during("reading another process' memory", read)?;
        stream.synchronize()
    }

    /// Copies a range to the same place of a block of this process and waits.
    ///
    /// # Errors
    /// Out of range of one of them, or the driver failed.
    pub fn copy_to(&self, to: &DeviceMemory, range: Range<usize>, stream: &Stream) -> Result<(), DeviceError> {
        let (from, to) = (self.at(range.start, range.len())?, to.at(range.start, range.len())?);
        if range.is_empty() {
            return Ok(());
        }
        // SAFETY: both in range, and of different allocations; over before the borrows end.
        let copied = unsafe { cudarc::driver::result::memcpy_dtod_async(to, from, range.len(), stream.handle) };
        during("copying another process' memory", copied)?;
        stream.synchronize()
    }
}

impl Drop for MappedMemory {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: mapped once, and unmapped once.
        let _ = unsafe { sys::cuIpcCloseMemHandle(self.address) };
    }
}
