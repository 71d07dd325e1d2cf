//! Machine code that is loaded on a device, and the kernels in it.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::driver::{Device, DeviceError, during};

/// Loaded machine code.
#[derive(Debug)]
pub struct Module {
    handle: sys::CUmodule,
    device: Arc<Device>,
}

// SAFETY: as of the device.
unsafe impl Send for Module {}
unsafe impl Sync for Module {}

impl Module {
    /// Loads machine code.
    ///
    /// # Errors
    /// It is none for this device.
    pub fn load(device: &Arc<Device>, cubin: &[u8]) -> Result<Arc<Module>, DeviceError> {
        // SAFETY: the driver reads the image by its own headers, as a program loader does.
        let handle = during("loading machine code", unsafe { result::module::load_data(cubin.as_ptr().cast()) })?;
        Ok(Arc::new(Module { handle, device: Arc::clone(device) }))
    }

    /// A kernel, whose parameters must have these sizes, allowed `shared` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// No such kernel, other parameters, or too much shared memory.
    pub fn function(self: &Arc<Self>, name: &str, params: &[usize], shared: u32) -> Result<Function, DeviceError> {
        let what = format!("looking for kernel {name}");
        let symbol = CString::new(name)
            .map_err(|_| DeviceError::Call { what: what.clone(), error: "a zero byte in the name".into() })?;
        // SAFETY: the module is alive, and lives as long as the function; places are for what the driver writes.
        unsafe {
            let handle = during(&what, result::module::get_function(self.handle, symbol))?;
            let mut found = vec![];
            // Only as many as are expected: asking for one beyond the last is an error that memory checkers report.
            for i in 0..params.len() {
                let (mut offset, mut size) = (0, 0);
                if sys::cuFuncGetParamInfo(handle, i, &mut offset, &mut size) == sys::CUresult::CUDA_SUCCESS {
                    found.push(size);
                }
            }
            if found != params {
                let error = format!("parameters of {params:?} bytes were expected, its have {found:?}");
                return Err(DeviceError::Call { what, error });
            }
            if shared > 48 << 10 {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let allowed = result::function::set_function_attribute(handle, attribute, shared as i32);
                during(&format!("allowing {shared} bytes of shared memory to {name}"), allowed)?;
            }
            // All the shared memory that there is, for every kernel alike. A multiprocessor can divide its memory otherwise only
            // while it runs no block, and so kernels that want another division could not start beside the one before.
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            let divided = result::function::set_function_attribute(handle, attribute, 100);
            during(&format!("preferring shared memory for {name}"), divided)?;
            Ok(Function { handle, name: name.to_owned(), _module: Arc::clone(self) })
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: unloaded once; its functions keep it alive until then.
        let _ = self.device.bind();
        let _ = unsafe { result::module::unload(self.handle) };
    }
}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Function {
    pub(super) handle: sys::CUfunction,
    pub(super) name: String,
    _module: Arc<Module>,
}

// SAFETY: as of the device.
unsafe impl Send for Function {}
unsafe impl Sync for Function {}

impl Function {
    /// Registers of a thread, bytes of static shared memory and of local memory.
    pub fn resources(&self) -> (u32, u32, u32) {
        use sys::CUfunction_attribute as A;
        let attribute = |which| {
            // SAFETY: the function is alive.
            unsafe { result::function::get_function_attribute(self.handle, which) }.map_or(0, |value| value as u32)
        };
        (
            attribute(A::CU_FUNC_ATTRIBUTE_NUM_REGS),
            attribute(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
            attribute(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
        )
    }

    /// Blocks of this shape that a multiprocessor holds at once.
    pub fn blocks_per_multiprocessor(&self, block: u32, shared: u32) -> u32 {
        let mut blocks = 0;
        // SAFETY: the function is alive; the place is for what the driver writes.
        let found = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, self.handle, block as i32, shared as usize)
        };
        if found == sys::CUresult::CUDA_SUCCESS { blocks as u32 } else { 0 }
    }
}
