//! `kernels/row_sum.cu`: sums of rows, a thread each.

use super::builder::{Builder, Specialised};
use super::hopper::PROCESSORS;
use super::pattern::{args, dtype, only, results, rows_and_last};
use super::{Problem, Twin};
use crate::plan::{Instr, Op};

/// The twin.
pub struct RowSum;

const THREADS: u32 = 128;
const MOST_BLOCKS: u64 = PROCESSORS * 16;

impl Twin for RowSum {
    fn name(&self) -> &'static str {
        "row_sum"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/row_sum.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        specialise(problem).into_iter().collect()
    }
}

fn specialise(problem: &Problem) -> Option<Specialised> {
    let instr @ Instr(Op::RowSum, ..) = only(problem.semantic)? else { return None };
    let ([x], [y]) = (args(instr)?, results(instr)?);
    let (rows, columns) = rows_and_last(problem.semantic, x);
    let mut builder = Builder::new(problem);
    builder.constant("COLUMNS", columns).alias("Y", dtype(problem.semantic, y));
    builder.pointer("y", y).pointer("x", x).int("rows", rows);
    let blocks = rows.div_ceil(u64::from(THREADS)).min(MOST_BLOCKS);
    Some(builder.finish("", [blocks, 1, 1], THREADS, 0))
}
