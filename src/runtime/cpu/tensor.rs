//! Values of the interpreter: numbers in memory as the plan types them, and results before they are stored.

use std::borrow::Cow;

use anyhow::{Result, anyhow, bail, ensure};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::plan::{DType, TensorType};

/// Numbers in the pool, or a result of an earlier operator of the same step.
#[derive(Clone, Copy, Debug)]
pub(super) enum View<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    I32(&'a [i32]),
}

impl<'a> View<'a> {
    /// Reads bytes as elements of a type.
    pub(super) fn new(bytes: &'a [u8], dtype: DType) -> Result<Self> {
        let fault = |fault| anyhow!("{} bytes are no array of {dtype:?}: {fault}", bytes.len());
        Ok(match dtype {
            DType::F32 => View::F32(bytemuck::try_cast_slice(bytes).map_err(fault)?),
            DType::F16 => View::F16(bytemuck::try_cast_slice(bytes).map_err(fault)?),
            DType::BF16 => View::BF16(bytemuck::try_cast_slice(bytes).map_err(fault)?),
            DType::I32 => View::I32(bytemuck::try_cast_slice(bytes).map_err(fault)?),
        })
    }

    /// Number of elements.
    pub(super) fn len(self) -> usize {
        match self {
            View::F32(x) => x.len(),
            View::F16(x) => x.len(),
            View::BF16(x) => x.len(),
            View::I32(x) => x.len(),
        }
    }

    /// The elements `start..start + len`.
    pub(super) fn part(self, start: usize, len: usize) -> Result<Self> {
        let range = start..start.saturating_add(len);
        let part = match self {
            View::F32(x) => x.get(range).map(View::F32),
            View::F16(x) => x.get(range).map(View::F16),
            View::BF16(x) => x.get(range).map(View::BF16),
            View::I32(x) => x.get(range).map(View::I32),
        };
        part.ok_or_else(|| anyhow!("elements {start}..+{len} are outside of an operand of {}", self.len()))
    }

    /// All elements in f32.
    pub(super) fn to_f32(self) -> Result<Cow<'a, [f32]>> {
        if let View::F32(x) = self {
            return Ok(Cow::Borrowed(x));
        }
        let mut out = vec![0.0; self.len()];
        self.read(0, &mut out)?;
        Ok(Cow::Owned(out))
    }

    /// Converts the elements from `start` on to f32, as many as `out` holds.
    pub(super) fn read(self, start: usize, out: &mut [f32]) -> Result<()> {
        match self.part(start, out.len())? {
            View::F32(x) => out.copy_from_slice(x),
            View::F16(x) => x.convert_to_f32_slice(out),
            View::BF16(x) => out.iter_mut().zip(x).for_each(|(out, x)| *out = widen(*x)),
            View::I32(_) => bail!("an operand of integers where numbers are needed"),
        }
        Ok(())
    }

    /// The elements as integers.
    pub(super) fn i32(self) -> Result<&'a [i32]> {
        match self {
            View::I32(x) => Ok(x),
            _ => bail!("an operand of numbers where integers are needed"),
        }
    }
}

/// Exact: a bf16 is the upper half of an f32.
fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// A result: numbers in f32, already rounded to their declared type, or integers.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Value {
    F32(Vec<f32>),
    I32(Vec<i32>),
}

impl Value {
    /// Rounds the numbers to the type under which the value is declared.
    pub(super) fn rounded(mut self, ty: &TensorType) -> Result<Self> {
        let (found, integers) = match &self {
            Value::F32(x) => (x.len(), false),
            Value::I32(x) => (x.len(), true),
        };
        ensure!(found == elements(ty)?, "{found} elements for a result declared {ty:?}");
        ensure!(integers == (ty.0 == DType::I32), "a result of another kind is declared {:?}", ty.0);
        if let Value::F32(x) = &mut self {
            round(x, ty.0);
        }
        Ok(self)
    }

