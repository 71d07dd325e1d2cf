//! Synthetic weights: numbers that are a function of seed, tensor and position, the same bits on every device.
//!
//! With all integers of 64 bits and wrapping, and `mix` the finalizer of SplitMix64,
//!
//! ```text
//! mix(z):      z ^= z >> 30; z *= 0xbf58476d1ce4e5b9; z ^= z >> 27; z *= 0x94d049bb133111eb; z ^= z >> 31
//! key         = mix(mix(seed) ^ salt)
//! bits(i)     = mix(key + (i + 1) * 0x9e3779b97f4a7c15)
//! u(i)        = f32(bits(i) >> 40) * 2^-23 - 1         both exact: a multiple of 2^-23 in [-1, 1)
//! element(i)  = center + scale * u(i)                  in f32, a product and then a sum, each rounded: never fused
//! ```
//!
//! where i counts the elements of the checkpoint tensor, row-major. The element is rounded to the tensor's type, as a
//! checkpoint would hold it, and then to the weight's.

use super::layout::Elements;
use crate::plan::{DType, Synthetic, Tensor};
use crate::runtime::convert::{BLOCK, read_f32, write_f32};

const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// The key of a tensor's counter.
pub fn key(seed: u64, salt: u64) -> u64 {
    mix(mix(seed) ^ salt)
}

/// The key with which element i is what element i + `skipped` is with another.
pub fn key_behind(key: u64, skipped: u64) -> u64 {
    key.wrapping_add(skipped.wrapping_mul(WEYL))
}

/// Element i of the tensor with this key, in f32, before it is rounded to the tensor's type.
#[inline]
pub fn element(key: u64, synthetic: &Synthetic, i: u64) -> f32 {
    const UNIT: f32 = 1.0 / (1 << 23) as f32;
    let bits = mix(key.wrapping_add(i.wrapping_add(1).wrapping_mul(WEYL)));
    let u = (bits >> 40) as f32 * UNIT - 1.0;
    synthetic.center + synthetic.scale * u
}

#[inline]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The numbers of all tensors of a manifest.
pub(super) struct Numbers<'a>(Vec<(u64, &'a Tensor)>);

impl<'a> Numbers<'a> {
    pub(super) fn new(tensors: &'a [Tensor], seed: u64) -> Self {
        Numbers(tensors.iter().map(|tensor| (key(seed, tensor.synthetic.salt), tensor)).collect())
    }
}

impl Elements for Numbers<'_> {
    fn stored(&self, tensor: u32) -> Vec<(DType, u64)> {
        let tensor = self.0[tensor as usize].1;
        vec![(tensor.dtype, tensor.shape.iter().product())]
    }

    fn read(&self, tensor: u32, first: u64, dtype: DType, bytes: &mut [u8]) {
        let (key, tensor) = self.0[tensor as usize];
        let mut values = [0.0; BLOCK];
        let mut stored = [0; BLOCK * 4];
        for (block, bytes) in bytes.chunks_mut(BLOCK * dtype.bytes() as usize).enumerate() {
            let values = &mut values[..bytes.len() / dtype.bytes() as usize];
            let start = first + (block * BLOCK) as u64;
            for (value, i) in values.iter_mut().zip(start..) {
                *value = element(key, &tensor.synthetic, i);
            }
            if tensor.dtype != DType::F32 && tensor.dtype != dtype {
                let stored = &mut stored[..values.len() * tensor.dtype.bytes() as usize];
                write_f32(tensor.dtype, values, stored);
                read_f32(tensor.dtype, stored, values);
            }
            write_f32(dtype, values, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits from another implementation, in exact arithmetic: what every device must make.
    #[test]
    fn numbers_are_fixed() {
        let synthetic = Synthetic { salt: 7, center: 0.25, scale: 0.1 };
        let key = key(42, synthetic.salt);
        assert_eq!(mix(WEYL), 0xe220_a839_7b1d_cdaf, "the first number of SplitMix64 with seed 0");
        let found: Vec<u32> = (0..4).map(|i| element(key, &synthetic, i).to_bits()).collect();
        assert_eq!(found, [0x3eb2_0ac0, 0x3e2f_5ce0, 0x3e6e_966e, 0x3ea9_175e]);
    }

    #[test]
    fn a_tensor_may_begin_behind_its_beginning() {
        let synthetic = Synthetic { salt: 1, center: 0.0, scale: 1.0 };
        let key = key(9, 1);
        assert_eq!(element(key_behind(key, 70), &synthetic, 5).to_bits(), element(key, &synthetic, 75).to_bits());
    }

    #[test]
    fn numbers_are_spread_over_the_range() {
        let synthetic = Synthetic { salt: 3, center: 0.5, scale: 2.0 };
        let key = key(1, synthetic.salt);
        let n = 100_000;
        let values: Vec<f64> = (0..n).map(|i| f64::from(element(key, &synthetic, i))).collect();
        assert!(values.iter().all(|v| (-1.5..2.5).contains(v)));
        let mean = values.iter().sum::<f64>() / n as f64;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
        // The mean of n numbers of deviation 2/sqrt(3) is off by 0.004 typically.
        assert!((mean - 0.5).abs() < 0.015, "mean {mean}");
        assert!((deviation - 2.0 / 3f64.sqrt()).abs() < 0.01, "deviation {deviation}");
        let product: f64 = values.windows(2).map(|w| (w[0] - mean) * (w[1] - mean)).sum::<f64>() / n as f64;
        assert!(product.abs() < 0.02, "neighbours are correlated: {product}");
    }

    #[test]
    fn tensors_and_seeds_differ() {
        let row = |seed, salt| -> Vec<u32> {
            let synthetic = Synthetic { salt, center: 0.0, scale: 1.0 };
            (0..64).map(|i| element(key(seed, salt), &synthetic, i).to_bits()).collect()
        };
        let rows = [row(0, 0), row(0, 1), row(1, 0), row(1, 1), row(u64::MAX, 0), row(0, u64::MAX)];
        for (i, a) in rows.iter().enumerate() {
            for b in &rows[..i] {
                let equal = a.iter().zip(b).filter(|(x, y)| x == y).count();
                assert_eq!(equal, 0);
            }
        }
        assert_eq!(rows[0], row(0, 0));
    }
}
