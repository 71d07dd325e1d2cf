//! Weights packed without loss from 16 to 12 bits a number, for kernels that are bound by memory. The numbers of a row of bf16 mostly lie
//! in few binades, so a sign, seven bits of mantissa and a code of four bits for the exponent are enough; the few others are listed.
//!
//! A packed weight is its rows, one after the other: all axes but the last, flattened. A row of K numbers, a multiple of
//! [`SPAN_COLUMNS`], has `K / 2 * 3` bytes of spans and a header, numbers little-endian:
//!
//! - Span s at `s * 192`, of the columns from `s * 128` on. A number is a sign (bit 15), a code (bits 7 to 10) and a mantissa (bits 0 to
//!   6), and two adjacent columns are a word, the even one below. Of the eight columns from `i * 32 + t * 8` on, i and t < 4, the first
//!   three words lie at the words `t * 4 + i`, 16 and 32 further. What is left free there, bits 11 to 14 and 27 to 30, has the
//!   fourth word: the first one has its bits 7 to 10 and 23 to 26, four higher; the second its bits 3 to 6 and 19 to 22, eight higher; the
//!   third the others, rotated down by four. So a product has three words of four by one operation each.
//! - The header of 64 bytes: a word with the bits of `2^(base - 96)` in f32; then 15 words with exceptions, the column in the low half, the
//!   number's bits in the high half, by ascending column. No exception is zero, so the first word whose high half is 0 ends the list; all
//!   unused words are 0.
//!
//! A code from 1 on says that the exponent's field is `base + code`. Code 0 with a mantissa of 0 is a zero, or an exception, whose sign is
//! 0, too. The base is the smallest, from 0 to [`MAX_BASE`], that leaves the fewest exceptions. A row with more than 15 of them does not pack.
//! `runtime::weights` has the same as code, `kernels/pack.cu` for a device.

use serde::{Deserialize, Serialize};

use crate::plan::{DType, Weight};

/// Columns of a span.
pub const SPAN_COLUMNS: u64 = 128;
/// Bytes of a span.
pub const SPAN_BYTES: u64 = 192;
/// Bytes of a row's header.
pub const HEADER_BYTES: u64 = 64;
/// Binades of a row, and exponents that have codes.
pub const CODES: usize = 15;
/// Numbers of a row that may lie outside of its 15 binades.
pub const MAX_EXCEPTIONS: usize = 15;
/// Columns of a row, at the most.
pub const MAX_COLUMNS: u64 = 1 << 16;
/// The largest base: with it, the last code is still a finite number's, and so is the factor in the header.
pub const MAX_BASE: u32 = 223;

/// The packed form of a weight, beside the weight.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packed {
    /// Position of the weight among the program's.
    pub weight: u32,
    /// Offset in the weights region.
    pub offset: u64,
}

/// Bytes of a packed row of so many columns, whole spans.
pub fn packed_row_bytes(columns: u64) -> u64 {
    columns / SPAN_COLUMNS * SPAN_BYTES + HEADER_BYTES
}

/// Whether rows of so many columns can be packed.
pub fn packs(columns: u64) -> bool {
    columns > 0 && columns.is_multiple_of(SPAN_COLUMNS) && columns <= MAX_COLUMNS
}

impl Weight {
    /// Its rows and columns, if it is one that can have a packed form.
    pub fn packed_rows(&self) -> Option<(u64, u64)> {
        let (&columns, rows) = self.ty.1.split_last().filter(|(_, rows)| !rows.is_empty())?;
        let rows = rows.iter().try_fold(1u64, |product, &size| product.checked_mul(size))?;
        (packs(columns) && self.ty.0 == DType::BF16).then_some((rows, columns))
    }

    /// Bytes of its packed form, if it can have one: of bf16, with at least two axes, of which the last is one of whole spans.
    pub fn packed_bytes(&self) -> Option<u64> {
        let (rows, columns) = self.packed_rows()?;
        rows.checked_mul(packed_row_bytes(columns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Layout, TensorType};

    #[test]
    fn what_can_be_packed_has_rows_of_whole_spans_of_bf16() {
        let bytes = |dtype, shape: &[u64]| {
            let (name, ty) = (String::new(), TensorType(dtype, shape.to_vec()));
            Weight { name, ty, offset: 0, layout: Layout::Copy(0), indices: vec![] }.packed_bytes()
        };
        assert_eq!(packed_row_bytes(2048), 2048 * 3 / 2 + 64);
        assert_eq!(bytes(DType::BF16, &[3, 384]), Some(3 * (576 + 64)));
        assert_eq!(bytes(DType::BF16, &[2, 5, 128]), Some(10 * (192 + 64)));
        assert_eq!(bytes(DType::BF16, &[1, MAX_COLUMNS]), Some(98_304 + 64));
        for (dtype, shape) in [
            (DType::F16, &[3, 384][..]),
            (DType::F32, &[3, 384]),
            (DType::BF16, &[384]),
            (DType::BF16, &[3, 320]),
            (DType::BF16, &[3, 0]),
            (DType::BF16, &[1, MAX_COLUMNS + 128]),
            (DType::BF16, &[1 << 40, 1 << 40, 128]),
        ] {
            assert_eq!(bytes(dtype, shape), None, "{dtype:?} {shape:?}");
        }
    }
}
