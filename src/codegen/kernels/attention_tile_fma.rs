//! `attention_tile_fma`: attention of packed rows in f32 arithmetic.

use super::builder::{Builder, Specialised};
use super::heads::Attend;
use super::hopper::{ALL_SHARED, MOST_SHARED, PROCESSORS, SYSTEM_SHARED};
use super::pattern::{dtype, only};
use super::{Problem, Twin};
use crate::plan::{DType, Phase, Slot};

/// The twin where there are rows for the whole device, and the one where there are not: as a block goes through all positions of
/// its rows, the kernel that deals rows out one by one comes before.
pub static MANY: AttentionTileFma = AttentionTileFma { many: true };
/// See [`MANY`].
pub static FEW: AttentionTileFma = AttentionTileFma { many: false };

/// The twin, for many rows or for few.
pub struct AttentionTileFma {
    many: bool,
}

/// Query heads of a KV head in one block: more would leave few rows to a block.
const MOST_SHARE: u64 = 16;
/// Positions at a time.
const KEYS: u64 = 64;
/// Lanes of a warp below each other, and beside each other, as in the source.
const DOWN: u64 = 4;
const ACROSS: u64 = 8;
/// Sums of values that a lane holds beside as many scores.
const MOST_SUMS: u64 = 64;
/// Blocks of the smallest tiles from which on rows are many, and those of the larger from which on these pay.
const MANY_BLOCKS: u64 = 100;
const ENOUGH_BLOCKS: u64 = PROCESSORS * 2;

/// A way to divide the work.
#[derive(Clone, Copy)]
struct Shape {
    /// Lines of a lane.
    lines: u64,
    warps: u64,
    /// Blocks on a multiprocessor that registers are left for, if its memory holds them.
    resident: u64,
}

const TWICE: Shape = Shape { lines: 8, warps: 4, resident: 2 };
const ONCE: Shape = Shape { lines: 8, warps: 8, resident: 1 };
const THRICE_HALF: Shape = Shape { lines: 4, warps: 4, resident: 3 };
const ONCE_HALF: Shape = Shape { lines: 4, warps: 8, resident: 1 };

impl Twin for AttentionTileFma {
    fn name(&self) -> &'static str {
        "attention_tile_fma"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/attention_tile_fma.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(attend) = attend_of(problem) else { return vec![] };
        let blocks = |shape: Shape| shape.blocks(&attend).unwrap_or(0);
        if self.many != (blocks(THRICE_HALF) >= MANY_BLOCKS) {
            return vec![];
        }
        let shapes = match blocks(TWICE) >= ENOUGH_BLOCKS {
            true => [TWICE, ONCE, ONCE_HALF, THRICE_HALF],
            false => [THRICE_HALF, TWICE, ONCE_HALF, ONCE],
        };
        shapes.iter().filter_map(|shape| shape.specialise(problem, &attend)).collect()
    }
}

/// The attention, if the kernel computes it.
fn attend_of(problem: &Problem) -> Option<Attend> {
    let semantic = problem.semantic;
    let attend = Attend::of(semantic, only(semantic)?)?;
    let Slot::In(_) = attend.q else { return None };
    let exact = dtype(semantic, attend.q) == DType::F32 && dtype(semantic, attend.cache.kv) == DType::F32;
    let fits = exact && attend.cache.head.is_multiple_of(ACROSS) && attend.scale > 0.0;
    (fits && problem.phase != Phase::Decode).then_some(attend)
}

impl Shape {
    /// Lines of a block: its rows times the query heads that share a KV head.
    fn tile(&self) -> u64 {
        DOWN * self.lines * self.warps
    }

    fn blocks(&self, attend: &Attend) -> Option<u64> {
        let share = attend.share(MOST_SHARE)?;
        Some(attend.rows.div_ceil(self.tile() / share) * attend.cache.kv_heads * (attend.group() / share))
    }

    fn specialise(&self, problem: &Problem, attend: &Attend) -> Option<Specialised> {
        let (share, blocks) = (attend.share(MOST_SHARE)?, self.blocks(attend)?);
        let (head, tile) = (attend.cache.head, self.tile());
        // Queries and keys at a pitch of four more, as probabilities, and values; beside them slots and positions.
        let shared = ((tile + KEYS) * (head + 4) + KEYS * head + tile * (KEYS + 4)) * 4;
        let fixed = 2 * (tile / share) * 4;
        let resident = self.resident.min(ALL_SHARED / (shared + fixed + SYSTEM_SHARED));
        let held = self.lines * head / ACROSS <= MOST_SUMS && shared + fixed <= MOST_SHARED && resident > 0;
        if !held || blocks > i32::MAX as u64 {
            return None;
        }
        let mut builder = Builder::new(problem);
        attend.constants(&mut builder, share);
        builder
            .constant("KEYS", KEYS)
            .constant("LINES", self.lines)
            .constant("RESIDENT", resident)
            // Scores count in powers of two.
            .number("SCALE", attend.scale * std::f32::consts::LOG2_E)
            .pointer("q", attend.q);
        attend.cache.parameters(&mut builder, false);
        builder.pointer("y", attend.y).int("rows", attend.rows);
        let config = format!("lines={} warps={}", self.lines, self.warps);
        Some(builder.finish(config, [blocks, 1, 1], self.warps as u32 * 32, shared))
    }
}

