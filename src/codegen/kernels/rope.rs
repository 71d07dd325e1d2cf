//! `rope`: the rotary embedding by itself, of any size.

use super::builder::{Builder, Specialised};
use super::heads::declare_frequencies;
use super::hopper::PROCESSORS;
use super::pattern::{args, dtype, only, results, rows_and_last};
use super::{Problem, Twin};
use crate::plan::{DType, Op, Slot};

/// The twin.
pub struct Rope;

const THREADS: u32 = 256;
const MOST_BLOCKS: u64 = PROCESSORS * 16;

impl Twin for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/rope.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        specialise(problem).into_iter().collect()
    }
}

fn specialise(problem: &Problem) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr = only(semantic)?;
    let Op::Rope { theta, head_dim } = instr.0 else { return None };
    let ([x @ Slot::In(_), pos @ Slot::In(_)], [y @ Slot::Out(_)]) = (args(instr)?, results(instr)?) else {
        return None;
    };
    let (rows, width) = rows_and_last(semantic, x);
    let halves = head_dim > 0 && head_dim.is_multiple_of(2) && width.is_multiple_of(head_dim);
    let typed = dtype(semantic, pos) == DType::I32 && dtype(semantic, x) != DType::I32;
    if !halves || !typed || rows_and_last(semantic, y) != (rows, width) {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.constant("WIDTH", width).constant("HALF", head_dim / 2).alias("Y", dtype(semantic, y));
    declare_frequencies(&mut builder, theta, head_dim);
    builder.pointer("x", x).pointer("pos", pos).pointer("y", y).int("rows", rows);
    let blocks = (rows * width / 2).div_ceil(u64::from(THREADS)).min(MOST_BLOCKS);
    Some(builder.finish("", [blocks, 1, 1], THREADS, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::kernels::heads::testing::{problem, sizes};
    use crate::plan::{Instr, Semantic, TensorType};

    fn semantic(rows: u64, head_dim: u64) -> Semantic {
        Semantic {
            name: "rope".into(),
            inputs: vec![TensorType(DType::F16, vec![rows, 24]), TensorType(DType::I32, vec![rows])],
            outputs: vec![TensorType(DType::F32, vec![rows, 24])],
            temps: vec![],
            body: vec![Instr(Op::Rope { theta: 1e6, head_dim }, vec![Slot::In(0), Slot::In(1)], vec![Slot::Out(0)])],
        }
    }

    #[test]
    fn any_head_of_two_halves_in_one_text_for_all_rows() {
        for head_dim in [2, 6, 24] {
            let texts: Vec<String> = [1, 700]
                .map(|rows| Rope.candidates(&problem(&semantic(rows, head_dim)))[0].prelude())
                .into_iter()
                .collect();
            assert_eq!(texts[0], texts[1]);
        }
        assert!(Rope.candidates(&problem(&semantic(3, 16))).is_empty(), "heads of 16 in rows of 24");
    }

    #[test]
    fn frequencies_are_those_of_the_executor() {
        let text = Rope.candidates(&problem(&semantic(1, 6)))[0].prelude();
        let second = 1.0 / 1e6f32.powf(2.0 / 6.0);
        assert!(text.contains(&format!("FREQUENCIES[3] = {{1e0f, {second:e}f, ")), "{text}");
    }

    #[test]
    fn nothing_else_matches() {
        let fused = sizes(DType::BF16).fused();
        assert!(Rope.candidates(&problem(&fused)).is_empty());
        let mut wrong = semantic(3, 6);
        wrong.inputs[1].0 = DType::F32;
        assert!(Rope.candidates(&problem(&wrong)).is_empty());
    }
}
