//! Element types, dimensions and tensor types.

use std::fmt;
use std::str::FromStr;

/// The type of one element.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// Two's complement 32-bit integer: tokens, positions, slots, indices.
    I32,
}

impl DType {
    /// Size of one element in bytes.
    pub fn bytes(self) -> u64 {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// True for the floating-point types.
    pub fn is_float(self) -> bool {
        self != DType::I32
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        })
    }
}

impl FromStr for DType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(DType::F32),
            "f16" => Ok(DType::F16),
            "bf16" => Ok(DType::BF16),
            "i32" => Ok(DType::I32),
            _ => Err(format!("unknown element type `{text}`: expected f32, f16, bf16 or i32")),
        }
    }
}

/// A dimension whose size a bucket fixes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Sym {
    /// Token rows.
    T,
    /// Sequences.
    S,
    /// Rows that get logits.
    R,
}

impl fmt::Display for Sym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Sym::T => "T",
            Sym::S => "S",
            Sym::R => "R",
        })
    }
}

/// A dimension: a constant, or a constant times a bucket symbol. Prints as `2048`, `T` or `4*T`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Dim {
    /// The constant factor.
    pub factor: u64,
    /// The symbol it multiplies, if any.
    pub sym: Option<Sym>,
}

impl Dim {
    /// A constant dimension.
    pub fn fixed(size: u64) -> Self {
        Dim { factor: size, sym: None }
    }

    /// This dimension taken `n` times; `None` on overflow.
    pub fn times(self, n: u64) -> Option<Self> {
        Some(Dim { factor: self.factor.checked_mul(n)?, sym: self.sym })
    }

    /// The constant, if there is no symbol.
    pub fn as_fixed(self) -> Option<u64> {
        self.sym.is_none().then_some(self.factor)
    }

    /// The size in a bucket; `None` on overflow.
    pub fn size(self, bucket: &Extents) -> Option<u64> {
        self.factor.checked_mul(self.sym.map_or(1, |sym| bucket.of(sym)))
    }
}

impl From<Sym> for Dim {
    fn from(sym: Sym) -> Self {
        Dim { factor: 1, sym: Some(sym) }
    }
}

impl From<u64> for Dim {
    fn from(size: u64) -> Self {
        Dim::fixed(size)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.factor, self.sym) {
            (n, None) => write!(f, "{n}"),
            (1, Some(sym)) => write!(f, "{sym}"),
            (n, Some(sym)) => write!(f, "{n}*{sym}"),
        }
    }
}

/// What a bucket binds the symbols to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Extents {
    /// Token rows, `T`.
    pub tokens: u64,
    /// Sequences, `S`.
    pub sequences: u64,
    /// Rows that get logits, `R`.
    pub rows: u64,
}

impl Extents {
    /// The size of a symbol.
    pub fn of(&self, sym: Sym) -> u64 {
        match sym {
            Sym::T => self.tokens,
            Sym::S => self.sequences,
            Sym::R => self.rows,
        }
    }
}

/// Element type and shape. Row-major, dense.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<Dim>,
}

impl Type {
    /// A type from parts.
    pub fn new(dtype: DType, shape: impl IntoIterator<Item = impl Into<Dim>>) -> Self {
        Type { dtype, shape: shape.into_iter().map(Into::into).collect() }
    }

    /// The last dimension, if it is a constant.
    pub fn last(&self) -> Option<u64> {
        self.shape.last().and_then(|dim| dim.as_fixed())
    }

    /// The sizes in a bucket; `None` on overflow.
    pub fn sizes(&self, bucket: &Extents) -> Option<Vec<u64>> {
        self.shape.iter().map(|dim| dim.size(bucket)).collect()
    }

    /// Bytes in a bucket; `None` on overflow.
    pub fn bytes(&self, bucket: &Extents) -> Option<u64> {
        let mut bytes = self.dtype.bytes();
        for dim in &self.shape {
            bytes = bytes.checked_mul(dim.size(bucket)?)?;
        }
        Some(bytes)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, dim) in self.shape.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{dim}")?;
        }
        f.write_str("]")
    }
}
