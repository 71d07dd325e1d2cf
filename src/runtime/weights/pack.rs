//! Packs weights on the host: what the kernel of [`ServiceRole::Pack`](crate::plan::ServiceRole::Pack) makes, byte for byte. The form
//! is told at [`crate::plan::packed`].

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::WeightError;
use super::checkpoint::Checkpoint;
use super::layout::Reader;
use super::resolve::resolve;
use crate::plan::packed::{
    CODES, HEADER_BYTES, MAX_BASE, MAX_COLUMNS, MAX_EXCEPTIONS, SPAN_BYTES, SPAN_COLUMNS, packed_row_bytes,
};
use crate::plan::{Manifest, Packed, Program};

/// Columns that are packed together.
const EIGHT: usize = 8;

/// A row of bf16, packed; none if too many numbers are outside of its binades.
///
/// # Panics
/// Columns that are no whole spans, or too many.
pub fn pack_row(row: &[u16]) -> Option<Vec<u8>> {
    let columns = row.len() as u64;
    assert!(columns.is_multiple_of(SPAN_COLUMNS) && columns <= MAX_COLUMNS, "{columns} columns");
    let base = base_of(row);
    let mut packed = vec![0; packed_row_bytes(columns) as usize];
    // The bits of 2^(base - 96).
    let mut words = vec![(base as u32 + 127 - 96) << 23];
    for (octet, numbers) in row.as_chunks::<EIGHT>().0.iter().enumerate() {
        let short = std::array::from_fn(|e| {
            let bits = numbers[e];
            let code = exponent(bits).checked_sub(base).filter(|code| (1..=CODES).contains(code));
            if code.is_none() && bits & 0x7fff != 0 {
                words.push((octet * EIGHT + e) as u32 | u32::from(bits) << 16);
                return 0;
            }
            u32::from(bits & 0x807f) | (code.unwrap_or(0) as u32) << 7
        });
        for (place, word) in places(octet).zip(fold(short)) {
            packed[place..place + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
    if words.len() > 1 + MAX_EXCEPTIONS {
        return None;
    }
    let header = packed.len() - HEADER_BYTES as usize;
    for (bytes, word) in packed[header..].chunks_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Some(packed)
}

/// The row that was packed.
///
/// # Panics
/// Fewer bytes than such a row has.
pub fn unpack_row(packed: &[u8], columns: usize) -> Vec<u16> {
    let header = columns / SPAN_COLUMNS as usize * SPAN_BYTES as usize;
    let base = (number(packed, header) >> 23) + 96 - 127;
    let octet = |octet: usize| {
        let mut words = places(octet).map(|place| number(packed, place));
        let words = std::array::from_fn(|_| words.next().unwrap_or(0));
        unfold(words).map(|short| {
            let code = short >> 7 & 15;
            let exponent = if code == 0 { 0 } else { base + code };
            (short & 0x807f | exponent << 7) as u16
        })
    };
    let mut row: Vec<u16> = (0..columns / EIGHT).flat_map(octet).collect();
    let exceptions = (1..=MAX_EXCEPTIONS).map(|i| number(packed, header + 4 * i));
    for exception in exceptions.take_while(|exception| exception >> 16 != 0) {
        row[(exception & 0xffff) as usize] = (exception >> 16) as u16;
    }
    row
}

/// Fills in the packed forms of a region whose weights are in their places.
///
/// # Errors
/// A weight with rows that do not pack, or an inconsistent plan.
pub fn pack(program: &Program, region: &mut [u8]) -> Result<(), WeightError> {
    for &Packed { weight: id, offset } in &program.packed {
        let of_plan = |what: &str| WeightError::Plan { entity: format!("weight {id}"), what: what.to_owned() };
        let weight = program.weights.get(id as usize).ok_or_else(|| of_plan("it is packed, but not there"))?;
        let rows = weight.packed_rows().ok_or_else(|| of_plan("it is packed, but cannot be"))?;
        let sizes = (rows.1 as usize * 2, packed_row_bytes(rows.1) as usize);
        let (raw, packed) = region.split_at_mut_checked(offset as usize).ok_or_else(|| of_plan("no room"))?;
        let raw = raw.get(weight.offset as usize..).and_then(|raw| raw.get(..rows.0 as usize * sizes.0));
        let packed = packed.get_mut(..rows.0 as usize * sizes.1);
        let (raw, packed) = raw.zip(packed).ok_or_else(|| of_plan("its packed form is outside of the region"))?;
        let failed = raw.par_chunks(sizes.0).zip(packed.par_chunks_mut(sizes.1)).map(|(raw, packed)| {
            let row: Vec<u16> = raw.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect();
            let made = pack_row(&row);
            made.iter().for_each(|made| packed.copy_from_slice(made));
            u64::from(made.is_none())
        });
        let failed = failed.sum();
        if failed > 0 {
            return Err(WeightError::Unpackable(Unpackable { weight: weight.name.clone(), failed, rows: rows.0 }));
        }
    }
    Ok(())
}

/// Whether a row packs.
fn packs(row: &[u16]) -> bool {
    let base = base_of(row);
    let coded = base + 1..=base + CODES;
    let outside = |bits: u16| bits & 0x7fff != 0 && !coded.contains(&exponent(bits));
    row.iter().filter(|&&bits| outside(bits)).count() <= MAX_EXCEPTIONS
}

/// A weight with rows that do not pack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unpackable {
    /// Its name.
    pub weight: String,
    /// Rows that do not pack.
    pub failed: u64,
    /// All rows.
    pub rows: u64,
}

/// The weights of which a plan has packed forms, but which a checkpoint does not allow them: all ranks' together, by name. Reads their
/// numbers.
///
/// # Errors
/// As [`load`](super::load).
pub fn unpackable(manifest: &Manifest, checkpoint: &Checkpoint) -> Result<Vec<Unpackable>, WeightError> {
    let stored = resolve(manifest, checkpoint)?;
    let mut found: BTreeMap<String, Unpackable> = BTreeMap::new();
    for program in &manifest.ranks {
        for &Packed { weight: id, .. } in &program.packed {
            let weight = program.weights.get(id as usize).and_then(|weight| Some((weight, weight.packed_rows()?)));
            let (weight, (rows, columns)) = weight.ok_or_else(|| WeightError::Plan {
                entity: format!("weight {id}"),
                what: "it is packed, but cannot be".to_owned(),
            })?;
            let reader = Reader::new(weight, &manifest.tensors)?;
            let fails = |row: &u64| {
                let mut bytes = vec![0; columns as usize * 2];
                reader.read(&stored, row * columns, &mut bytes);
                let row: Vec<u16> = bytes.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect();
                !packs(&row)
            };
            let failed = (0..rows).into_par_iter().filter(fails).count() as u64;
            if failed > 0 {
                let of = Unpackable { weight: weight.name.clone(), failed, rows };
                found.insert(weight.name.clone(), of);
            }
        }
    }
    Ok(found.into_values().collect())
}

/// The smallest base that leaves the fewest exceptions.
fn base_of(row: &[u16]) -> usize {
    let mut counts = [0u32; 256];
    row.iter().for_each(|&bits| counts[exponent(bits)] += 1);
    let held = |base: usize| counts[base + 1..=base + CODES].iter().sum::<u32>();
    // The first of several with the same key.
    (0..=MAX_BASE as usize).min_by_key(|&base| std::cmp::Reverse(held(base))).unwrap_or(0)
}

fn exponent(bits: u16) -> usize {
    usize::from(bits >> 7 & 0xff)
}

/// Where the words of eight columns lie in a packed row.
fn places(octet: usize) -> impl Iterator<Item = usize> {
    let (span, i, t) = (octet / 16, octet / 4 % 4, octet % 4);
    (0..3).map(move |word| span * SPAN_BYTES as usize + word * 64 + 4 * (4 * t + i))
}

/// Bits of a fourth word of two numbers that the first, the second and the third one take.
const FOURTH: [u32; 3] = [0x0780_0780, 0x0078_0078, 0x8007_8007];

/// Three words of eight numbers, of twelve bits each.
fn fold(short: [u32; EIGHT]) -> [u32; 3] {
    let [first, second, third, fourth] = std::array::from_fn(|i| short[2 * i] | short[2 * i + 1] << 16);
    let part = |i: usize| fourth & FOURTH[i];
    [first | part(0) << 4, second | part(1) << 8, third | part(2).rotate_right(4)]
}

/// The numbers of three words.
fn unfold(words: [u32; 3]) -> [u32; EIGHT] {
    let [first, second, third] = words.map(|word| word & 0x87ff_87ff);
    let fourth = [words[0] >> 4, words[1] >> 8, words[2].rotate_left(4)];
    let fourth = fourth.into_iter().zip(FOURTH).map(|(word, mask)| word & mask).sum();
    let pairs = [first, second, third, fourth];
    std::array::from_fn(|e| pairs[e / 2] >> (e % 2 * 16) & 0xffff)
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_row_lies_as_it_is_told() {
        // Ones but for: a zero, a negative zero, 1.5 at column 138, and what is far away.
        let mut row = vec![0x3f80u16; 256];
        (row[0], row[1], row[138], row[7], row[200]) = (0, 0x8000, 0x3fc0, 0x7f80, 0x8001);
        let packed = pack_row(&row).expect("two exceptions");
        // The exponents 127 alone: the smallest base reaches it with the last code.
        assert_eq!(number(&packed, 384), (112 + 31) << 23, "2^16");
        assert_eq!((number(&packed, 388), number(&packed, 392)), (7 | 0x7f80 << 16, 200 | 0x8001 << 16));
        assert!(packed[396..].iter().all(|&byte| byte == 0) && packed.len() == 448);
        // The first eight columns: a zero, a negative zero, ones; the last of them, in the upper half of the fourth word, an exception.
        let one = 15u32 << 7;
        assert_eq!(number(&packed, 0), 0x8000_0000 | (one << 4), "the fourth word's codes, of the lower half");
        assert_eq!(number(&packed, 64), one | one << 16);
        assert_eq!(number(&packed, 128), one | one << 16);
        // Column 138 of the second span: i = 0, t = 1, e = 2, which is the lower half of the second word.
        assert_eq!(number(&packed, 192 + 64 + 16), 0x40 | one | one << 16);
        // Column 200 begins eight columns, of which all others are ones: i = 2, t = 1.
        assert_eq!(number(&packed, 192 + 4 * 6), one << 16 | one << 4 | one << 20);
        assert_eq!(unpack_row(&packed, 256), row);
    }

    #[test]
    fn each_word_has_a_place_of_its_own() {
        let mut found: Vec<usize> = (0..48).flat_map(places).collect();
        found.sort_unstable();
        assert!(found.into_iter().eq((0..144).map(|word| word * 4)));
    }

    #[test]
    fn numbers_of_twelve_bits_are_folded_without_loss() {
        for bit in 0..EIGHT * 16 {
            let mut short = [0u32; EIGHT];
            short[bit / 16] = (1 << (bit % 16)) & 0x87ff;
            assert_eq!(unfold(fold(short)), short);
            let others = short.map(|number| !number & 0x87ff);
            assert_eq!(unfold(fold(others)), others);
        }
    }

    #[test]
    fn exceptions_are_limited() {
        let mut row = vec![0x3f80u16; 128];
        row[..MAX_EXCEPTIONS].fill(0x0001);
        assert_eq!(pack_row(&row).map(|packed| unpack_row(&packed, 128)), Some(row.clone()));
        row[MAX_EXCEPTIONS] = 0xff80;
        assert_eq!(pack_row(&row), None);
    }

    /// Numbers near one another, with zeros and a few from anywhere.
    fn rows() -> impl Strategy<Value = Vec<u16>> {
        let shape = (1usize..5, 0u16..256, 1u16..18, 0usize..20);
        shape.prop_flat_map(|(spans, low, binades, outliers)| {
            let near = (any::<u16>(), 0..binades)
                .prop_map(move |(bits, binade)| bits & 0x807f | ((low + binade).min(255) << 7));
            let zero = prop_oneof![Just(0u16), Just(0x8000)];
            let number = prop_oneof![20 => near, 1 => zero];
            let row = prop::collection::vec(number, spans * 128);
            let anywhere = prop::collection::vec((0..spans * 128, any::<u16>()), outliers);
            (row, anywhere).prop_map(|(mut row, anywhere)| {
                anywhere.into_iter().for_each(|(column, bits)| row[column] = bits);
                row
            })
        })
    }

    proptest! {
        #[test]
        fn rows_come_back_or_have_too_many_exceptions(row in rows()) {
            let outside = |base: usize| {
                let is = |&&bits: &&u16| bits & 0x7fff != 0 && !(base + 1..base + 16).contains(&exponent(bits));
                row.iter().filter(is).count()
            };
            let fewest = (0..224).map(outside).min().expect("there are bases");
            match pack_row(&row) {
                Some(packed) => {
                    prop_assert!(fewest <= MAX_EXCEPTIONS);
                    prop_assert_eq!(unpack_row(&packed, row.len()), row);
                }
                None => prop_assert!(fewest > MAX_EXCEPTIONS),
            }
        }
    }
}
