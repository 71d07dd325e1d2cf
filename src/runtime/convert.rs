//! Little-endian bytes to numbers and back, for every element type.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::plan::DType;

/// Elements converted at a time, in a buffer on the stack.
pub(crate) const BLOCK: usize = 512;

/// Reads elements as f32; integers are converted by value.
///
/// # Panics
/// `bytes` is not `values.len()` elements long.
pub fn read_f32(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    assert_eq!(Some(bytes.len()), values.len().checked_mul(width(dtype)), "bytes for {} elements", values.len());
    match dtype {
        DType::F32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        DType::I32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = i32::from_le_bytes(*bytes) as f32;
            }
        }
        DType::BF16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        DType::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            for (values, bytes) in values.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK * 2)) {
                let halves = &mut halves[..values.len()];
                for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                    *half = f16::from_le_bytes(*bytes);
                }
                halves.convert_to_f32_slice(values);
            }
        }
    }
}

/// Writes f32 as elements, rounded to nearest, ties to even; to integers towards zero, saturating.
///
/// # Panics
/// `bytes` is not `values.len()` elements long.
pub fn write_f32(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    assert_eq!(Some(bytes.len()), values.len().checked_mul(width(dtype)), "bytes for {} elements", values.len());
    match dtype {
        DType::F32 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
        }
        DType::I32 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = (*value as i32).to_le_bytes();
            }
        }
        DType::BF16 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = bf16_bits(*value).to_le_bytes();
            }
        }
        DType::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            for (values, bytes) in values.chunks(BLOCK).zip(bytes.chunks_mut(BLOCK * 2)) {
                let halves = &mut halves[..values.len()];
                halves.convert_from_f32_slice(values);
                for (half, bytes) in halves.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = half.to_le_bytes();
                }
            }
        }
    }
}

/// Rounds to bf16, ties to even. Unlike that of the `half` crate it has no branch, so loops over it are vectorised.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let upper = bits >> 16;
    let rounded = bits.wrapping_add(0x7fff + (upper & 1)) >> 16;
    // A NaN keeps its sign and upper bits, and is made quiet.
    (if value.is_nan() { upper | 0x40 } else { rounded }) as u16
}

/// Converts elements of one type to another; equal types are copied bit by bit.
///
/// # Panics
/// The two do not hold the same number of elements.
pub(crate) fn convert(from: DType, source: &[u8], to: DType, target: &mut [u8]) {
    if from == to {
        target.copy_from_slice(source);
        return;
    }
    let (from_bytes, to_bytes) = (width(from), width(to));
    assert_eq!(source.len() / from_bytes, target.len() / to_bytes, "elements");
    let mut values = [0.0; BLOCK];
    for (source, target) in source.chunks(BLOCK * from_bytes).zip(target.chunks_mut(BLOCK * to_bytes)) {
        let values = &mut values[..source.len() / from_bytes];
        read_f32(from, source, values);
        write_f32(to, values, target);
    }
}

/// Bytes of an element.
fn width(dtype: DType) -> usize {
    dtype.bytes() as usize
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    const ALL: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::I32];

    fn written(dtype: DType, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0xaa; values.len() * width(dtype)];
        write_f32(dtype, values, &mut bytes);
        bytes
    }

    fn read(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![f32::NAN; bytes.len() / width(dtype)];
        read_f32(dtype, bytes, &mut values);
        values
    }

    #[test]
    fn rounds_to_nearest_even() {
        // One and a half, two and a half, and a little more than half a unit in the last place above 1.
        let unit = |bits: i32| 2f32.powi(-bits);
        let ties = |bits| [1.0 + 0.5 * unit(bits), 1.0 + 1.5 * unit(bits), 1.0 + 0.5 * unit(bits) + unit(23)];
        let expected = |bits| vec![1.0, 1.0 + 2.0 * unit(bits), 1.0 + unit(bits)];
        assert_eq!(read(DType::BF16, &written(DType::BF16, &ties(7))), expected(7));
        assert_eq!(read(DType::F16, &written(DType::F16, &ties(10))), expected(10));
        assert_eq!(read(DType::I32, &written(DType::I32, &[-1.9, 1.9, 1e20])), [-1.0, 1.0, i32::MAX as f32]);
    }

    #[test]
    fn keeps_special_values() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let back = read(dtype, &written(dtype, &[f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::NAN]));
            assert_eq!(back[..2], [f32::INFINITY, f32::NEG_INFINITY]);
            assert_eq!(back[2].to_bits(), (-0.0f32).to_bits());
            assert!(back[3].is_nan());
        }
        assert_eq!(read(DType::F16, &written(DType::F16, &[1e6]))[0], f32::INFINITY);
    }

    proptest! {
        #[test]
        fn agrees_with_the_half_crate(bits in prop::collection::vec(any::<u32>(), 0..1200)) {
            let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let halves = read(DType::F16, &written(DType::F16, &values));
            let brains = read(DType::BF16, &written(DType::BF16, &values));
            for (i, value) in values.iter().enumerate() {
                prop_assert_eq!(brains[i].to_bits(), bf16::from_f32(*value).to_f32().to_bits());
                prop_assert_eq!(halves[i].is_nan(), value.is_nan());
                if !value.is_nan() {
                    prop_assert_eq!(halves[i].to_bits(), f16::from_f32(*value).to_f32().to_bits());
                }
            }
        }

        #[test]
        fn convert_is_read_then_write(words in prop::collection::vec(any::<u32>(), 0..1200), a in 0usize..4, b in 0usize..4) {
            let (from, to) = (ALL[a], ALL[b]);
            let source: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let mut target = vec![0; source.len() / width(from) * width(to)];
            convert(from, &source, to, &mut target);
            let expected = if from == to { source } else { written(to, &read(from, &source)) };
            prop_assert_eq!(target, expected);
        }
    }
}
