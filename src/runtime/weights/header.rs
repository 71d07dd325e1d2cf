//! The header of a safetensors file: 8 bytes of length, JSON, then the tensors' bytes without gaps.
//!
//! The JSON's types are those of the `safetensors` crate. Its reader is not used, because it keeps the last of two tensors
//! of one name without a word and adds up sizes that a file may choose to overflow.

use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::plan::DType;

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

/// The longest header that is read, as other readers of the format have it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of a safetensors file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeaderEntry {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<u64>,
    /// Its bytes in the file; inside of it and as many as type and shape need.
    pub bytes: Range<usize>,
}

/// What is wrong with a safetensors file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HeaderError {
    /// No room for the header's length.
    #[error(
        "expected {LENGTH_BYTES} bytes with the header's length, found {found}; the file is cut off, download it again"
    )]
    NoLength {
        /// Bytes of the file.
        found: usize,
    },
    /// The header's length is past what is read.
    #[error("expected a header of at most {MAX_HEADER_BYTES} bytes, found length {found}; is this a safetensors file?")]
    TooLarge {
        /// The length it states.
        found: u64,
    },
    /// The header goes past the end.
    #[error(
        "expected a header of {expected} bytes, found {found} before the file's end; the file is cut off, download it again"
    )]
    CutOff {
        /// The length it states.
        expected: u64,
        /// Bytes after the length.
        found: usize,
    },
    /// The header is no JSON, or not of the right form.
    #[error(
        "expected a header in JSON that describes each tensor once, found: {0}; the file is damaged, download it again"
    )]
    Json(String),
    /// An element type that no plan has.
    #[error(
        "tensor `{name}`: expected type F32, F16, BF16 or I32, found {found}; convert the checkpoint to one of these"
    )]
    Type {
        /// Tensor.
        name: String,
        /// Its type.
        found: String,
    },
    /// Type and shape do not give the size of the tensor's range of bytes.
    #[error(
        "tensor `{name}`: expected {} bytes for shape {shape:?}, found offsets {start}..{end}; the file is damaged, download it again",
        .expected.map_or("less than 2^64".to_string(), |n| n.to_string())
    )]
    Size {
        /// Tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes it needs; `None` if too many to count.
        expected: Option<u64>,
        /// Its first byte, after the header.
        start: usize,
        /// Past its last byte.
        end: usize,
    },
    /// Tensors overlap or leave a gap.
    #[error(
        "tensor `{name}`: expected to start at byte {expected} of the data, found {found}; the file is damaged, download it again"
    )]
    Start {
        /// Tensor.
        name: String,
        /// Where the one before ends.
        expected: usize,
        /// Where it starts.
        found: usize,
    },
    /// The file is shorter or longer than its tensors.
    #[error(
        "expected {expected} bytes of tensors after the header, found {found}; the file is cut off or damaged, download it again"
    )]
    Length {
        /// Where the last tensor ends.
        expected: usize,
        /// Where the file ends, after the header.
        found: usize,
    },
}

/// Reads the header of a safetensors file, given the whole file. The entries are in the order of their bytes.
///
/// # Errors
/// Anything is wrong with the header, or it does not fit the file's length.
pub fn parse_header(file: &[u8]) -> Result<Vec<HeaderEntry>, HeaderError> {
    let (length, rest) = file.split_first_chunk().ok_or(HeaderError::NoLength { found: file.len() })?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(HeaderError::TooLarge { found: length });
    }
    let cut_off = HeaderError::CutOff { expected: length, found: rest.len() };
    let (json, data) = usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n)).ok_or(cut_off)?;
    let UniqueMap(mut infos) =
        serde_json::from_slice::<UniqueMap<TensorInfo>>(json).map_err(|error| HeaderError::Json(error.to_string()))?;
    infos.sort_by_key(|(_, info)| info.data_offsets);

    let data_start = file.len() - data.len();
    let mut entries = Vec::with_capacity(infos.len());
    let mut next = 0;
    for (name, info) in infos {
        let (start, end) = info.data_offsets;
        let shape: Vec<u64> = info.shape.iter().map(|&dim| dim as u64).collect();
        let Some(dtype) = plan_dtype(info.dtype) else {
            return Err(HeaderError::Type { name, found: info.dtype.to_string() });
        };
        let expected = shape.iter().try_fold(dtype.bytes(), |n, &dim| n.checked_mul(dim));
        if expected.is_none() || end.checked_sub(start).map(|n| n as u64) != expected {
            return Err(HeaderError::Size { name, shape, expected, start, end });
        }
        if start != next {
            return Err(HeaderError::Start { name, expected: next, found: start });
        }
        if end > data.len() {
            return Err(HeaderError::Length { expected: end, found: data.len() });
        }
        next = end;
        entries.push(HeaderEntry { name, dtype, shape, bytes: data_start + start..data_start + end });
    }
    if next != data.len() {
        return Err(HeaderError::Length { expected: next, found: data.len() });
    }
    Ok(entries)
}

fn plan_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::I32 => Some(DType::I32),
        _ => None,
    }
}

