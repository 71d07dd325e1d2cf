//! `kernels/block_sum.cu`: the sum of what ranks have of the same rows, what follows it elementwise, and the RMSNorm of that.

use super::builder::{Builder, Specialised, by_width};
use super::expression::Epilogue;
use super::normed::{Norm, Rows};
use super::pattern::{args, dims, dtype, is_float, results, rows_and_last};
use super::{Problem, Twin};
use crate::plan::{Instr, Op};

/// The twin.
pub struct BlockSum;

impl Twin for BlockSum {
    fn name(&self) -> &'static str {
        "block_sum"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/block_sum.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        by_width(|vector| specialise(problem, vector))
    }
}

/// With the number of threads that have something to do.
fn specialise(problem: &Problem, vector: u64) -> Option<(u64, Specialised)> {
    let semantic = problem.semantic;
    let (norm, body) = Norm::split(&semantic.body);
    let (sum @ Instr(Op::BlockSum { blocks }, ..), rest) = body.split_first()? else { return None };
    let ([x], [result]) = (args(sum)?, results(sum)?);
    let [rows, columns] = dims(semantic, result)?;
    let epilogue = Epilogue::new(semantic, rest, result)?;
    let (_, last) = rows_and_last(semantic, epilogue.output);
    let count = rows.checked_mul(columns / vector).filter(|&count| count <= i32::MAX as u64)?;
    let bytes = vector * dtype(semantic, x).bytes().max(dtype(semantic, epilogue.output).bytes());
    if epilogue.block.is_some() || last != columns || !columns.is_multiple_of(vector) || bytes > 16 || *blocks == 0 {
        return None;
    }
    if !is_float(semantic, x) || !is_float(semantic, epilogue.output) {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.constant("VECTOR", vector).constant("COLUMNS", columns).constant("BLOCKS", *blocks);
    builder.alias("X", dtype(semantic, x)).pointer("x", x);
    let made = Rows { made: epilogue.output, count: rows, columns };
    let (units, blocks, threads) = Norm::share(norm.as_ref(), &mut builder, semantic, &made, vector)?;
    builder.int("count", units);
    epilogue.declare(&mut builder);
    Some((count, builder.finish(format!("vector={vector}"), [blocks, 1, 1], threads, 0)))
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{BinaryFn, DType, Expr, Semantic, Slot, TensorType};

    fn sum(rows: u64, blocks: u64, columns: u64, dtype: DType, residual: bool) -> Semantic {
        let row = (dtype, vec![rows, columns]);
        let inputs = [(dtype, vec![blocks * rows, columns]), row.clone()];
        let made = if residual { Slot::Temp(0) } else { Slot::Out(0) };
        let mut body = vec![Instr(Op::BlockSum { blocks }, vec![Slot::In(0)], vec![made])];
        if !residual {
            return semantic(&inputs[..1], &[row], &[], body);
        }
        let add = vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Add, 0, 1)];
        body.push(Instr(Op::Pointwise(add), vec![Slot::In(1), Slot::Temp(0)], vec![Slot::Out(0)]));
        semantic(&inputs, std::slice::from_ref(&row), std::slice::from_ref(&row), body)
    }

    #[test]
    fn rows_do_not_occur_in_the_text() {
        let found = |rows| candidates(&BlockSum, &sum(rows, 2, 2048, DType::BF16, true)).swap_remove(0);
        assert_eq!(found(500).prelude(), found(8192).prelude());
        assert_eq!((found(500).config.as_str(), found(1).config.as_str()), ("vector=8", "vector=1"));
        write_text(&BlockSum, &sum(500, 2, 2048, DType::BF16, true), 0, "residual");
        write_text(&BlockSum, &sum(5, 11, 2048, DType::F32, false), 0, "eleven");
        write_text(&BlockSum, &sum(5, 3, 7, DType::F16, true), 0, "odd");
    }

    #[test]
    fn a_norm_takes_whole_rows() {
        let normed = |rows, columns| {
            let mut semantic = sum(rows, 2, columns, DType::BF16, true);
            semantic.inputs.push(TensorType(DType::BF16, vec![columns]));
            semantic.outputs.push(TensorType(DType::BF16, vec![rows, columns]));
            semantic.body.push(Instr(Op::RmsNorm { eps: 1e-5 }, vec![Slot::Out(0), Slot::In(2)], vec![Slot::Out(1)]));
            semantic
        };
        let found = candidates(&BlockSum, &normed(500, 2048)).swap_remove(0);
        assert_eq!((found.config.as_str(), found.launch.grid[0], found.launch.block), ("vector=8", 500, 256));
        assert!(candidates(&BlockSum, &normed(500, 1 << 14)).is_empty(), "more columns than threads have");
        let mut other = normed(500, 2048);
        other.body[2].1[0] = Slot::In(1);
        assert!(candidates(&BlockSum, &other).is_empty(), "the norm of something else");
        write_text(&BlockSum, &normed(500, 2048), 0, "norm");
    }

    #[test]
    fn what_is_no_sum_of_numbers_is_not_taken() {
        assert!(candidates(&BlockSum, &sum(4, 2, 8, DType::I32, false)).is_empty());
        let mut other = sum(4, 2, 8, DType::F32, true);
        other.body.reverse();
        assert!(candidates(&BlockSum, &other).is_empty());
    }
}
