//! Safe wrappers around the CUDA driver and NVRTC, both loaded when they are first needed: a build needs neither. Every
//! handle frees itself. Uses no other room.

pub mod driver;
pub mod graph;
pub mod memory;
pub mod nvrtc;
pub mod tensor;

pub use driver::{Argument, Device, DeviceError, Event, Function, LaunchShape, Module, Stream};
pub use graph::Graph;
pub use memory::{DeviceMemory, HostMemory};
pub use nvrtc::{Nvrtc, NvrtcError};
pub use tensor::{Boxes, Element, TensorMap};
