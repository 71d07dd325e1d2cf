//! `head_rope`: norms of heads, rotary embedding and the cache write as one step, for rows in any number.

use super::builder::{Builder, Specialised};
use super::heads::{Prepared, halves};
use super::{Problem, Twin};
use crate::plan::Slot;

/// The twin.
pub struct HeadRope;

/// Elements of a half that a lane holds.
const MOST_NUMBERS: u64 = 8;

impl Twin for HeadRope {
    fn name(&self) -> &'static str {
        "head_rope"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/head_rope.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let shapes = [(128, 4), (256, 4), (64, 4), (128, 2), (256, 2)];
        let found = shapes.into_iter().filter_map(|(threads, widest)| specialise(problem, threads, widest));
        found.collect()
    }
}

fn specialise(problem: &Problem, threads: u32, widest: u64) -> Option<Specialised> {
    let semantic = problem.semantic;
    let [output] = &semantic.outputs[..] else { return None };
    let prepared = Prepared::of(semantic, Slot::Out(0), 0)?;
    // A lane holds its part of the weights and angles in registers.
    let (vector, lanes) = halves(prepared.half(), widest);
    let other = widest == 4 || vector < halves(prepared.half(), 4).0;
    if prepared.half() > MOST_NUMBERS * lanes || !other {
        return None;
    }
    let mut builder = Builder::new(problem);
    prepared.cache.constants(&mut builder);
    builder.constant("HEADS", prepared.heads).constant("E", vector).constant("LANES", lanes).alias("Y", output.0);
    prepared.declare(&mut builder);
    prepared.cache.parameters(&mut builder, true);
    builder.pointer("y", Slot::Out(0));
    Some(builder.finish(format!("threads={threads} vector={vector}"), [prepared.rows, 1, 1], threads, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::kernels::heads::testing::{problem, sizes};
    use crate::plan::{DType, Instr, Op};

    #[test]
    fn matches_with_and_without_the_split() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let joined = sizes(dtype).prepared();
            let found = HeadRope.candidates(&problem(&joined));
            let text = found[0].prelude();
            assert!(
                text.contains("Q_STRIDE = 3072") && text.contains("V_AT = 2560") && text.contains("HALF = 32"),
                "{text}"
            );
            let text = HeadRope.candidates(&problem(&sizes(dtype).apart()))[0].prelude();
            assert!(text.contains("Q_STRIDE = 2048") && text.contains("V_AT = 0"), "{text}");
        }
    }

    #[test]
    fn one_text_for_all_rows() {
        let text = |rows| HeadRope.candidates(&problem(&sizes(DType::BF16).rows(rows).prepared()))[0].prelude();
        assert_eq!(text(1), text(8192));
    }

    #[test]
    fn odd_halves_go_element_by_element() {
        let found = HeadRope.candidates(&problem(&sizes(DType::BF16).head(6).prepared()));
        assert!(
            found[0].prelude().contains("constexpr int E = 1;\nconstexpr int LANES = 4;"),
            "{}",
            found[0].prelude()
        );
    }

    #[test]
    fn nothing_else_matches() {
        let none = |semantic: &crate::plan::Semantic| HeadRope.candidates(&problem(semantic)).is_empty();
        assert!(none(&sizes(DType::BF16).fused()), "attention in it");
        assert!(none(&sizes(DType::BF16).attention()));
        let mut wrong = sizes(DType::BF16).prepared();
        let position = wrong.body.iter().position(|Instr(op, ..)| matches!(op, Op::Rope { .. })).expect("a rotation");
        wrong.body[position].1[1] = Slot::In(6);
        assert!(none(&wrong), "rotated by slots");
        let mut wrong = sizes(DType::BF16).prepared();
        wrong.body[5].1[1] = Slot::Temp(4);
        assert!(none(&wrong), "normalised keys as values");
        let mut wrong = sizes(DType::BF16).prepared();
        wrong.inputs[1].1 = vec![32];
        assert!(none(&wrong), "norms of half heads");
    }
}
