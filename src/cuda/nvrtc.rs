//! NVRTC, the run-time compiler of CUDA C++: source text to machine code.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char};
use std::sync::OnceLock;

use cudarc::nvrtc::sys;
use thiserror::Error;

use super::library;

/// What went wrong while compiling.
#[derive(Clone, Debug, Error)]
pub enum NvrtcError {
    /// The library is not there.
    #[error(
        "the CUDA compiler NVRTC: expected libnvrtc.so.13 in the loader's path, in $CUDA_PATH/lib64, in /usr/local/cuda/lib64 \
         or in the Python package nvidia-cuda-nvrtc, found none; install the CUDA 13 toolkit, or \
         `pip install nvidia-cuda-nvrtc==13.0.*` and put its nvidia/cu13/lib into LD_LIBRARY_PATH; or leave machine code out with \
         --without-cubins, or compile for the CPU with --target cpu"
    )]
    Missing,
    /// The library is there but cannot do what is needed.
    #[error("NVRTC {found}: expected one that compiles for {expected}; install CUDA 13.0 or later")]
    Unable {
        /// The target.
        expected: String,
        /// The library's version.
        found: String,
    },
    /// A source that does not compile, with the compiler's messages.
    #[error("kernel {name} does not compile: {log}")]
    Source {
        /// The kernel's name.
        name: String,
        /// What NVRTC said.
        log: String,
    },
}

/// The compiler.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc {
    version: (u32, u32),
}

impl Nvrtc {
    /// Loads the library, once for the process.
    ///
    /// # Errors
    /// It is not installed where it is looked for.
    pub fn load() -> Result<Nvrtc, NvrtcError> {
        static LOADED: OnceLock<Option<(u32, u32)>> = OnceLock::new();
        let version = LOADED.get_or_init(|| {
            preload();
            // SAFETY: opens a library and calls a function that takes two places for integers.
            unsafe {
                if !sys::is_culib_present() {
                    return None;
                }
                let (mut major, mut minor) = (0, 0);
                let found = sys::nvrtcVersion(&mut major, &mut minor);
                (found == sys::nvrtcResult::NVRTC_SUCCESS).then_some((major as u32, minor as u32))
            }
        });
        version.map(|version| Nvrtc { version }).ok_or(NvrtcError::Missing)
    }

    /// Major and minor version, which are those of its CUDA toolkit.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles a source for an architecture such as `sm_90a`; `headers` are what it may include, by name.
    ///
    /// # Errors
    /// It does not compile.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        options: &[String],
    ) -> Result<Vec<u8>, NvrtcError> {
        let text = |text: &str| CString::new(text).map_err(|_| self.fault(name, "the text has a zero byte".into()));
        let (source, file) = (text(source)?, text(&format!("{name}.cu"))?);
        let names = headers.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>, _>>()?;
        let texts = headers.iter().map(|(_, contents)| text(contents)).collect::<Result<Vec<_>, _>>()?;
        let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
        let pointers = |list: &[CString]| -> Vec<*const c_char> { list.iter().map(|item| item.as_ptr()).collect() };
        let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));
        let mut program = Program(std::ptr::null_mut());
        // SAFETY: all pointers are to strings with terminators that live until the call is over; the program is destroyed
        // once, when it is dropped; buffers have the sizes that the library asks for.
        unsafe {
            let made = sys::nvrtcCreateProgram(
                &mut program.0,
                source.as_ptr(),
                file.as_ptr(),
                names.len() as i32,
                texts.as_ptr(),
                names.as_ptr(),
            );
            self.check(name, made)?;
            let compiled = sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr());
            if compiled != sys::nvrtcResult::NVRTC_SUCCESS {
                let mut size = 0;
                self.check(name, sys::nvrtcGetProgramLogSize(program.0, &mut size))?;
                let mut log = vec![0u8; size.max(1)];
                self.check(name, sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()))?;
                let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned());
                return Err(self.fault(name, log.unwrap_or_default()));
            }
            let mut size = 0;
            self.check(name, sys::nvrtcGetCUBINSize(program.0, &mut size))?;
            let mut cubin = vec![0u8; size];
            self.check(name, sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()))?;
            Ok(cubin)
        }
    }

    fn check(&self, name: &str, result: sys::nvrtcResult) -> Result<(), NvrtcError> {
        match result {
            sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
            other => Err(self.fault(name, format!("{other:?}"))),
        }
    }

    fn fault(&self, name: &str, log: String) -> NvrtcError {
        NvrtcError::Source { name: name.to_owned(), log }
    }
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by the library and destroyed once. A failure leaves nothing to do.
            unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
        }
    }
}

/// Opens the library from the first place outside of the loader's path that has it, and keeps it open: opened again by its
/// name alone it is then found.
fn preload() {
    let found = library::places("libnvrtc.so.13", "cu13").into_iter().find(|path| path.is_file());
    if let Some(path) = found {
        // SAFETY: opening the vendor's library runs its initialisers, as the loader would.
        if let Ok(library) = unsafe { libloading::Library::new(path) } {
            std::mem::forget(library);
        }
    }
}
