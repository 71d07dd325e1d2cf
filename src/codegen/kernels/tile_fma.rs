//! `kernels/tile_fma.cu`: products of any types and sizes in f32 arithmetic, for what no other kernel takes.

use super::builder::{Builder, Specialised};
use super::hopper::PROCESSORS;
use super::tiles::{BAND_ROWS, Form, Product};
use super::{Problem, Twin};

/// The twin.
pub struct TileFma;

/// Rows and columns of a block and of a thread, the depth of a tile, blocks on a multiprocessor that registers must be left for,
/// and a guess at the part of the full speed.
struct Shape {
    block: [u64; 2],
    thread: [u64; 2],
    depth: u64,
    resident: u64,
    speed: f64,
}

const SHAPES: [Shape; 4] = [
    Shape { block: [128, 128], thread: [8, 8], depth: 8, resident: 2, speed: 0.8 },
    Shape { block: [256, 128], thread: [16, 8], depth: 8, resident: 1, speed: 0.79 },
    Shape { block: [64, 64], thread: [4, 8], depth: 16, resident: 4, speed: 0.5 },
    Shape { block: [16, 32], thread: [1, 8], depth: 32, resident: 4, speed: 0.15 },
];

/// Columns of a block where each row has its own matrix, and its threads.
const PAIR_COLUMNS: u64 = 32;
const PAIR_THREADS: u32 = 256;

impl Twin for TileFma {
    fn name(&self) -> &'static str {
        "tile_fma"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/tile_fma.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(product) = Product::of(problem.semantic) else { return vec![] };
        if let Form::ByPair { .. } = product.form {
            return by_pair(problem, &product).into_iter().collect();
        }
        let mut shapes: Vec<&Shape> = SHAPES.iter().collect();
        shapes.sort_by(|a, b| a.cost(&product).total_cmp(&b.cost(&product)));
        shapes.iter().filter_map(|shape| shape.specialise(problem, &product)).collect()
    }
}

/// What every specialisation starts with.
fn declare<'a>(problem: &'a Problem<'a>, product: &Product) -> Builder<'a> {
    let mut builder = Builder::new(problem);
    builder.constant("VECTOR", if product.k.is_multiple_of(4) { 4 } else { 1 });
    builder.constant("BLOCK", product.epilogue.block.unwrap_or(1));
    product.declare(&mut builder);
    builder
}

fn by_pair(problem: &Problem, product: &Product) -> Option<Specialised> {
    let blocks = product.rows * (product.n / product.halves()).div_ceil(PAIR_COLUMNS);
    let mut builder = declare(problem, product);
    builder.constant("BN", PAIR_COLUMNS);
    let fits = blocks <= i32::MAX as u64;
    fits.then(|| builder.finish(format!("columns={PAIR_COLUMNS}"), [blocks, 1, 1], PAIR_THREADS, 0))
}

impl Shape {
    /// Blocks, at the most.
    fn blocks(&self, product: &Product) -> u64 {
        product.row_tiles(self.block[0]) * product.n.div_ceil(self.block[1])
    }

    fn specialise(&self, problem: &Problem, product: &Product) -> Option<Specialised> {
        let ([rows, columns], [thread_rows, thread_columns]) = (self.block, self.thread);
        let blocks = self.blocks(product);
        if blocks > i32::MAX as u64 {
            return None;
        }
        let mut builder = declare(problem, product);
        builder.constant("BM", rows).constant("BN", columns).constant("BK", self.depth);
        builder.constant("TM", thread_rows).constant("TN", thread_columns).constant("RESIDENT", self.resident);
        builder.constant("BAND", BAND_ROWS / rows.max(128));
        let threads = rows / thread_rows * (columns / thread_columns);
        let config = format!("tile={rows}x{columns}x{}", self.depth);
        Some(builder.finish(config, [blocks, 1, 1], threads as u32, 0))
    }

    /// A guess at the time, in no unit.
    fn cost(&self, product: &Product) -> f64 {
        let tiles = product.expected_row_tiles(self.block[0]) * product.n.div_ceil(self.block[1]) as f64;
        let rounds = (tiles / PROCESSORS as f64).ceil();
        rounds * (self.block[0] * self.block[1]) as f64 / self.speed
    }
}

#[cfg(test)]
mod tests {
    use super::super::tiles::testing::{After, semantic, typed, write};
    use super::*;
    use crate::plan::{DType, Op, Phase, Semantic, Slot, TensorType};

    const FORMS: [Op; 4] = [Op::Matmul, Op::GroupedMatmulGather { k: 4 }, Op::GroupedMatmul, Op::ExpertMatmul];

    fn of(semantic: &Semantic) -> Vec<Specialised> {
        TileFma.candidates(&Problem { semantic, phase: Phase::Prefill })
    }

