//! What steps compute: the closed set of operators, and the short programs of them that a step may be.

use serde::{Deserialize, Serialize};

use crate::plan::{DType, TensorType};

/// What a step computes, over its operands: a short program of closed operators. A fused step has several.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Semantic {
    /// Stages, such as `norm+matmul`.
    pub name: String,
    /// What it takes, in order: arena, weights, state, io. A state that it updates is here too.
    pub inputs: Vec<TensorType>,
    /// What it makes, in order.
    pub outputs: Vec<TensorType>,
    /// Values that live only inside.
    pub temps: Vec<TensorType>,
    /// The operators, in order.
    pub body: Vec<Instr>,
}

/// One operator of a [`Semantic`]. An operator that updates a state takes it as an argument and writes it in place.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Instr(pub Op, pub Vec<Slot>, pub Vec<Slot>);

/// A value inside a [`Semantic`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Slot {
    /// Input of this position.
    In(u32),
    /// Output of this position.
    Out(u32),
    /// Temporary of this position.
    Temp(u32),
}

/// The closed set of operators. Arguments and results are listed as `(arguments) -> results`; T rows may include padding,
/// which has slot -1, writes no state, selects no expert and gives zeros. Products accumulate in f32.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Op {
    /// `(tokens i32[T], table [V,H]) -> [T,H]`; zeros where a token is negative.
    Embed,
    /// `(x [..,N], weight [D]) -> [..,N]`, over groups of D: normalised in f32, rounded to the type of x, then weighted.
    RmsNorm {
        /// Added to the mean of squares.
        eps: f64,
    },
    /// `(x [T,K], weight [N,K]) -> [T,N]`.
    Matmul,
    /// `(x [..,N]) -> parts` of the last axis, in turn `block` elements at a time if given.
    Split {
        /// Interleaving.
        block: Option<u64>,
    },
    /// `(operands, broadcast to the result's shape) -> [..]`: an expression in f32; the last register is the result.
    Pointwise(Vec<Expr>),
    /// `(u [T,C], weight [C,L], ring state, pos i32[T], slot i32[T]) -> [T,C]`.
    Conv1dCausal,
    /// `(x [T,heads*D], pos i32[T]) -> [T,heads*D]`.
    Rope {
        /// Base of the frequencies.
        theta: f64,
        /// Size of one head.
        head_dim: u64,
    },
    /// `(k [T,C], v [T,C], kv state, block table, pos i32[T], slot i32[T]) ->`.
    KvWrite,
    /// `(q [T,heads*D], kv state, block table, pos i32[T], slot i32[T]) -> [T,heads*D]`.
    Attention {
        /// Query heads.
        heads: u64,
        /// Factor on the scores.
        scale: f64,
    },
    /// `(scores f32[T,E], slot i32[T]) -> i32[T,k]`; ties to the lower column; -1 in padding.
    TopK,
    /// `(x [N,C], rows i32[R]) -> [R,C]`; zeros where negative.
    GatherRows,
    /// `(x [T,E], columns i32[T,k]) -> [T,k]`; zero where negative.
    GatherColumns,
    /// `(x [..,N]) -> [..,1]`, ascending order, f32.
    RowSum,
    /// `(x [T,K] or [T,k,K], weight [E,N,K], experts i32[T,k]) -> [T,k,N]`; zeros where negative.
    ExpertMatmul,
    /// `(y [T,k,N], weights f32[T,k], experts i32[T,k]) -> [T,N]`, ascending order, leaving out negative experts.
    WeightedSum,
    /// `(experts i32[T,k]) -> pairs i32[T*k], places i32[T,k], offsets i32[E+1]`: stable sort of pairs by expert.
    GroupRows,
    /// `(x [T,K], pairs i32[T*k]) -> [T*k,K]`: row `pairs[i] / k` of `x`; zeros where negative.
    GatherPairs {
        /// Experts a token.
        k: u64,
    },
    /// `(x [T,K], weight [E,N,K], pairs i32[T*k], offsets i32[E+1]) -> [T*k,N]`; zeros past the last group.
    GroupedMatmulGather {
        /// Experts a token.
        k: u64,
    },
    /// `(x [T*k,K], weight [E,N,K], offsets i32[E+1]) -> [T*k,N]`; zeros past the last group.
    GroupedMatmul,
    /// `(y [T*k,N], weights f32[T,k], places i32[T,k]) -> [T,N]`, ascending order, leaving out negative places.
    GroupedWeightedSum,
    /// `(x [N,..], ...) -> [ranks*N,..], ...`: what each of so many neighbouring ranks has of each argument, in their order.
    AllGather {
        /// How many ranks.
        ranks: u64,
    },
    /// `(x [ranks*N,C]) -> [ranks*N,C]`: block i of N rows to rank i, and from it.
    AllToAll {
        /// How many ranks.
        ranks: u64,
    },
    /// `(link state, x, ...) ->`: to another rank of the group, which takes it by [`Op::Receive`]: numbers, then positions and slots
    /// `i32[T]` of rows or neither, then pages of all slots, `i32[slots,pages per slot]`, or none.
    Send {
        /// Number of the other rank.
        to: u64,
        /// Ranks of the group.
        ranks: u64,
    },
    /// `(link state) -> x, ...`: from another rank of the group.
    Receive {
        /// Number of the other rank.
        from: u64,
        /// Ranks of the group.
        ranks: u64,
    },
    /// `(experts i32[T,k]) -> i32[T,k]`: positions in the list of experts that this rank has; -1 where it has it not. With `parts` `(experts,
    /// weights f32[T,k]) -> i32[T,k]`: -1 also where it is another rank's [`turn`] to run it for this row.
    LocalExperts {
        /// All experts.
        of: u64,
        /// Those of this rank, ascending.
        experts: Vec<u64>,
        /// For each of these, the turns that this rank runs it at: from the first number on, up to the second, without that; empty if all.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        parts: Vec<(u64, u64)>,
    },
    /// `(x [blocks*N,C]) -> [N,C]`: sum of the blocks, ascending order, f32.
    BlockSum {
        /// How many.
        blocks: u64,
    },
    /// `(logits [R,V], rows i32[R], pos i32[T], slot i32[T], sampling state) -> i32[R]`; -1 where the row is negative.
    Sample,
}

/// How many turns there are, by which ranks with the same expert share its rows.
pub const TURNS: u64 = 1 << 10;

/// The turn of a row whose experts have these weights, below [`TURNS`]. It follows from their bits alone, which differ from row to row, so that
/// turns come up about as often as each other in any batch; and a row is run on the same ranks, and its sums are grouped the same way,
/// wherever it stands and whatever stands beside it.
pub fn turn(weights: &[f32]) -> u64 {
    let hash = weights.iter().fold(0u32, |hash, weight| (hash ^ weight.to_bits()).wrapping_mul(0x9e37_79b1));
    u64::from(hash >> 22)
}

/// One register of a pointwise expression: numbered from 0, each made of operands and earlier registers, in f32.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub enum Expr {
    /// The operand of this position.
    Arg(u32),
    /// A constant.
    Const(f32),
    /// The register, rounded to an element type and back: where the unfused graph stores it.
    Round(u32, DType),
    /// A function of one register.
    Unary(UnaryFn, u32),
    /// A function of two.
    Binary(BinaryFn, u32, u32),
}

/// A function of one number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum UnaryFn {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    Rsqrt,
    Tanh,
    Sigmoid,
    Silu,
    Relu,
}

/// A function of two numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum BinaryFn {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
}
