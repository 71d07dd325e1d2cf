//! Tensor maps: what the copy engine is told of a tensor in device memory, in the driver's form.
#![allow(unsafe_code)]

use cudarc::driver::sys;

use super::driver::{DeviceError, during};

/// A tensor map as kernels take it.
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(pub(super) sys::CUtensorMap);

/// Type of a tensor's elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Element {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// 32-bit integer.
    I32,
}

/// A tensor of three axes, the innermost first, and the boxes that are copied of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Boxes {
    /// Address of its first element.
    pub address: u64,
    /// Type of its elements.
    pub element: Element,
    /// Elements along each axis.
    pub sizes: [u64; 3],
    /// Bytes from one to the next along the second and the third axis.
    pub strides: [u64; 2],
    /// Elements of a box along each axis.
    pub tile: [u32; 3],
    /// Bytes within which chunks of 16 are permuted in shared memory: 0, 32, 64 or 128.
    pub swizzle: u32,
    /// Bytes that come into the L2 cache together: 0 for what is asked for, 64, 128 or 256.
    pub promotion: u32,
}

impl TensorMap {
    /// The driver's form. Nothing is read at the address, which kernels that copy from it must be allowed to read.
    ///
    /// # Errors
    /// The driver refused it: addresses, sizes, strides or boxes that the device cannot do.
    pub fn new(boxes: &Boxes) -> Result<TensorMap, DeviceError> {
        use sys::{CUtensorMapDataType as D, CUtensorMapL2promotion as L, CUtensorMapSwizzle as S};
        let what = format!("describing {boxes:?}");
        let unknown = || DeviceError::Call { what: what.clone(), error: "no such swizzle or promotion".into() };
        let element = match boxes.element {
            Element::F32 => D::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Element::F16 => D::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Element::BF16 => D::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Element::I32 => D::CU_TENSOR_MAP_DATA_TYPE_INT32,
        };
        let swizzle = match boxes.swizzle {
            0 => S::CU_TENSOR_MAP_SWIZZLE_NONE,
            32 => S::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => S::CU_TENSOR_MAP_SWIZZLE_64B,
            128 => S::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => return Err(unknown()),
        };
        let promotion = match boxes.promotion {
            0 => L::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            64 => L::CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
            128 => L::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            256 => L::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            _ => return Err(unknown()),
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: all pointers are to as many numbers as there are axes, but one fewer strides; the map is as aligned as its type.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                element,
                boxes.sizes.len() as u32,
                boxes.address as *mut _,
                boxes.sizes.as_ptr(),
                boxes.strides.as_ptr(),
                boxes.tile.as_ptr(),
                [1u32; 3].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                promotion,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
        };
        during(&what, made).map(|()| TensorMap(map))
    }
}
