//! `kernels/weighted_sum.cu`: the sum over a token's experts, grouped or not, what follows it elementwise, and the RMSNorm of that.

use super::builder::{Builder, Specialised, by_width};
use super::expression::Epilogue;
use super::normed::{Norm, Rows};
use super::pattern::{args, dims, dtype, results, rows_and_last};
use super::{Problem, Twin};
use crate::plan::{DType, Op};

/// The twin.
pub struct WeightedSum;

impl Twin for WeightedSum {
    fn name(&self) -> &'static str {
        "weighted_sum"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/weighted_sum.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        by_width(|vector| specialise(problem, vector))
    }
}

/// With the number of threads that have something to do.
fn specialise(problem: &Problem, vector: u64) -> Option<(u64, Specialised)> {
    let semantic = problem.semantic;
    let (norm, body) = Norm::split(&semantic.body);
    let (sum, rest) = body.split_first()?;
    let grouped = match sum.0 {
        Op::WeightedSum => false,
        Op::GroupedWeightedSum => true,
        _ => return None,
    };
    let ([source, weights, places], [result]) = (args(sum)?, results(sum)?);
    let ([tokens, columns], [_, k]) = (dims(semantic, result)?, dims(semantic, weights)?);
    let epilogue = Epilogue::new(semantic, rest, result)?;
    let (_, last) = rows_and_last(semantic, epilogue.output);
    let count = tokens.checked_mul(columns / vector).filter(|&count| count <= i32::MAX as u64)?;
    let bytes = vector * dtype(semantic, source).bytes().max(dtype(semantic, epilogue.output).bytes());
    if epilogue.block.is_some() || last != columns || !columns.is_multiple_of(vector) || bytes > 16 || k == 0 {
        return None;
    }
    let integer = |slot| dtype(semantic, slot) == DType::I32;
    if integer(source) || integer(weights) || integer(epilogue.output) {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.constant("VECTOR", vector).constant("COLUMNS", columns).constant("CHOSEN", k);
    builder.constant("GROUPED", u64::from(grouped)).alias("X", dtype(semantic, source));
    builder.pointer("source", source).pointer("weights", weights).pointer("places", places);
    let rows = Rows { made: epilogue.output, count: tokens, columns };
    let (units, blocks, threads) = Norm::share(norm.as_ref(), &mut builder, semantic, &rows, vector)?;
    builder.int("count", units);
    epilogue.declare(&mut builder);
    Some((count, builder.finish(format!("vector={vector}"), [blocks, 1, 1], threads, 0)))
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{BinaryFn, Expr, Instr, Semantic, Slot, TensorType};

    fn combine(tokens: u64, k: u64, n: u64, dtype: DType, grouped: bool, residual: bool) -> Semantic {
        let source = if grouped { vec![tokens * k, n] } else { vec![tokens, k, n] };
        let row = (dtype, vec![tokens, n]);
        let inputs = [(dtype, source), (DType::F32, vec![tokens, k]), (DType::I32, vec![tokens, k]), row.clone()];
        let op = if grouped { Op::GroupedWeightedSum } else { Op::WeightedSum };
        let made = if residual { Slot::Temp(0) } else { Slot::Out(0) };
        let mut body = vec![Instr(op, vec![Slot::In(0), Slot::In(1), Slot::In(2)], vec![made])];
        if !residual {
            return semantic(&inputs[..3], &[row], &[], body);
        }
        let add = vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Add, 0, 1)];
        body.push(Instr(Op::Pointwise(add), vec![Slot::In(3), Slot::Temp(0)], vec![Slot::Out(0)]));
        semantic(&inputs, std::slice::from_ref(&row), std::slice::from_ref(&row), body)
    }

    #[test]
    fn rows_do_not_occur_in_the_text() {
        for grouped in [false, true] {
            let text =
                |tokens| candidates(&WeightedSum, &combine(tokens, 4, 2048, DType::BF16, grouped, true))[0].prelude();
            assert_eq!(text(500), text(8192));
            assert!(text(500).contains("VECTOR = 8"));
        }
        assert_eq!(candidates(&WeightedSum, &combine(1, 4, 2048, DType::BF16, true, true))[0].config, "vector=1");
        write_text(&WeightedSum, &combine(500, 4, 2048, DType::BF16, true, true), 0, "residual");
        write_text(&WeightedSum, &combine(500, 4, 2048, DType::F32, false, false), 0, "plain");
        write_text(&WeightedSum, &combine(5, 11, 7, DType::F16, true, true), 0, "odd");
    }

    /// The same, and the norm of its result.
    fn normed(tokens: u64, n: u64, dtype: DType, weight: DType) -> Semantic {
        let mut semantic = combine(tokens, 4, n, dtype, true, true);
        semantic.inputs.push(TensorType(weight, vec![n]));
        semantic.outputs.push(TensorType(dtype, vec![tokens, n]));
        semantic.body.push(Instr(Op::RmsNorm { eps: 1e-5 }, vec![Slot::Out(0), Slot::In(4)], vec![Slot::Out(1)]));
        semantic
    }

    #[test]
    fn a_norm_takes_whole_rows() {
        let found = candidates(&WeightedSum, &normed(500, 2048, DType::BF16, DType::BF16));
        let first = &found[0];
        assert_eq!((first.config.as_str(), first.launch.grid[0], first.launch.block), ("vector=8", 500, 256));
        assert_eq!(
            first.prelude(),
            candidates(&WeightedSum, &normed(8192, 2048, DType::BF16, DType::BF16))[0].prelude()
        );
        // Rows of a weight of f32 are as wide as a thread can load, and rows of odd lengths have idle threads.
        let shapes = |semantic| -> Vec<u32> {
            candidates(&WeightedSum, &semantic).iter().map(|found| found.launch.block).collect()
        };
        assert_eq!(shapes(normed(500, 2048, DType::BF16, DType::F32)), [512, 1024]);
        assert_eq!(shapes(normed(500, 7, DType::F32, DType::F32)), [32]);
        assert!(shapes(normed(500, 1 << 14, DType::BF16, DType::BF16)).is_empty(), "more columns than threads have");
        let mut heads = normed(500, 64, DType::BF16, DType::BF16);
        heads.inputs[4].1 = vec![16];
        assert!(candidates(&WeightedSum, &heads).is_empty(), "norms of parts of a row");
        let mut before = normed(500, 64, DType::BF16, DType::BF16);
        before.body[2].1[0] = Slot::In(3);
        assert!(candidates(&WeightedSum, &before).is_empty(), "the norm of something else");
        write_text(&WeightedSum, &normed(500, 2048, DType::BF16, DType::BF16), 0, "norm");
        write_text(&WeightedSum, &normed(5, 7, DType::F32, DType::BF16), 0, "odd_norm");
    }

    #[test]
    fn an_odd_width_goes_element_by_element_and_another_rest_is_not_taken() {
        let mut odd = combine(3, 2, 7, DType::F32, true, true);
        assert_eq!(candidates(&WeightedSum, &odd).len(), 1);
        odd.body[1].1[1] = Slot::In(0);
        assert!(candidates(&WeightedSum, &odd).is_empty(), "the sum's rows do not fit the result");
        assert!(candidates(&WeightedSum, &combine(3, 2, 7, DType::I32, true, false)).is_empty());
    }
}