#[cfg(test)]
mod tests {
    use super::super::candidates;
    use super::*;
    use crate::codegen::kernels::heads::testing::{Sizes, decode, problem, sizes};
    use crate::codegen::kernels::testing::dump;
    use crate::plan::Semantic;

    fn of(semantic: &Semantic) -> Vec<Specialised> {
        [&FEW, &MANY].into_iter().flat_map(|twin| twin.candidates(&problem(semantic))).collect()
    }

    fn configs(semantic: &Semantic) -> Vec<String> {
        of(semantic).into_iter().map(|found| found.config).collect()
    }

    fn f32s() -> Sizes {
        sizes(DType::F32)
    }

    #[test]
    fn prompts_come_by_tiles_and_few_rows_one_by_one() {
        let first = |rows: u64| {
            let semantic = f32s().rows(rows).attention();
            let names: Vec<String> =
                candidates(&problem(&semantic)).iter().map(super::super::Candidate::name).collect();
            assert_eq!(names.iter().filter(|name| name.starts_with("attention_tile_fma ")).count(), 4, "{names:?}");
            names[0].clone()
        };
        assert_eq!([1, 64].map(first), ["attention_decode warps=4 cluster=1"; 2]);
        assert_eq!([256, 1024].map(first), ["attention_tile_fma lines=4 warps=4"; 2]);
        assert_eq!([2048, 8192].map(first), ["attention_tile_fma lines=8 warps=4"; 2]);
    }

    #[test]
    fn nothing_that_it_does_not_compute() {
        assert!(configs(&sizes(DType::BF16).attention()).is_empty());
        assert!(configs(&f32s().head(60).attention()).is_empty());
        assert!(configs(&f32s().head(136).attention()).is_empty(), "more sums than a lane holds");
        assert!(configs(&f32s().fused()).is_empty());
        let semantic = f32s().rows(2048).attention();
        assert!(MANY.candidates(&decode(&semantic)).is_empty() && FEW.candidates(&decode(&semantic)).is_empty());
        for mixed in 0..2 {
            let mut semantic = f32s().attention();
            semantic.inputs[mixed].0 = DType::BF16;
            assert!(configs(&semantic).is_empty(), "queries and cache of different types");
        }
        let mut wired = f32s().attention();
        wired.body[0].1.swap(1, 2);
        assert!(configs(&wired).is_empty(), "block table as cache");
    }

    #[test]
    fn blocks_on_a_multiprocessor_have_room() {
        for head in (8..=128).step_by(8) {
            for heads in [8, 24, 64, 256] {
                let found = of(&f32s().head(head).heads(heads).attention());
                assert_eq!(found.len(), if head <= 64 { 4 } else { 2 }, "{heads} heads of {head}");
                for found in found {
                    let resident = found.prelude().split_once("RESIDENT = ").expect("it is declared").1[..1].parse();
                    let all =
                        resident.map(|count: u64| count * (u64::from(found.launch.shared) + 8 * 64 + SYSTEM_SHARED));
                    assert!(all.is_ok_and(|all| all <= ALL_SHARED), "{} of {head}", found.config);
                }
            }
        }
    }

    #[test]
    fn one_text_for_all_rows() {
        let texts = |rows| {
            let mut texts: Vec<_> = of(&f32s().rows(rows).attention()).iter().map(Specialised::prelude).collect();
            texts.sort();
            texts
        };
        assert_eq!(texts(1), texts(8192));
    }

    #[test]
    fn texts_for_a_compiler() {
        for head in [8, 16, 40, 64, 96, 128] {
            dump(&MANY, &f32s().rows(8192).head(head).attention(), Phase::Prefill);
        }
        for heads in [8, 24, 256] {
            dump(&MANY, &f32s().rows(8192).heads(heads).attention(), Phase::Prefill);
        }
        for page in [16, 48, 256] {
            let mut semantic = f32s().rows(8192).attention();
            semantic.inputs[1].1[3] = page;
            semantic.outputs[0].0 = DType::BF16;
            dump(&MANY, &semantic, Phase::Prefill);
        }
    }
}