    #[test]
    fn every_form_type_and_size_matches() {
        let types = [DType::F32, DType::F16, DType::BF16];
        for op in FORMS {
            for (x, w, y) in types.iter().flat_map(|x| types.iter().flat_map(|w| types.map(|y| (*x, *w, y)))) {
                for after in [After::Nothing, After::Residual, After::Swiglu(Some(3)), After::Swiglu(None)] {
                    let found = of(&typed(op.clone(), [x, w, y], 5, 7, 12, after));
                    assert_eq!(found.len(), if op == Op::ExpertMatmul { 1 } else { SHAPES.len() }, "{op:?} {after:?}");
                }
            }
        }
    }

    #[test]
    fn a_row_of_x_for_each_pair_matches_too() {
        let mut semantic = semantic(Op::ExpertMatmul, DType::F32, 6, 8, 10, After::Nothing);
        assert!(of(&semantic)[0].prelude().contains("PER_TOKEN = 4;"));
        semantic.inputs[0] = TensorType(DType::F32, vec![6, 4, 8]);
        assert!(of(&semantic)[0].prelude().contains("PER_TOKEN = 1;"));
        semantic.inputs[0] = TensorType(DType::F32, vec![6, 3, 8]);
        assert_eq!(of(&semantic), []);
    }

    #[test]
    fn other_wires_and_types_do_not_match() {
        let residual = || semantic(Op::Matmul, DType::F32, 5, 8, 12, After::Residual);
        let mut made_before = residual();
        made_before.body[0].1[0] = Slot::Temp(0);
        let mut broadcast = residual();
        broadcast.outputs[0].1 = vec![5, 24];
        let mut integers = residual();
        integers.outputs[0].0 = DType::I32;
        let mut longer = residual();
        longer.body.push(longer.body[0].clone());
        let mut inner = residual();
        inner.inputs[1].1 = vec![12, 9];
        let mut kept = semantic(Op::Matmul, DType::F32, 5, 8, 12, After::Swiglu(Some(2)));
        kept.outputs.push(TensorType(DType::F32, vec![5, 12]));
        kept.body.iter_mut().for_each(|instr| {
            let slots = instr.1.iter_mut().chain(&mut instr.2);
            slots.filter(|slot| **slot == Slot::Temp(0)).for_each(|slot| *slot = Slot::Out(1));
        });
        for semantic in [made_before, broadcast, integers, longer, inner, kept] {
            assert_eq!(of(&semantic), [], "{semantic:?}");
        }
    }

    #[test]
    fn rows_do_not_occur_in_the_text_so_that_buckets_share_a_kernel() {
        for op in FORMS {
            let texts = |rows| {
                let found = of(&semantic(op.clone(), DType::F32, rows, 64, 96, After::Residual));
                let mut texts: Vec<_> = found.iter().map(Specialised::prelude).collect();
                texts.sort();
                texts
            };
            assert_eq!(texts(3), texts(3000), "{op:?}");
        }
    }

    /// With `KERNELS_OUT=folder cargo test --lib codegen::kernels::tile_fma`, writes kernels to compile.
    #[test]
    fn texts() {
        let (f32, bf16, f16) = (DType::F32, DType::BF16, DType::F16);
        let cases = [
            (Op::Matmul, [f32, f32, f32], 4096, 4096, 4096, After::Nothing),
            (Op::Matmul, [f32, bf16, f16], 33, 77, 51, After::Residual),
            (Op::GroupedMatmulGather { k: 4 }, [f32, f32, f32], 512, 2048, 3584, After::Swiglu(Some(8))),
            (Op::GroupedMatmul, [bf16, bf16, bf16], 77, 31, 30, After::Swiglu(None)),
            (Op::ExpertMatmul, [bf16, bf16, bf16], 8, 2048, 3584, After::Swiglu(Some(8))),
            (Op::ExpertMatmul, [f32, f16, f32], 8, 31, 7, After::Residual),
            (Op::Matmul, [f32, f32, f32], 150, 100, 136, After::Swiglu(Some(4))),
            (Op::GroupedMatmulGather { k: 4 }, [bf16, f32, f32], 37, 44, 70, After::Swiglu(Some(7))),
            (Op::GroupedMatmul, [f32, bf16, f32], 150, 64, 132, After::Residual),
        ];
        for (case, (op, types, rows, k, n, after)) in cases.into_iter().enumerate() {
            for (i, found) in of(&typed(op, types, rows, k, n, after)).iter().enumerate() {
                write(&format!("tile_fma.{case}.{i}"), &format!("{}\n{}", found.prelude(), TileFma.source()));
            }
        }
    }
}