/// The entries of a JSON object, in its order, each name once; without `__metadata__`, which safetensors reserves.
pub(super) struct UniqueMap<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with a field for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut names = BTreeSet::new();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value().map_err(|error| A::Error::custom(format_args!("tensor `{name}`: {error}")))?;
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format_args!("duplicate tensor `{name}`")));
            }
            entries.push((name, value));
        }
        Ok(UniqueMap(entries))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        file.resize(file.len() + data, 7);
        file
    }

    const JSON: &str = concat!(
        r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},"#,
        r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"none":{"dtype":"F16","shape":[0,5],"data_offsets":[8,8]},"#,
        r#""scalar":{"dtype":"I32","shape":[],"data_offsets":[20,24]}}"#
    );

    #[test]
    fn reads_a_header() {
        let at = 8 + JSON.len();
        let entries = parse_header(&file(JSON, 24)).unwrap();
        let names: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.dtype, e.bytes.clone())).collect();
        let expected = [
            ("a", DType::F32, at..at + 8),
            ("none", DType::F16, at + 8..at + 8),
            ("b", DType::BF16, at + 8..at + 20),
            ("scalar", DType::I32, at + 20..at + 24),
        ];
        assert_eq!(names, expected);
        assert_eq!(entries[2].shape, [2, 3]);
        assert_eq!(parse_header(&file("{}", 0)), Ok(vec![]));
    }

    #[test]
    fn names_each_fault() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let entry = r#""x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let cases = [
            (vec![1, 2, 3], "expected 8 bytes with the header's length, found 3"),
            (u64::MAX.to_le_bytes().to_vec(), "expected a header of at most"),
            (file(JSON, 0)[..20].to_vec(), "found 12 before the file's end"),
            (file("{", 0), "expected a header in JSON"),
            (file("[]", 0), "an object with a field for each tensor"),
            (file("\"\u{fffd}", 0), "expected a header in JSON"),
            (file(r#"{"x":{"dtype":"F32"}}"#, 0), "tensor `x`: missing field `shape`"),
            (file(&one("F32", "[-1]", "[0,4]"), 4), "tensor `x`: invalid value"),
            (file(&one("F33", "[1]", "[0,4]"), 4), "tensor `x`: unknown variant `F33`"),
            (file(&one("I64", "[1]", "[0,8]"), 8), "tensor `x`: expected type F32, F16, BF16 or I32, found I64"),
            (file(&one("F32", "[1]", "[0,8]"), 8), "tensor `x`: expected 4 bytes for shape [1], found offsets 0..8"),
            (file(&one("F32", "[1]", "[4,0]"), 4), "found offsets 4..0"),
            (file(&one("F32", "[4294967296,4294967296]", "[0,4]"), 4), "expected less than 2^64 bytes"),
            (file(&one("F32", "[1]", "[4,8]"), 8), "tensor `x`: expected to start at byte 0 of the data, found 4"),
            (file(&one("F32", "[1]", "[0,4]"), 3), "expected 4 bytes of tensors after the header, found 3"),
            (file(&one("F32", "[1]", "[0,4]"), 5), "expected 4 bytes of tensors after the header, found 5"),
            (file(&format!("{{{entry},{entry}}}"), 4), "duplicate tensor `x`"),
        ];
        for (file, expected) in cases {
            let error = parse_header(&file).unwrap_err().to_string();
            assert!(error.contains(expected), "expected {expected:?} in {error:?}");
        }
    }

    #[test]
    fn sizes_that_add_up_past_the_largest_are_refused() {
        let size = 1u64 << 60;
        let entry = |i: u64| {
            let (start, end) = (i * size, (i as u128 + 1) * size as u128);
            let (shape, end) = if end > u64::MAX as u128 { (size / 2 - 1, end - 2) } else { (size / 2, end) };
            format!(r#""{i}":{{"dtype":"F16","shape":[{shape}],"data_offsets":[{start},{end}]}}"#)
        };
        let json = format!("{{{}}}", (0..16).map(entry).collect::<Vec<_>>().join(","));
        assert_eq!(
            parse_header(&file(&json, 6)),
            Err(HeaderError::Length { expected: size as usize, found: 6 }),
            "the sum wraps round to the file's length"
        );
    }

    /// What must hold of every header that is accepted.
    fn check(file: &[u8]) -> Result<(), TestCaseError> {
        if let Ok(entries) = parse_header(file) {
            let mut covered = 0;
            for entry in &entries {
                prop_assert!(entry.bytes.start <= entry.bytes.end && entry.bytes.end <= file.len());
                let elements: u64 = entry.shape.iter().product();
                prop_assert_eq!(elements * entry.dtype.bytes(), entry.bytes.len() as u64);
                covered += entry.bytes.len();
            }
            let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            prop_assert_eq!(8 + header + covered, file.len());
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn random_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            check(&bytes)?;
            let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
            framed.extend(bytes);
            check(&framed)?;
        }

        #[test]
        fn mutated_headers_do_no_harm(
            edits in prop::collection::vec((any::<prop::sample::Index>(), "[0-9a-zA-Z\\[\\]{},:\"_-]|\\PC"), 1..4),
            data in 0usize..40,
        ) {
            let mut json: Vec<char> = JSON.chars().collect();
            for (at, text) in edits {
                let at = at.index(json.len());
                json.splice(at..=at, text.chars());
            }
            check(&file(&json.into_iter().collect::<String>(), data))?;
        }

        #[test]
        fn cut_files_are_refused(cut in 0..8 + JSON.len() + 24) {
            prop_assert!(parse_header(&file(JSON, 24)[..cut]).is_err());
        }
    }
}
