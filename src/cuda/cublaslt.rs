//! cuBLASLt, NVIDIA's library of matrix products. What a product needs of the host (descriptors, the choice of an algorithm) is made once;
//! then it can be queued on streams and captured like a kernel.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use thiserror::Error;

use super::driver::{Device, DeviceError, Stream};
use super::library;
use super::memory::DeviceMemory;
use super::tensor::Element;

/// The library's file, by its version.
const FILE: &str = "libcublasLt.so.13";
/// The versions that are of the same toolkit as machine code is: 13.
const VERSIONS: Range<usize> = 130_000..140_000;
/// The operation that takes a matrix transposed, in the library's numbers.
const TRANSPOSED: i32 = 1;
/// Algorithms that divide a sum among blocks add its parts in f32 and in one order, or are not taken: a product is rounded once, and its bits
/// are the same from run to run.
const REDUCTIONS: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// What went wrong with the library.
#[derive(Clone, Debug, Error)]
pub enum CublasltError {
    /// The library is not there.
    #[error(
        "steps by cuBLASLt, which the plan was compiled with (--libraries cublaslt): expected {FILE} in the loader's path, in \
         $CUDA_PATH/lib64, in /usr/local/cuda/lib64 or in the Python package nvidia-cublas, found none; install the CUDA 13 toolkit, or \
         `pip install nvidia-cublas==13.*` and put its nvidia/cu13/lib into LD_LIBRARY_PATH; or compile without --libraries"
    )]
    Missing,
    /// The library that the loader finds first is another.
    #[error(
        "steps by cuBLASLt: expected version 13 of it, found {found}, of a libcublasLt.so that the loader finds first; put the folder of {FILE} before \
         others into LD_LIBRARY_PATH, or compile without --libraries"
    )]
    Unusable {
        /// Its version.
        found: String,
    },
    /// It has no algorithm for a product.
    #[error(
        "{what}: expected an algorithm of cuBLASLt for it, found none ({error}); compile without --libraries, or tune with this version of it"
    )]
    NoAlgorithm {
        /// The product.
        what: String,
        /// The library's word.
        error: String,
    },
    /// A call failed.
    #[error("{what}: cuBLASLt reports {error}")]
    Call {
        /// What was being done.
        what: String,
        /// The library's word.
        error: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn during<T>(what: &str, result: Result<T, CublasError>) -> Result<T, CublasltError> {
    result.map_err(|error| CublasltError::Call { what: what.to_owned(), error: format!("{:?}", error.0) })
}

/// The library, for one device.
#[derive(Debug)]
pub struct Cublaslt {
    handle: sys::cublasLtHandle_t,
    device: Arc<Device>,
}

// SAFETY: the library's functions may be called from several threads with one handle.
unsafe impl Send for Cublaslt {}
unsafe impl Sync for Cublaslt {}

impl Cublaslt {
    /// Loads the library, once for the process, and opens it for a device. Not to be called within a capture.
    ///
    /// # Errors
    /// It is not installed where it is looked for, or of another toolkit's version.
    pub fn new(device: &Arc<Device>) -> Result<Arc<Cublaslt>, CublasltError> {
        let version = version()?;
        if !VERSIONS.contains(&version) {
            return Err(CublasltError::Unusable { found: version_text(version) });
        }
        device.bind()?;
        let _nobody_captures = device.captures.exclude();
        let handle = during("opening cuBLASLt", result::create_handle())?;
        Ok(Arc::new(Cublaslt { handle, device: Arc::clone(device) }))
    }
}

impl Drop for Cublaslt {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let _nobody_captures = self.device.captures.exclude();
        // SAFETY: made by the library and destroyed once; products keep it alive until they are no more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Its version, as a number: 130004 of 13.0.4.
fn version() -> Result<usize, CublasltError> {
    static LOADED: OnceLock<Option<usize>> = OnceLock::new();
    let version = LOADED.get_or_init(|| {
        let places = library::places(FILE, "cu13").into_iter().filter(|path| path.is_file());
        let mut paths = std::iter::once(FILE.into()).chain(places);
        // Kept open: by its name alone it is found again, and asking whether it is there does not unload it.
        // SAFETY: opening the vendor's library runs its initialisers, as the loader would.
        if let Some(library) = paths.find_map(|path| unsafe { libloading::Library::new(path) }.ok()) {
            std::mem::forget(library);
        }
        // SAFETY: opens a library and calls a function without arguments.
        unsafe { sys::is_culib_present().then(|| sys::cublasLtGetVersion()) }
    });
    version.ok_or(CublasltError::Missing)
}

fn version_text(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// A product of dense matrices, row by row: `result [rows,columns] = x [rows,depth] * weight [columns,depth]^T`, plus `residual
/// [rows,columns]` if it adds one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MatmulShape {
    /// Element type of `x` and `weight`.
    pub multiplied: Element,
    /// Element type of the result and of the residual.
    pub made: Element,
    /// Rows of `x`.
    pub rows: u64,
    /// Rows of `weight`.
    pub columns: u64,
    /// Columns of both.
    pub depth: u64,
    /// Whether a residual is added.
    pub adds: bool,
    /// Bytes of memory that it may work in.
    pub workspace: usize,
}

/// Where the matrices of a product lie in a block of memory, in bytes from its beginning, multiples of 256.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MatmulPlaces {
    /// The left operand.
    pub x: usize,
    /// The right one.
    pub weight: usize,
    /// What is added, if the product adds something.
    pub residual: Option<usize>,
    /// What is made.
    pub result: usize,
    /// What it may work in.
    pub workspace: usize,
}

/// Alignment of places, which the choice of an algorithm relies on.
const ALIGNMENT: usize = 256;

/// A product that is ready to be queued.
#[derive(Debug)]
pub struct Matmul {
    shape: MatmulShape,
    operation: sys::cublasLtMatmulDesc_t,
    x: sys::cublasLtMatrixLayout_t,
    weight: sys::cublasLtMatrixLayout_t,
    result: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    library: Arc<Cublaslt>,
}

// SAFETY: descriptors are made before it is shared and only read from then on.
unsafe impl Send for Matmul {}
unsafe impl Sync for Matmul {}

impl Matmul {
    /// Chooses the library's first algorithm for a product.
    ///
    /// # Errors
    /// It has none, or no type of these.
    pub fn new(library: &Arc<Cublaslt>, shape: MatmulShape) -> Result<Matmul, CublasltError> {
        let MatmulShape { rows, columns, depth, workspace, .. } = shape;
        let what = format!("product {shape:?}");
        let (multiplied, made) = (number(shape.multiplied, &what)?, number(shape.made, &what)?);
        library.device.bind()?;
        // The library counts matrices column by column: rows of ours are its columns, and result^T = weight * x^T.
        let mut matmul = Matmul {
            shape,
            operation: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            weight: std::ptr::null_mut(),
            result: std::ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            library: Arc::clone(library),
        };
        let layout = |ty, rows: u64, columns: u64| {
            during(&what, result::create_matrix_layout(ty, columns, rows, i64::try_from(columns).unwrap_or(i64::MAX)))
        };
        matmul.x = layout(multiplied, rows, depth)?;
        matmul.weight = layout(multiplied, columns, depth)?;
        matmul.result = layout(made, rows, columns)?;
        let (sums, factors) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        matmul.operation = during(&what, result::create_matmul_desc(sums, factors))?;
        let preference = Preference(during(&what, result::create_matmul_pref())?);
        // SAFETY: all handles are alive; attributes are read from places of the sizes that they have, before the calls end.
        let found = unsafe {
            let transposed = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            let (value, bytes) = place(&TRANSPOSED);
            during(&what, result::set_matmul_desc_attribute(matmul.operation, transposed, value, bytes))?;
            use sys::cublasLtMatmulPreferenceAttributes_t as P;
            let (value, bytes) = place(&workspace);
            let most = P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            during(&what, result::set_matmul_pref_attribute(preference.0, most, value, bytes))?;
            let (value, bytes) = place(&REDUCTIONS);
            let reductions = P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
            during(&what, result::set_matmul_pref_attribute(preference.0, reductions, value, bytes))?;
            result::get_matmul_algo_heuristic(
                library.handle,
                matmul.operation,
                matmul.weight,
                matmul.x,
                matmul.result,
                matmul.result,
                preference.0,
            )
        };
        let found = found.map_err(|error| CublasltError::NoAlgorithm { what, error: format!("{:?}", error.0) })?;
        matmul.algorithm = found.algo;
        Ok(matmul)
    }

    /// Queues the product of matrices in a block of memory. It begins when the stream has done what was queued before.
    ///
    /// # Errors
    /// Places that are not aligned or not inside of the memory, a residual where none is expected or none where one is, or the library failed.
    pub fn queue(&self, memory: &DeviceMemory, places: &MatmulPlaces, stream: &Stream) -> Result<(), CublasltError> {
        let what = || format!("queueing product {:?}", self.shape);
        let wrong = |error: String| CublasltError::Call { what: what(), error };
        let MatmulShape { multiplied, made, rows, columns, depth, adds, workspace } = self.shape;
        if places.residual.is_some() != adds {
            return Err(wrong(format!("`residual`: expected one: {adds}, found {:?}", places.residual)));
        }
        let address = |at: usize, rows: u64, columns: u64, size: u64| {
            let bytes = rows.checked_mul(columns).and_then(|count| count.checked_mul(size));
            let end = bytes.and_then(|bytes| bytes.checked_add(at as u64));
            if !at.is_multiple_of(ALIGNMENT) || end.is_none_or(|end| end > memory.bytes() as u64) {
                let room = memory.bytes();
                let found = format!("{rows} x {columns} elements of {size} bytes at byte {at}");
                return Err(wrong(format!(
                    "expected a place inside of {room} bytes, aligned to {ALIGNMENT}, found {found}"
                )));
            }
            Ok((memory.address() + at as u64) as *mut c_void)
        };
        let (multiplied, made) = (size(multiplied), size(made));
        let x = address(places.x, rows, depth, multiplied)?;
        let weight = address(places.weight, columns, depth, multiplied)?;
        let result = address(places.result, rows, columns, made)?;
        let added = places.residual.map_or(Ok(result), |at| address(at, rows, columns, made))?;
        let scratch = address(places.workspace, 1, workspace as u64, 1)?;
        let (one, beta) = (1.0f32, f32::from(u8::from(adds)));
        // SAFETY: handles and descriptors are alive, and matrices lie inside of the memory, as checked above; factors are read before the
        // call ends. What the stream does after the memory is freed is the business of whoever queues, as of every launch.
        let queued = unsafe {
            result::matmul(
                self.library.handle,
                self.operation,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                weight,
                self.weight,
                x,
                self.x,
                added,
                self.result,
                result,
                self.result,
                &raw const self.algorithm,
                scratch,
                workspace,
                stream.handle.cast(),
            )
        };
        queued.map_err(|error| wrong(format!("{:?}", error.0)))
    }

    /// Computes the product once and waits, so that the library loads the machine code that it needs, which no capture allows. Not to be
    /// called within one.
    ///
    /// # Errors
    /// As [`Matmul::queue`], or the device failed.
    pub fn run_once(&self, memory: &DeviceMemory, places: &MatmulPlaces, stream: &Stream) -> Result<(), CublasltError> {
        self.library.device.bind()?;
        // Code that is loaded may wait for the device.
        let _nobody_captures = self.library.device.captures.exclude();
        self.queue(memory, places, stream)?;
        Ok(stream.synchronize()?)
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: each made by the library, if it was made, and destroyed once. They are memory of the host.
        unsafe {
            for layout in [self.x, self.weight, self.result].into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            if !self.operation.is_null() {
                let _ = result::destroy_matmul_desc(self.operation);
            }
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by the library and destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// Where a value is, and how many bytes it has.
fn place<T>(value: &T) -> (*const c_void, usize) {
    (std::ptr::from_ref(value).cast(), size_of::<T>())
}

/// Bytes of an element.
fn size(element: Element) -> u64 {
    match element {
        Element::F32 | Element::I32 => 4,
        Element::F16 | Element::BF16 => 2,
    }
}

/// The library's word for a type.
fn number(element: Element, what: &str) -> Result<sys::cudaDataType_t, CublasltError> {
    match element {
        Element::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        Element::F16 => Ok(sys::cudaDataType_t::CUDA_R_16F),
        Element::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        Element::I32 => {
            Err(CublasltError::NoAlgorithm { what: what.to_owned(), error: "integers are not multiplied".into() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_there_or_its_absence_is_told() {
        match version() {
            Ok(version) => assert!(version >= 100_000, "{version}"),
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.starts_with("steps by cuBLASLt")
                        && text.contains("found none")
                        && text.contains("--libraries")
                );
            }
        }
        assert_eq!(version_text(130_102), "13.1.2");
    }
}
