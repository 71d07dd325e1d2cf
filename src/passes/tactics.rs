//! What is worth fusing where: the questions whose answers depend on the target and the bucket, each with its reason.
//!
//! No answer is a threshold on the number of rows. Some follow from the kind of kernel that a phase gets, the others from
//! modelled traffic: bytes that must cross memory, with a step's fixed cost as the bytes that could have crossed meanwhile; one
//! ([`gather_apart`]) also from how long the arithmetic takes.

use crate::ir::DType;
use crate::passes::{PassContext, Phase, Target};

/// Bytes a second of a read-only reduction; measured on one H200.
const MEMORY_BYTES_PER_SECOND: f64 = 4.29e12;

/// Time from one kernel of a graph to the next, a kernel of 132 blocks in a chain of such; measured on one H200.
const BOUNDARY_SECONDS: f64 = 1.03e-6;

/// What one more step costs, as bytes. On a CPU it is a call, nothing beside reading a weight.
fn boundary_bytes(target: Target) -> f64 {
    match target {
        Target::Cpu => 0.0,
        Target::Sm90a => MEMORY_BYTES_PER_SECOND * BOUNDARY_SECONDS,
    }
}

/// True where a kernel's rows pass through its registers on their way to the product, so that a computation on them can
/// be put before it at no traffic. Decode kernels are limited by weights: they keep the few rows on chip and stream
/// weights past them. Prefill kernels of tensor cores take rows from memory as they are: there, every block of columns
/// would compute the prologue of all its rows anew. An interpreter of bodies always saves the intermediate's traffic.
fn rows_staged(context: &PassContext) -> bool {
    context.target == Target::Cpu || context.bucket.phase == Phase::Decode
}

/// Whether an RMSNorm goes into the prologue of the product that reads it, or is a step of its own.
pub fn norm_in_prologue(context: &PassContext) -> bool {
    rows_staged(context)
}

/// Whether the gated convolution goes into the prologue of the product that reads it. Alone it is one pass over memory,
/// right for many rows. Recomputing it in every block is safe beside the one that writes the state: the column written is
/// none of the columns read, the ring being at least as long as the taps.
pub fn shortconv_in_prologue(context: &PassContext) -> bool {
    rows_staged(context)
}

/// Whether the gated convolution goes into the epilogue of the product that makes its rows, rather than into a prologue. Where each
/// row is a sequence of its own, a channel of the result needs but its own three columns of the product: each is computed once,
/// while a prologue is computed anew by every block, with all columns of the past, after its wait. An interpreter of bodies
/// computes either once.
pub fn shortconv_in_epilogue(context: &PassContext) -> bool {
    context.target != Target::Cpu && context.bucket.phase == Phase::Decode
}

/// Whether head norms, RoPE and the cache write share a step with attention. Within one launch no block may need a key
/// that another writes: true where each sequence has one row, whose key each of its blocks makes for itself, and false
/// where rows of one sequence attend to each other. An interpreter does one after the other.
pub fn attention_with_prep(context: &PassContext) -> bool {
    context.target == Target::Cpu || context.bucket.phase == Phase::Decode
}

/// Whether sorting the pairs by expert shares a step with the router. The sort needs every row's choice: cheap for the
/// last block to finish when there are few rows, a long tail of one block when there are many.
pub fn group_with_router(context: &PassContext) -> bool {
    context.target == Target::Cpu || context.bucket.phase == Phase::Decode
}

/// A mixture of experts in one bucket.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Experts {
    /// Rows of the bucket.
    pub rows: u64,
    /// Experts each row selects.
    pub k: u64,
    /// Experts to select from.
    pub count: u64,
    /// Those of them that this rank has: all, unless they are spread over several.
    pub local: u64,
    /// Bytes of the weights of one.
    pub bytes_each: u64,
}

impl Experts {
    /// How many different experts of this rank the rows are expected to select, were all equally likely: `L (1 - (1 - k/E)^rows)`.
    pub fn expected_distinct(&self) -> f64 {
        self.local as f64 * (1.0 - (1.0 - self.k as f64 / self.count as f64).powf(self.rows as f64))
    }
}

/// Whether rows are sorted by expert, so that each selected expert's weights are read once, at the price of one more step
/// (the sum over a token's experts no longer fits into the last product). Without, every (row, expert) pair reads its own.
pub fn group_experts(context: &PassContext, experts: &Experts) -> bool {
    let bytes_each = experts.bytes_each as f64;
    let here = experts.local as f64 / experts.count as f64;
    let direct = experts.rows as f64 * experts.k as f64 * here * bytes_each;
    let grouped = experts.expected_distinct() * bytes_each + boundary_bytes(context.target);
    // At one row both read the same experts; rounding must not decide.
    experts.rows > 1 && grouped < direct
}

