//! `kernels/split.cu`: the parts of the last axis, one after the other or interleaved; where each goes is generated code.

use std::fmt::Write;

use super::builder::{Builder, Specialised};
use super::pattern::{args, dtype, only, rows_and_last, ty};
use super::{Problem, Twin, blocks};
use crate::plan::{Op, Slot};

/// The twin.
pub struct Split;

const THREADS: u32 = 256;
/// Parameters of a kernel are 4 KiB.
const MOST_PARTS: usize = 256;

impl Twin for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/split.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        specialise(problem).into_iter().collect()
    }
}

fn specialise(problem: &Problem) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr = only(semantic)?;
    let (Op::Split { block }, [x @ Slot::In(_)], parts) = (&instr.0, args(instr)?, &instr.2) else { return None };
    let (rows, columns) = rows_and_last(semantic, x);
    let sizes: Vec<u64> = parts.iter().map(|&part| rows_and_last(semantic, part).1).collect();
    let whole = |part: &Slot| {
        let outer = ty(semantic, *part).1.split_last().map(|(_, outer)| outer);
        let same = outer == ty(semantic, x).1.split_last().map(|(_, outer)| outer);
        matches!(part, Slot::Out(_)) && same && dtype(semantic, *part) == dtype(semantic, x)
    };
    if parts.len() > MOST_PARTS || sizes.iter().sum::<u64>() != columns || !parts.iter().all(whole) {
        return None;
    }
    if let Some(block) = *block
        && (block == 0 || sizes.iter().any(|&size| size != sizes[0] || size % block != 0))
    {
        return None;
    }
    if rows.max(columns) > i32::MAX as u64 || columns == 0 {
        return None;
    }
    let pieces = || sizes.iter().copied().chain(*block);
    let widest = 16 / dtype(semantic, x).bytes();
    let vector = [8, 4, 2, 1].into_iter().find(|&n| n <= widest && pieces().all(|size| size.is_multiple_of(n)))?;

    let mut builder = Builder::new(problem);
    builder.constant("COLUMNS", columns).constant("VECTOR", vector).alias("T", dtype(semantic, x));
    builder.pointer("x", x).int("rows", rows);
    let (mut formal, mut actual) = (String::new(), String::new());
    for (i, &part) in parts.iter().enumerate() {
        builder.pointer(&format!("y{i}"), part);
        write!(formal, ", T* y{i}").expect("writing to a String");
        write!(actual, ", y{i}").expect("writing to a String");
    }
    let body = match *block {
        None => successive(&sizes),
        Some(block) => interleaved(sizes[0], sizes.len(), block),
    };
    builder.line(format_args!("__device__ __forceinline__ T* place(i64 row, int column{formal}) {{\n{body}}}"));
    builder.line(format_args!("#define PLACE(row, column) place(row, column{actual})"));
    Some(builder.finish("", [blocks(rows * (columns / vector), THREADS), 1, 1], THREADS, 0))
}

fn successive(sizes: &[u64]) -> String {
    let (mut body, mut start) = (String::new(), 0);
    for (i, size) in sizes.iter().enumerate() {
        let end = start + size;
        let condition = if i + 1 < sizes.len() { format!("if (column < {end}) ") } else { String::new() };
        writeln!(body, "    {condition}return y{i} + row * {size} + (column - {start});").expect("writing to a String");
        start = end;
    }
    body
}

fn interleaved(size: u64, parts: usize, block: u64) -> String {
    let mut body = format!(
        "    int turn = column / {block};\n    \
         i64 at = row * {size} + turn / {parts} * {block} + column % {block};\n    \
         switch (turn % {parts}) {{\n"
    );
    for i in 0..parts - 1 {
        writeln!(body, "    case {i}: return y{i} + at;").expect("writing to a String");
    }
    writeln!(body, "    default: return y{} + at;\n    }}", parts - 1).expect("writing to a String");
    body
}

#[cfg(test)]
mod tests {
    use super::super::testing::{dump, instr, semantic, ty};
    use super::*;
    use crate::plan::{DType, Phase, Semantic};

    fn split(dtype: DType, rows: &[u64], sizes: &[u64], block: Option<u64>) -> Semantic {
        let part = |size: u64| ty(dtype, &[rows, &[size]].concat());
        let outs: Vec<Slot> = (0..sizes.len() as u32).map(Slot::Out).collect();
        let types = (vec![part(sizes.iter().sum())], sizes.iter().map(|&size| part(size)).collect());
        semantic(types, vec![], vec![instr(Op::Split { block }, &[Slot::In(0)], &outs)])
    }

    fn candidates(semantic: &Semantic) -> Vec<Specialised> {
        Split.candidates(&Problem { semantic, phase: Phase::Prefill })
    }

    #[test]
    fn parts_of_any_number_and_size() {
        for (dtype, rows, sizes, block, vector) in [
            (DType::BF16, &[64][..], &[2048, 512, 512][..], None, 8),
            (DType::BF16, &[64, 4], &[1792, 1792], Some(8), 8),
            (DType::F32, &[3], &[10, 10, 10], Some(5), 1),
            (DType::I32, &[3], &[10, 0, 4], None, 2),
            (DType::F16, &[], &[6], Some(2), 2),
        ] {
            let semantic = split(dtype, rows, sizes, block);
            dump(&Split, &semantic, Phase::Prefill);
            let text = candidates(&semantic)[0].prelude();
            assert!(text.contains(&format!("VECTOR = {vector};")), "{text}");
        }
    }

    #[test]
    fn places_are_generated() {
        let text = candidates(&split(DType::BF16, &[3], &[16, 8], None))[0].prelude();
        assert!(
            text.contains("if (column < 16) return y0 + row * 16 + (column - 0);\n    return y1 + row * 8"),
            "{text}"
        );
        let text = candidates(&split(DType::BF16, &[3], &[16, 16], Some(8)))[0].prelude();
        assert!(text.contains("turn / 2 * 8 + column % 8") && text.contains("default: return y1 + at;"), "{text}");
    }

    #[test]
    fn other_types_and_values_that_stay_inside_do_not_match() {
        let mut converted = split(DType::BF16, &[3], &[8, 8], None);
        converted.outputs[1].0 = DType::F32;
        assert!(candidates(&converted).is_empty());
        let mut inside = split(DType::BF16, &[3], &[8, 8], None);
        inside.temps = vec![inside.outputs[1].clone()];
        inside.body[0].2[1] = Slot::Temp(0);
        assert!(candidates(&inside).is_empty());
        assert!(candidates(&split(DType::BF16, &[3], &[8, 16], Some(8))).is_empty());
    }

    #[test]
    fn buckets_share_the_kernel() {
        let text = |rows| candidates(&split(DType::BF16, &[rows], &[2048, 512, 512], None))[0].prelude();
        assert_eq!(text(1), text(8192));
    }
}
