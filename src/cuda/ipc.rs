//! Device memory that processes of one host share: one exports a block, others map it, and kernels write to it over the link between GPUs.
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
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
    /// The driver's own blocks: memory that is shared whole has nothing else in it.
    const GRANULARITY: usize = 2 << 20;

    /// Allocates at least so many bytes; the contents are whatever was there.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<SharedMemory, DeviceError> {
        let bytes = bytes.max(1).next_multiple_of(Self::GRANULARITY);
        Ok(SharedMemory(ManuallyDrop::new(DeviceMemory::new(device, bytes)?)))
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
        let mut handle = sys::CUipcMemHandle { reserved: [0; MemoryHandle::BYTES] };
        // SAFETY: the address is an allocation's beginning; the driver writes the handle.
        let made = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, self.0.address()) };
        during("sharing memory with other processes", made.result())?;
        Ok(MemoryHandle(handle.reserved.map(|byte| byte as u8)))
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

    /// Copies its first bytes to the host and waits.
    ///
    /// # Errors
    /// More than it has, or the driver failed.
    pub fn read(&self, to: &mut [u8], stream: &Stream) -> Result<(), DeviceError> {
        if to.len() > self.bytes {
            let what = format!("reading {} bytes of another process' memory", to.len());
            return Err(DeviceError::Call { what, error: format!("it has {}", self.bytes) });
        }
        // SAFETY: in range, and over before the borrow ends.
        let read = unsafe { cudarc::driver::result::memcpy_dtoh_async(to, self.address, stream.handle) };
        during("reading another process' memory", read)?;
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