/// A product of rows with the expert of each, of which a row is one among several of a token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Gathered {
    /// Rows of the result, for all of which there is room, those of other ranks' experts, too.
    pub rows: u64,
    /// Those expected to be of this rank's experts.
    pub expected: u64,
    /// Experts.
    pub experts: u64,
    /// Columns of the result.
    pub columns: u64,
    /// Columns of the rows.
    pub depth: u64,
    /// Types of the rows and of the weight.
    pub dtypes: [DType; 2],
}

/// Operations a second of a grouped product whose rows threads gather, 16 bytes at a time, and of one whose rows the copy engine brings
/// as they lie; measured on one H200.
const GATHERING_FLOPS: f64 = 5.0e14;
const LYING_FLOPS: f64 = 6.0e14;

/// Whether a step of its own puts the rows of the first product in their order, at the price of writing and reading all of them once more.
/// Threads that gather keep up with memory, which must bring the experts' weights meanwhile, but not with tensor cores. Rows of f32
/// pass through threads anyway, whatever the weight's type.
pub fn gather_apart(context: &PassContext, product: &Gathered) -> bool {
    let [dtype, of_weight] = product.dtypes;
    if context.target == Target::Cpu || !matches!(dtype, DType::BF16 | DType::F16) || of_weight != dtype {
        return false;
    }
    let [rows, expected, columns, depth] =
        [product.rows, product.expected, product.columns, product.depth].map(|n| n as f64);
    let bytes = dtype.bytes() as f64;
    let weights = product.experts as f64 * columns * depth * bytes / MEMORY_BYTES_PER_SECOND;
    let seconds = |flops: f64| weights.max(2.0 * expected * columns * depth / flops);
    let gather = 2.0 * rows * depth * bytes / MEMORY_BYTES_PER_SECOND + BOUNDARY_SECONDS;
    seconds(LYING_FLOPS) + gather < seconds(GATHERING_FLOPS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Extents;
    use crate::passes::BucketSpec;
    use proptest::prelude::*;

    fn context(target: Target) -> PassContext {
        let extents = Extents { tokens: 1, sequences: 1, rows: 1 };
        PassContext { target, bucket: BucketSpec { phase: Phase::Decode, extents }, experts: None, layers: None }
    }

    #[test]
    fn large_experts_are_sorted_for_from_the_first_likely_overlap() {
        let experts = |rows| Experts { rows, k: 4, count: 32, local: 32, bytes_each: 22_020_096 };
        for target in [Target::Cpu, Target::Sm90a] {
            assert!(!group_experts(&context(target), &experts(1)));
            assert!(group_experts(&context(target), &experts(2)));
            assert!(group_experts(&context(target), &experts(8192)));
        }
    }

    #[test]
    fn small_experts_are_not_worth_another_launch_until_there_are_many_rows() {
        let experts = |rows| Experts { rows, k: 2, count: 8, local: 8, bytes_each: 24_576 };
        assert!(!group_experts(&context(Target::Sm90a), &experts(64)));
        assert!(group_experts(&context(Target::Sm90a), &experts(1024)));
        assert!(group_experts(&context(Target::Cpu), &experts(64)));
    }

    #[test]
    fn expected_distinct_experts_of_one_row_and_of_very_many() {
        let experts = |rows| Experts { rows, k: 3, count: 7, local: 7, bytes_each: 1 };
        assert!((experts(1).expected_distinct() - 3.0).abs() < 1e-9);
        assert!((experts(100_000).expected_distinct() - 7.0).abs() < 1e-9);
    }

    #[test]
    fn rows_are_gathered_apart_where_arithmetic_takes_longer_than_weights() {
        let product = |tokens: u64, dtypes| Gathered {
            rows: 4 * tokens,
            expected: 4 * tokens,
            experts: 32,
            columns: 3584,
            depth: 2048,
            dtypes,
        };
        let apart = |target, tokens, dtypes| gather_apart(&context(target), &product(tokens, dtypes));
        let [narrow, wide] = [DType::BF16, DType::F32];
        for (tokens, expected) in [(1, false), (64, false), (512, false), (2048, true), (8192, true)] {
            assert_eq!(apart(Target::Sm90a, tokens, [narrow; 2]), expected, "{tokens}");
            assert!(!apart(Target::Cpu, tokens, [narrow; 2]), "{tokens}");
            for weight in [narrow, wide] {
                assert!(!apart(Target::Sm90a, tokens, [wide, weight]), "{tokens} rows of f32, weights of {weight}");
            }
        }
    }

    proptest! {
        /// What is worth it for some rows is worth it for more.
        #[test]
        fn sorting_pays_from_some_number_of_rows_on(
            count in 1u64..200,
            k in 1u64..9,
            bytes_each in 1u64..1 << 26,
            rows in 1u64..9000,
            gpu in prop::bool::ANY,
        ) {
            let context = context(if gpu { Target::Sm90a } else { Target::Cpu });
            let experts = |rows| Experts { rows, k: k.min(count), count, local: count, bytes_each };
            if group_experts(&context, &experts(rows)) {
                prop_assert!(group_experts(&context, &experts(rows + 1)));
            }
        }
    }
}
