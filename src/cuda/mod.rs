//! Safe wrappers around the CUDA driver, NVRTC, NCCL and cuBLASLt, each loaded when it is first needed: a build needs none. Every
//! handle frees itself. Uses no other room.

mod captures;
pub mod cublaslt;
pub mod driver;
pub mod graph;
pub mod ipc;
mod library;
pub mod memory;
mod module;
pub mod nccl;
pub mod nvrtc;
pub mod tensor;

pub use cublaslt::{Cublaslt, CublasltError, Matmul, MatmulPlaces, MatmulShape};
pub use driver::{Argument, Device, DeviceError, Event, Function, LaunchShape, Module, Stream};
pub use graph::Graph;
pub use ipc::{MappedMemory, MemoryHandle, SharedMemory};
pub use memory::{DeviceMemory, HostMemory};
pub use nccl::{Communicator, Exchange, NcclError, Part, UniqueId};
pub use nvrtc::{Nvrtc, NvrtcError};
pub use tensor::{Boxes, Element, TensorMap};