    pub(super) fn view(&self) -> View<'_> {
        match self {
            Value::F32(x) => View::F32(x),
            Value::I32(x) => View::I32(x),
        }
    }

    /// Writes the elements as the declared type.
    pub(super) fn store(&self, dtype: DType, bytes: &mut [u8]) -> Result<()> {
        let room = bytes.len();
        let len = self.view().len() * dtype.bytes() as usize;
        ensure!(len <= room, "{len} bytes of a result for a buffer of {room}");
        let bytes = &mut bytes[..len];
        match self {
            Value::F32(x) => store_f32(x, dtype, bytes),
            Value::I32(x) => {
                bytes.copy_from_slice(bytemuck::cast_slice(x));
                Ok(())
            }
        }
    }
}

/// Writes numbers as elements of a type; `bytes` has exactly their size.
pub(super) fn store_f32(x: &[f32], dtype: DType, bytes: &mut [u8]) -> Result<()> {
    match dtype {
        DType::F32 => bytes.copy_from_slice(bytemuck::cast_slice(x)),
        DType::F16 => typed::<f16>(bytes)?.convert_from_f32_slice(x),
        DType::BF16 => typed::<bf16>(bytes)?.iter_mut().zip(x).for_each(|(out, x)| *out = bf16::from_f32(*x)),
        DType::I32 => bail!("a result of numbers is stored as integers"),
    }
    Ok(())
}

fn typed<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(bytes: &mut [u8]) -> Result<&mut [T]> {
    let len = bytes.len();
    bytemuck::try_cast_slice_mut(bytes).map_err(|fault| anyhow!("{len} bytes of a result: {fault}"))
}

/// Rounds in place to the values that a type holds: to nearest, ties to even.
pub(super) fn round(x: &mut [f32], dtype: DType) {
    match dtype {
        DType::F32 | DType::I32 => {}
        DType::BF16 => x.iter_mut().for_each(|x| *x = widen(bf16::from_f32(*x))),
        DType::F16 => {
            let mut half = [f16::ZERO; 256];
            for x in x.chunks_mut(half.len()) {
                let half = &mut half[..x.len()];
                half.convert_from_f32_slice(x);
                half.convert_to_f32_slice(x);
            }
        }
    }
}

/// Number of elements of a type.
pub(super) fn elements(ty: &TensorType) -> Result<usize> {
    let count = ty.elements().and_then(|n| usize::try_from(n).ok());
    count.ok_or_else(|| anyhow!("{ty:?} has too many elements for this machine"))
}

/// Number of bytes of a type.
pub(super) fn byte_len(ty: &TensorType) -> Result<usize> {
    let bytes = ty.bytes().and_then(|n| usize::try_from(n).ok());
    bytes.ok_or_else(|| anyhow!("{ty:?} has too many bytes for this machine"))
}

/// The dimensions of a type of known rank.
pub(super) fn dims<const N: usize>(ty: &TensorType) -> Result<[usize; N]> {
    ensure!(ty.1.len() == N, "expected a tensor of rank {N}, found {ty:?}");
    let mut dims = [0; N];
    for (dim, &size) in dims.iter_mut().zip(&ty.1) {
        *dim = usize::try_from(size)?;
    }
    Ok(dims)
}

/// A type's last dimension, and the product of those before.
pub(super) fn rows_and_last(ty: &TensorType) -> Result<(usize, usize)> {
    let Some(&last) = ty.1.last() else { bail!("expected a tensor with a last axis, found {ty:?}") };
    let last = usize::try_from(last)?;
    Ok((elements(ty)?.checked_div(last).unwrap_or(0), last))
}

/// Sum of products in an order that depends on the length alone: sixteen partial sums, then those in order.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_blocks.remainder(), b_blocks.remainder());
    for (a, b) in a_blocks.zip(b_blocks) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a * b;
    }
    lanes.iter().sum()
}
