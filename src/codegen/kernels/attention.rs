//! `attention`: attention over the paged cache, of any size and type.

use super::builder::{Builder, Specialised};
use super::heads::Attend;
use super::hopper::MOST_SHARED;
use super::pattern::only;
use super::{Problem, Twin};
use crate::plan::Slot;

/// The twin.
pub struct Attention;

const THREADS: u32 = 128;
/// Positions that a block works on at a time, as in the source.
const CHUNK: u64 = 32;
/// Shared memory without leave to use more.
const SHARED: u64 = 48 << 10;

impl Twin for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/attention.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        specialise(problem).into_iter().collect()
    }
}

fn specialise(problem: &Problem) -> Option<Specialised> {
    let attend = Attend::of(problem.semantic, only(problem.semantic)?)?;
    let Slot::In(_) = attend.q else { return None };
    // Of each head the query, the sums, scores and three numbers; beside them the static places.
    let each = (2 * attend.cache.head + CHUNK + 3) * 4;
    let share = attend.share((SHARED - CHUNK * 8) / each).or_else(|| attend.share(1))?;
    let shared = each * share;
    let blocks = attend.rows * attend.cache.kv_heads * (attend.group() / share);
    if shared + CHUNK * 8 > MOST_SHARED || blocks > i32::MAX as u64 {
        return None;
    }
    let mut builder = Builder::new(problem);
    attend.constants(&mut builder, share);
    builder.number("SCALE", attend.scale).pointer("q", attend.q);
    attend.cache.parameters(&mut builder, false);
    builder.pointer("y", attend.y);
    Some(builder.finish("", [blocks, 1, 1], THREADS, shared))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::kernels::heads::testing::{problem, sizes};
    use crate::plan::DType;

    #[test]
    fn any_head_in_one_text_for_all_rows() {
        for head in [1, 7, 64, 251, 4096] {
            let text = |rows| {
                let found = Attention.candidates(&problem(&sizes(DType::F16).head(head).rows(rows).attention()));
                found[0].prelude()
            };
            assert_eq!(text(1), text(300), "heads of {head}");
        }
    }

    #[test]
    fn large_groups_are_shared_between_blocks() {
        let found = Attention.candidates(&problem(&sizes(DType::F16).head(256).heads(256).attention()));
        assert!(found[0].prelude().contains("GROUP = 32;\nconstexpr int SHARE = 16;"), "{}", found[0].prelude());
        assert_eq!(found[0].launch.grid, [3 * 8 * 2, 1, 1]);
    }

    #[test]
    fn nothing_else_matches() {
        assert!(Attention.candidates(&problem(&sizes(DType::F16).fused())).is_empty());
        let mut wrong = sizes(DType::F16).attention();
        wrong.body[0].1.swap(1, 2);
        assert!(Attention.candidates(&problem(&wrong)).is_empty(), "block table as cache");
    }
}
