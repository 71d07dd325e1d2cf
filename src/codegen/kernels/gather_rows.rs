//! `kernels/gather_rows.cu`: rows of a table by index, for an embedding, a choice of rows, or tokens in the order of their experts.

use super::builder::{Builder, Specialised};
use super::pattern::{args, dims, dtype, only, results};
use super::{Problem, Twin, blocks};
use crate::plan::{DType, Op, Slot};

/// The twin.
pub struct GatherRows;

const THREADS: u32 = 256;

impl Twin for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/gather_rows.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        specialise(problem).into_iter().collect()
    }
}

fn specialise(problem: &Problem) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr = only(semantic)?;
    let ([first, second], [y @ Slot::Out(_)]) = (args(instr)?, results(instr)?) else { return None };
    let (x, rows, each) = match instr.0 {
        Op::Embed => (second, first, 1),
        Op::GatherRows => (first, second, 1),
        Op::GatherPairs { k } => (first, second, k),
        _ => return None,
    };
    let ([x_rows, columns], [count]) = (dims(semantic, x)?, dims(semantic, rows)?);
    let (from, to) = (dtype(semantic, x), dtype(semantic, y));
    let integers = (from == DType::I32) != (to == DType::I32) || dtype(semantic, rows) != DType::I32;
    if integers || dims(semantic, y) != Some([count, columns]) || columns == 0 || [x, rows].iter().any(made_here) {
        return None;
    }
    if [x_rows, count, columns, each].iter().any(|&n| n > i32::MAX as u64) || each == 0 {
        return None;
    }
    let widest = 16 / from.bytes().max(to.bytes());
    let vector = [8, 4, 2, 1].into_iter().find(|&n| n <= widest && columns.is_multiple_of(n))?;
    let mut builder = Builder::new(problem);
    builder
        .constant("COLUMNS", columns)
        .constant("VECTOR", vector)
        .constant("EACH", each)
        .alias("X", from)
        .alias("Y", to);
    builder.pointer("y", y).pointer("x", x).pointer("rows", rows).int("count", count).int("x_rows", x_rows);
    Some(builder.finish("", [blocks(count * (columns / vector), THREADS), 1, 1], THREADS, 0))
}

fn made_here(slot: &Slot) -> bool {
    !matches!(slot, Slot::In(_))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{dump, instr, semantic, ty};
    use super::*;
    use crate::plan::{Phase, Semantic};

    fn gather(op: Op, x: DType, y: DType, rows: u64, columns: u64) -> Semantic {
        let (table, index) = (ty(x, &[500, columns]), ty(DType::I32, &[rows]));
        let inputs = if op == Op::Embed { vec![index, table] } else { vec![table, index] };
        let body = vec![instr(op, &[Slot::In(0), Slot::In(1)], &[Slot::Out(0)])];
        semantic((inputs, vec![ty(y, &[rows, columns])]), vec![], body)
    }

    fn candidates(semantic: &Semantic) -> Vec<Specialised> {
        GatherRows.candidates(&Problem { semantic, phase: Phase::Prefill })
    }

    #[test]
    fn embeddings_and_gathers_of_any_type_and_width() {
        for (op, x, y, columns, vector) in [
            (Op::Embed, DType::BF16, DType::BF16, 2048, 8),
            (Op::Embed, DType::BF16, DType::F32, 2048, 4),
            (Op::GatherRows, DType::F16, DType::F16, 7, 1),
            (Op::GatherRows, DType::I32, DType::I32, 6, 2),
            (Op::GatherPairs { k: 3 }, DType::BF16, DType::BF16, 72, 8),
        ] {
            let semantic = gather(op, x, y, 33, columns);
            dump(&GatherRows, &semantic, Phase::Prefill);
            let text = candidates(&semantic)[0].prelude();
            assert!(text.contains(&format!("VECTOR = {vector};")), "{text}");
        }
    }

    #[test]
    fn other_wiring_and_types_do_not_match() {
        assert!(candidates(&gather(Op::GatherRows, DType::I32, DType::F32, 3, 8)).is_empty());
        let mut swapped = gather(Op::Embed, DType::BF16, DType::BF16, 3, 8);
        swapped.body[0].1.reverse();
        assert!(candidates(&swapped).is_empty());
    }

    #[test]
    fn buckets_share_the_kernel() {
        let text = |rows| candidates(&gather(Op::Embed, DType::BF16, DType::BF16, rows, 2048))[0].prelude();
        assert_eq!(text(1), text(8192));
    }
}
