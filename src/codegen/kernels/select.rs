//! `kernels/top_k.cu` and `kernels/gather_columns.cu`: the choice of columns, and the elements chosen.

use super::builder::{Builder, Specialised};
use super::hopper::PROCESSORS;
use super::pattern::{args, dims, dtype, only, results};
use super::{Problem, Twin};
use crate::plan::{DType, Instr, Op};

/// The twin of `top_k.cu`: a warp has a row.
pub struct TopK;

/// The twin of `gather_columns.cu`: a thread has an element.
pub struct GatherColumns;

const THREADS: u32 = 256;
const MOST_BLOCKS: u64 = PROCESSORS * 16;

impl Twin for TopK {
    fn name(&self) -> &'static str {
        "top_k"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/top_k.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        top_k(problem).into_iter().collect()
    }
}

fn top_k(problem: &Problem) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr @ Instr(Op::TopK, ..) = only(semantic)? else { return None };
    let ([scores, slot], [chosen]) = (args(instr)?, results(instr)?);
    let ([rows, columns], [_, k]) = (dims(semantic, scores)?, dims(semantic, chosen)?);
    if dtype(semantic, scores) == DType::I32 || k > columns {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.constant("COLUMNS", columns).constant("CHOSEN", k);
    builder.pointer("chosen", chosen).pointer("scores", scores).pointer("slot", slot).int("rows", rows);
    Some(builder.finish("", [rows.div_ceil(u64::from(THREADS / 32)), 1, 1], THREADS, 0))
}

impl Twin for GatherColumns {
    fn name(&self) -> &'static str {
        "gather_columns"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/gather_columns.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        gather_columns(problem).into_iter().collect()
    }
}

fn gather_columns(problem: &Problem) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr @ Instr(Op::GatherColumns, ..) = only(semantic)? else { return None };
    let ([x, columns], [y]) = (args(instr)?, results(instr)?);
    let ([_, width], [rows, k]) = (dims(semantic, x)?, dims(semantic, y)?);
    let count = rows.checked_mul(k).filter(|&count| count <= i32::MAX as u64)?;
    let mut builder = Builder::new(problem);
    builder.constant("COLUMNS", width).constant("CHOSEN", k).alias("Y", dtype(semantic, y));
    builder.pointer("y", y).pointer("x", x).pointer("columns", columns).int("count", count);
    let blocks = count.div_ceil(u64::from(THREADS)).min(MOST_BLOCKS);
    Some(builder.finish("", [blocks, 1, 1], THREADS, 0))
}

#[cfg(test)]
mod tests {
    use super::super::row_sum::RowSum;
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{Semantic, Slot};

    fn top(rows: u64, columns: u64, k: u64) -> Semantic {
        let body = vec![Instr(Op::TopK, vec![Slot::In(0), Slot::In(1)], vec![Slot::Out(0)])];
        let inputs = [(DType::F32, vec![rows, columns]), (DType::I32, vec![rows])];
        semantic(&inputs, &[(DType::I32, vec![rows, k])], &[], body)
    }

    #[test]
    fn rows_do_not_occur_in_the_texts() {
        let text = |rows| candidates(&TopK, &top(rows, 32, 4))[0].prelude();
        assert_eq!(text(1), text(900));
        write_text(&TopK, &top(9, 32, 4), 0, "32");
        write_text(&TopK, &top(9, 3000, 40), 0, "3000");
    }

    #[test]
    fn one_operator_alone_is_taken() {
        let mut two = top(4, 8, 2);
        two.body.push(two.body[0].clone());
        assert!(candidates(&TopK, &two).is_empty());
        assert!(candidates(&GatherColumns, &top(4, 8, 2)).is_empty());
    }

    #[test]
    fn columns_of_each_float_type_are_gathered_and_summed() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let body = vec![Instr(Op::GatherColumns, vec![Slot::In(0), Slot::In(1)], vec![Slot::Out(0)])];
            let inputs = [(dtype, vec![5, 9]), (DType::I32, vec![5, 3])];
            let gather = semantic(&inputs, &[(dtype, vec![5, 3])], &[], body);
            assert_eq!(candidates(&GatherColumns, &gather).len(), 1);
            write_text(&GatherColumns, &gather, 0, &format!("{dtype:?}"));
            let body = vec![Instr(Op::RowSum, vec![Slot::In(0)], vec![Slot::Out(0)])];
            let sum = semantic(&[(dtype, vec![5, 2, 9])], &[(dtype, vec![5, 2, 1])], &[], body);
            assert_eq!(candidates(&RowSum, &sum).len(), 1);
            write_text(&RowSum, &sum, 0, &format!("{dtype:?}"));
        }
    }
}
