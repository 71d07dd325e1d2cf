//! The operators: a closed set, each with typed attributes.
//!
//! [`OpKind::mnemonic`] and [`OpKind::attributes`] give the text form, [`OpKind::from_text`] reads it back; what an
//! operator accepts and produces is in [`crate::ir::shape`].

mod text;

use std::fmt;

/// How many turns there are, by which ranks with the same expert share its rows ([`OpKind::LocalExperts`]).
pub const TURNS: u64 = 1 << 10;

/// An elementwise function of one operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum UnaryFn {
    /// `-x`
    Neg,
    /// `|x|`
    Abs,
    /// `e^x`
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// Hyperbolic tangent.
    Tanh,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `x * sigmoid(x)`
    Silu,
    /// `max(x, 0)`
    Relu,
}

/// An elementwise function of two operands, the second broadcast to the first where its dimensions are 1 or absent.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BinaryFn {
    /// `x + y`
    Add,
    /// `x - y`
    Sub,
    /// `x * y`
    Mul,
    /// `x / y`
    Div,
    /// The larger.
    Max,
    /// The smaller.
    Min,
}

impl UnaryFn {
    /// Every function with its mnemonic.
    pub const ALL: [(UnaryFn, &'static str); 10] = [
        (UnaryFn::Neg, "neg"),
        (UnaryFn::Abs, "abs"),
        (UnaryFn::Exp, "exp"),
        (UnaryFn::Log, "log"),
        (UnaryFn::Sqrt, "sqrt"),
        (UnaryFn::Rsqrt, "rsqrt"),
        (UnaryFn::Tanh, "tanh"),
        (UnaryFn::Sigmoid, "sigmoid"),
        (UnaryFn::Silu, "silu"),
        (UnaryFn::Relu, "relu"),
    ];
}

impl BinaryFn {
    /// Every function with its mnemonic.
    pub const ALL: [(BinaryFn, &'static str); 6] = [
        (BinaryFn::Add, "add"),
        (BinaryFn::Sub, "sub"),
        (BinaryFn::Mul, "mul"),
        (BinaryFn::Div, "div"),
        (BinaryFn::Max, "max"),
        (BinaryFn::Min, "min"),
    ];

    /// True where the operands may be exchanged.
    pub fn commutes(self) -> bool {
        !matches!(self, BinaryFn::Sub | BinaryFn::Div)
    }
}

/// What a fused operator is made of, in execution order. The label of a fused operator lists its stages, and a GPU
/// kernel is chosen by that list.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stage {
    /// Token embedding.
    Embed,
    /// Selection of the rows that get logits.
    Gather,
    /// RMSNorm over the hidden dimension.
    Norm,
    /// Dense matrix product.
    Matmul,
    /// `silu(gate) * up`.
    Swiglu,
    /// Addition to the residual stream.
    Residual,
    /// Gate, causal convolution with state, gate.
    ShortConv,
    /// RMSNorm of each head, and RoPE, of queries and keys.
    HeadRope,
    /// Keys and values into the cache.
    KvWrite,
    /// Softmax attention over the cache.
    Attention,
    /// Router scores, top-k and weights.
    Router,
    /// Experts by their place among those of this rank.
    Local,
    /// Sorting of (token, expert) pairs by expert.
    Group,
    /// Matrix product with the expert of each row.
    ExpertMatmul,
    /// Weighted sum over a token's experts, in fixed order.
    Combine,
    /// Sum of what each rank made, in the order of the ranks.
    BlockSum,
    /// A chain of elementwise operators.
    Pointwise,
    /// Choice of the next token.
    Sample,
}

impl Stage {
    /// Every stage with its name in the text form.
    pub const ALL: [(Stage, &'static str); 18] = [
        (Stage::Embed, "embed"),
        (Stage::Gather, "gather"),
        (Stage::Norm, "norm"),
        (Stage::Matmul, "matmul"),
        (Stage::Swiglu, "swiglu"),
        (Stage::Residual, "residual"),
        (Stage::ShortConv, "shortconv"),
        (Stage::HeadRope, "headrope"),
        (Stage::KvWrite, "kvwrite"),
        (Stage::Attention, "attention"),
        (Stage::Router, "router"),
        (Stage::Local, "local"),
        (Stage::Group, "group"),
        (Stage::ExpertMatmul, "expert"),
        (Stage::Combine, "combine"),
        (Stage::BlockSum, "blocksum"),
        (Stage::Pointwise, "pointwise"),
        (Stage::Sample, "sample"),
    ];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&Stage::ALL, self))
    }
}

