//! `attention_prefill`: attention of packed rows on tensor cores.

use super::builder::{Builder, Specialised};
use super::heads::{Attend, same_half};
use super::hopper::PROCESSORS;
use super::pattern::{dtype, only};
use super::{Problem, Twin};
use crate::plan::{Phase, Slot};

/// The twin.
pub struct AttentionPrefill;

/// A way to divide the work: sixteens of lines a warp, warps, positions at a time.
type Shape = (u64, u64, u64);
/// Query heads of a KV head in one block: more would leave few rows to a block.
const MOST_SHARE: u64 = 16;
/// Blocks from which on larger tiles pay.
const ENOUGH_BLOCKS: u64 = PROCESSORS * 2;

impl Twin for AttentionPrefill {
    fn name(&self) -> &'static str {
        "attention_prefill"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/attention_prefill.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let large = [(2, 4, 32), (1, 8, 64), (1, 4, 64), (2, 8, 32)];
        let small = [(1, 4, 64), (2, 4, 32), (1, 8, 64), (2, 8, 32)];
        let found = |shapes: [Shape; 4]| -> Vec<Specialised> {
            shapes.into_iter().filter_map(|shape| specialise(problem, shape)).collect()
        };
        let list = found(large);
        match list.first() {
            Some(first) if u64::from(first.launch.grid[0]) < ENOUGH_BLOCKS => found(small),
            _ => list,
        }
    }
}

fn specialise(problem: &Problem, (tiles, warps, keys): Shape) -> Option<Specialised> {
    let semantic = problem.semantic;
    let attend = Attend::of(semantic, only(semantic)?)?;
    let (Slot::In(_), head) = (attend.q, attend.cache.head) else { return None };
    let half = same_half(dtype(semantic, attend.q), dtype(semantic, attend.cache.kv))?;
    let fits = head.is_multiple_of(16) && head <= if tiles == 1 { 128 } else { 64 };
    if !fits || problem.phase == Phase::Decode || attend.scale <= 0.0 {
        return None;
    }
    let share = attend.share(MOST_SHARE)?;
    let rows = 16 * tiles * warps / share;
    let blocks = attend.rows.div_ceil(rows) * attend.cache.kv_heads * (attend.group() / share);
    if blocks > i32::MAX as u64 {
        return None;
    }
    let mut builder = Builder::new(problem);
    attend.constants(&mut builder, share);
    // Scores count in powers of two.
    // Blocks of one multiprocessor for which there are registers, without spilling any.
    let resident = match (tiles, warps) {
        (1, 4) if head <= 64 => 4,
        (1, 4) => 2,
        (2, 4) => 3,
        _ => 1,
    };
    builder
        .constant("KEYS", keys)
        .constant("BLOCKS", resident)
        .constant("TILES", tiles)
        .number("SCALE", attend.scale * std::f32::consts::LOG2_E);
    builder.line(format_args!("typedef {half} T;")).pointer("q", attend.q);
    attend.cache.parameters(&mut builder, false);
    builder.pointer("y", attend.y).int("rows", attend.rows);
    let shared = (2 * 2 * keys + 16 * tiles * warps) * (head + 8) * 2;
    Some(builder.finish(format!("tiles={tiles} warps={warps}"), [blocks, 1, 1], warps as u32 * 32, shared))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::kernels::heads::testing::{decode, problem, sizes};
    use crate::plan::{DType, Semantic};

    fn configs(semantic: &Semantic) -> Vec<String> {
        AttentionPrefill.candidates(&problem(semantic)).into_iter().map(|found| found.config).collect()
    }

    #[test]
    fn larger_tiles_where_rows_are_many() {
        assert_eq!(configs(&sizes(DType::BF16).rows(64).attention())[0], "tiles=1 warps=4");
        assert_eq!(configs(&sizes(DType::BF16).rows(8192).attention())[0], "tiles=2 warps=4");
        assert_eq!(configs(&sizes(DType::F16).head(128).attention()), ["tiles=1 warps=4", "tiles=1 warps=8"]);
    }

    #[test]
    fn one_text_for_all_rows_of_a_size_of_tile() {
        let text =
            |rows| AttentionPrefill.candidates(&problem(&sizes(DType::BF16).rows(rows).attention()))[0].prelude();
        assert_eq!(text(1), text(64));
        assert_eq!(text(4096), text(8192));
    }

    #[test]
    fn nothing_that_tensor_cores_do_not_multiply() {
        assert!(configs(&sizes(DType::F32).attention()).is_empty());
        assert!(configs(&sizes(DType::BF16).head(40).attention()).is_empty());
        assert!(configs(&sizes(DType::BF16).head(256).attention()).is_empty());
        assert!(configs(&sizes(DType::BF16).fused()).is_empty());
        let mut mixed = sizes(DType::BF16).attention();
        mixed.inputs[1].0 = DType::F16;
        assert!(configs(&mixed).is_empty(), "queries and cache of different types");
        assert!(AttentionPrefill.candidates(&decode(&sizes(DType::BF16).attention())).is_empty());
    }
}