/// An operator with its attributes.
#[derive(Clone, PartialEq, Debug)]
pub enum OpKind {
    /// `(tokens i32[T], table [V,H]) -> [T,H]`: row `tokens[t]` of the table; zeros where the token is negative (padding).
    Embed,
    /// `(x [..,N], weight [D]) -> [..,N]`, D dividing N: each group of D elements divided by its root mean square
    /// (plus `eps` under the root) in f32, rounded to the type of `x`, then multiplied by the weight.
    RmsNorm {
        /// Added to the mean of squares.
        eps: f64,
    },
    /// `(x [T,K], weight [N,K]) -> [T,N]`: `x @ weight^T`, accumulated in f32.
    Matmul,
    /// `(x [..,N]) -> [..,n0], [..,n1], ...`: parts of the last axis, of equal size if `block` is given, and then taken in
    /// turn, `block` elements at a time.
    Split {
        /// Size of each part; they add up to N.
        sizes: Vec<u64>,
        /// Interleaving, as the weight layout made it.
        block: Option<u64>,
    },
    /// An elementwise function.
    Unary(UnaryFn),
    /// An elementwise function of two.
    Binary(BinaryFn),
    /// Conversion to the result's element type.
    Cast,
    /// `(u [T,C], weight [C,L], state [slots,ring,C], pos i32[T], slot i32[T]) -> [T,C], state`: depthwise causal
    /// convolution along each sequence, earlier columns from the state, zeros before position 0; the last columns of each
    /// sequence are written to the state at `position % ring`. Padding rows (slot -1) give zeros and write nothing.
    Conv1dCausal,
    /// `(x [T,heads*D], pos i32[T]) -> [T,heads*D]`: rotary embedding, first half of each head paired with the second.
    Rope {
        /// Base of the frequencies.
        theta: f64,
        /// Size D of one head.
        head_dim: u64,
    },
    /// `(k [T,heads*D], v [T,heads*D], kv [pages,2,heads,page,D], table i32[slots,pages per slot], pos i32[T],
    /// slot i32[T]) -> kv`: each row's key and value into its page. Padding rows write nothing.
    KvWrite,
    /// `(q [T,heads*D], kv, table, pos i32[T], slot i32[T]) -> [T,heads*D]`: causal attention of each row over positions
    /// `0..=pos` of its slot, softmax in f32. Padding rows give zeros.
    Attention {
        /// Query heads; a multiple of the KV heads in the state's shape.
        heads: u64,
        /// Factor on the scores before softmax.
        scale: f64,
    },
    /// `(scores f32[T,E], slot i32[T]) -> i32[T,k]`: the columns of the k largest, largest first, ties to the lower
    /// column; -1 in padding rows.
    TopK {
        /// How many.
        k: u64,
    },
    /// `(x [N,C], rows i32[R]) -> [R,C]`: rows of `x`; zeros where the index is negative.
    GatherRows,
    /// `(x [T,E], columns i32[T,k]) -> [T,k]`: elements of each row; zero where the index is negative.
    GatherColumns,
    /// `(x [..,N]) -> [..,1]`: sum of the last axis in f32, in ascending order.
    RowSum,
    /// `(x [T,K] or [T,k,K], weight [E,N,K], experts i32[T,k]) -> [T,k,N]`: each row times its expert's matrix; zeros where
    /// the expert is negative.
    ExpertMatmul,
    /// `(y [T,k,N], weights f32[T,k], experts i32[T,k]) -> [T,N]`: sum over k in ascending order in f32, leaving out
    /// negative experts.
    WeightedSum,
    /// `(experts i32[T,k]) -> pairs i32[T*k], places i32[T,k], offsets i32[E+1]`: stable sort of the pairs `t*k + j` by
    /// expert: `pairs` lists them in that order and ends in -1 for padding, `places` is the inverse (-1 for padding), and
    /// expert `e` owns rows `offsets[e]..offsets[e+1]`.
    GroupRows {
        /// Number of experts E.
        experts: u64,
    },
    /// `(x [T,K], pairs i32[T*k]) -> [T*k,K]`: row i is `x[pairs[i] / k]`; zeros where the pair is negative.
    GatherPairs {
        /// Experts a token.
        k: u64,
    },
    /// `(x [T,K], weight [E,N,K], pairs i32[T*k], offsets i32[E+1]) -> [T*k,N]`: row i is `x[pairs[i] / k]` times the matrix
    /// of the expert that owns i. Rows past `offsets[E]` are zeros.
    GroupedMatmulGather {
        /// Experts a token.
        k: u64,
    },
    /// `(x [T*k,K], weight [E,N,K], offsets i32[E+1]) -> [T*k,N]`: as above, with the rows already in order.
    GroupedMatmul,
    /// `(y [T*k,N], weights f32[T,k], places i32[T,k]) -> [T,N]`: sum over k in ascending order in f32 of
    /// `weights[t,j] * y[places[t,j]]`, leaving out negative places.
    GroupedWeightedSum,
    /// `(x [N,..], ...) -> [ranks*N,..], ...`: for each operand, that of each of so many neighbouring ranks, in their order: of all in
    /// the group, or, where the group is cut into parts of so many, of those in this rank's part. They compute it together, as they do
    /// [`OpKind::AllToAll`].
    AllGather {
        /// How many ranks.
        ranks: u64,
    },
    /// `(x [ranks*N,C]) -> [ranks*N,C]`: block i of the N rows goes to rank i, and block i of the result is what rank i sent.
    AllToAll {
        /// How many ranks.
        ranks: u64,
    },
    /// `(link i32[1], x, ...) -> link`: gives another rank of the group what it takes, which that one gets by [`OpKind::Receive`]. The
    /// state `link` stores nothing: its versions are the order of a rank's exchanges. First come numbers, then, if any are sent, positions
    /// and slots `i32[T]` of rows, then the pages of all slots, `i32[slots,pages per slot]`.
    Send {
        /// Number of the other rank.
        to: u64,
        /// Ranks of the group.
        ranks: u64,
    },
    /// `(link i32[1]) -> link, x, ...`: what another rank of the group gives by [`OpKind::Send`].
    Receive {
        /// Number of the other rank.
        from: u64,
        /// Ranks of the group.
        ranks: u64,
    },
    /// `(experts i32[T,k]) -> i32[T,k]`: each expert's position in the list of those that this rank has; -1 where it has it not.
    ///
    /// With `parts` `(experts i32[T,k], weights f32[T,k]) -> i32[T,k]`: -1 also where it is another rank's turn to run it for this row. The
    /// turn, below [`TURNS`], is made of the bits of the row's weights in their order: from 0, `h = (h ^ bits) * 0x9e3779b1` in 32 bits, of
    /// which the upper 10 are the turn.
    LocalExperts {
        /// All experts.
        of: u64,
        /// Those that this rank has, ascending.
        experts: Vec<u64>,
        /// For each of these, the turns that this rank runs it at: from the first number on, up to the second, without that; empty if all.
        parts: Vec<(u64, u64)>,
    },
    /// `(x [blocks*N,C]) -> [N,C]`: the sum of the blocks, in ascending order in f32.
    BlockSum {
        /// How many.
        blocks: u64,
    },
    /// `(logits f32[R,V], rows i32[R], pos i32[T], slot i32[T], params i32[slots,8]) -> i32[R]`: the next token of each row
    /// by its slot's sampling parameters; -1 where the row is negative.
    Sample,
    /// Several primitive operators as one; its body is its meaning.
    Fused(Vec<Stage>),
}

impl OpKind {
    /// True for an elementwise operator that a pointwise kernel can hold.
    pub fn is_pointwise(&self) -> bool {
        matches!(self, OpKind::Unary(_) | OpKind::Binary(_) | OpKind::Cast)
    }

    /// For an operator that updates persistent state: the operand that is the state and the result that is its next
    /// version.
    pub fn state_update(&self) -> Option<(usize, usize)> {
        match self {
            OpKind::Conv1dCausal => Some((2, 1)),
            OpKind::KvWrite => Some((2, 0)),
            OpKind::Send { .. } | OpKind::Receive { .. } => Some((0, 0)),
            _ => None,
        }
    }
}

fn name_of<K: PartialEq>(table: &[(K, &'static str)], key: &K) -> &'static str {
    table.iter().find(|(k, _)| k == key).map(|(_, name)| *name).expect("the table lists every variant")
}
