//! `kernels/tile.cu`: products of many rows on tensor cores.

use super::builder::{Builder, Specialised};
use super::hopper::{MOST_SHARED, PROCESSORS, SYSTEM_SHARED};
use super::tiles::{BAND_ROWS, Product};
use super::{Problem, Twin};

/// The twin.
pub struct Tile;

/// Columns of K in shared memory at a time.
const DEPTH: u64 = 64;
/// Candidates that are worth a try.
const MOST_CANDIDATES: usize = 8;

/// A way to divide the work: rows and columns of a block and of a warp, buffers of the pipeline.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Shape {
    block: [u64; 2],
    warp: [u64; 2],
    stages: u64,
}

const fn shape(block: [u64; 2], warp: [u64; 2], stages: u64) -> Shape {
    Shape { block, warp, stages }
}

const SHAPES: [Shape; 14] = [
    shape([128, 256], [64, 64], 4),
    shape([256, 128], [64, 64], 4),
    shape([128, 128], [64, 64], 3),
    shape([128, 128], [64, 32], 4),
    shape([64, 256], [32, 64], 4),
    shape([64, 128], [32, 64], 4),
    shape([64, 64], [32, 32], 4),
    shape([32, 128], [32, 32], 4),
    shape([32, 64], [16, 32], 5),
    shape([64, 32], [32, 16], 5),
    shape([32, 32], [16, 16], 6),
    shape([16, 128], [16, 32], 5),
    shape([16, 64], [16, 16], 6),
    shape([16, 32], [16, 16], 8),
];

impl Twin for Tile {
    fn name(&self) -> &'static str {
        "tile"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/tile.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(product) = Product::of_tensor_cores(problem.semantic) else { return vec![] };
        let mut shapes = SHAPES;
        shapes.sort_by(|a, b| a.seconds(&product).total_cmp(&b.seconds(&product)));
        shapes.iter().filter_map(|shape| shape.specialise(problem, &product)).take(MOST_CANDIDATES).collect()
    }
}

impl Shape {
    fn threads(&self) -> u64 {
        self.block[0] / self.warp[0] * (self.block[1] / self.warp[1]) * 32
    }

    fn stage_bytes(&self) -> u64 {
        (self.block[0] + self.block[1]) * DEPTH * 2
    }

    fn shared(&self) -> u64 {
        self.stages * self.stage_bytes()
    }

    fn specialise(&self, problem: &Problem, product: &Product) -> Option<Specialised> {
        let [rows, columns] = self.block;
        let blocks = product.row_tiles(rows) * product.n.div_ceil(columns);
        // A thread keeps the sources of the rows that it copies: no more of them than registers are left.
        let gathers = product.gathers();
        let full = gathers && self.warp == [64, 64] && rows > columns;
        if full || self.shared() > MOST_SHARED || blocks > i32::MAX as u64 {
            return None;
        }
        let mut builder = Builder::new(problem);
        builder.constant("BM", rows).constant("BN", columns).constant("WM", self.warp[0]).constant("WN", self.warp[1]);
        builder.constant("STAGES", self.stages).constant("BAND", (BAND_ROWS / rows).min(64));
        product.declare(&mut builder);
        let config =
            format!("tile={rows}x{columns}x{DEPTH} warp={}x{} stages={}", self.warp[0], self.warp[1], self.stages);
        Some(builder.finish(config, [blocks, 1, 1], self.threads() as u32, self.shared()))
    }

    /// A guess at the time: of arithmetic, of the caches, or of waiting for loads in flight, whichever is longest.
    fn seconds(&self, product: &Product) -> f64 {
        let [rows, columns] = self.block.map(|size| size as f64);
        let k = product.k.next_multiple_of(DEPTH) as f64;
        let tiles = product.expected_row_tiles(self.block[0]) * product.n.div_ceil(self.block[1]) as f64;
        // Blocks that an SM runs in all, and at once.
        let each = (tiles / PROCESSORS as f64).ceil();
        let accumulators = self.warp[0] * self.warp[1] / 32;
        let registers = (accumulators * 3 / 2 + 64).min(256) * self.threads();
        let room = (MOST_SHARED / (self.shared() + SYSTEM_SHARED)).min(65_536 / registers).max(1) as f64;
        let at_once = room.min(each);
        let rate = match self.warp[0] * self.warp[1] {
            4096.. => 4.0e12,
            2048.. => 3.4e12,
            1024.. => 2.6e12,
            512.. => 1.7e12,
            _ => 1.0e12,
        };
        let busy = (at_once * self.threads() as f64 / 256.0).min(1.0).sqrt();
        let arithmetic = each * 2.0 * rows * columns * k / (rate * busy);
        let bytes = (rows + columns) * k * 2.0;
        let cache = tiles * bytes / 5.5e12;
        let in_flight = at_once * (self.stages - 1) as f64 * self.stage_bytes() as f64;
        let loads = each * bytes / (in_flight / 0.8e-6).min(100e9);
        arithmetic.max(cache).max(loads) + (each / at_once).ceil() * 1e-6
    }
}

#[cfg(test)]
mod tests {
    use super::super::tiles::testing::{After, semantic, typed, write};
    use super::*;
    use crate::plan::{DType, Op, Phase, Semantic, Slot};

    fn of(semantic: &Semantic) -> Vec<Specialised> {
        Tile.candidates(&Problem { semantic, phase: Phase::Prefill })
    }

    const GATHER: Op = Op::GroupedMatmulGather { k: 4 };

    #[test]
    fn products_of_one_16_bit_type_match_in_each_form_with_each_epilogue() {
        for op in [Op::Matmul, GATHER, Op::GroupedMatmul] {
            for ty in [DType::BF16, DType::F16] {
                for after in [After::Nothing, After::Residual, After::Swiglu(Some(8))] {
                    let found = of(&semantic(op.clone(), ty, 24, 64, 48, after));
                    assert_eq!(found.len(), MOST_CANDIDATES, "{op:?} {ty:?} {after:?}");
                }
            }
        }
        assert!(!of(&typed(Op::Matmul, [DType::BF16, DType::BF16, DType::F32], 3, 8, 8, After::Nothing)).is_empty());
    }

    #[test]
    fn other_types_sizes_and_wires_do_not_match() {
        let bf16 = |k, n, after| semantic(Op::Matmul, DType::BF16, 24, k, n, after);
        let mut swapped = bf16(64, 64, After::Swiglu(Some(8)));
        swapped.body[1].1 = vec![Slot::Temp(1)];
        let mut gathered = semantic(GATHER, DType::BF16, 24, 64, 48, After::Nothing);
        gathered.body[0].1.swap(2, 3);
        let none = [
            semantic(Op::Matmul, DType::F32, 24, 64, 48, After::Nothing),
            typed(Op::Matmul, [DType::BF16, DType::F16, DType::BF16], 24, 64, 48, After::Nothing),
            semantic(Op::ExpertMatmul, DType::BF16, 24, 64, 48, After::Nothing),
            bf16(60, 48, After::Nothing),
            bf16(64, 44, After::Nothing),
            bf16(64, 64, After::Swiglu(Some(16))),
            bf16(64, 64, After::Swiglu(None)),
            swapped,
            gathered,
        ];
        none.iter().for_each(|semantic| assert_eq!(of(semantic), [], "{semantic:?}"));
    }

    #[test]
    fn rows_do_not_occur_in_the_text_so_that_buckets_share_a_kernel() {
        for op in [Op::Matmul, GATHER] {
            let texts = |rows| {
                let found = of(&semantic(op.clone(), DType::BF16, rows, 2048, 3584, After::Swiglu(Some(8))));
                let mut texts: Vec<_> =
                    found.into_iter().map(|found| (found.config.clone(), found.prelude())).collect();
                texts.sort();
                texts
            };
            let (few, many) = (texts(8192), texts(2048));
            let shared: Vec<_> = few.iter().filter(|text| many.contains(text)).collect();
            let configs = |texts: &[(String, String)]| texts.iter().map(|text| text.0.clone()).collect::<Vec<_>>();
            let both = configs(&few).iter().filter(|config| configs(&many).contains(config)).count();
            assert!(both > 0 && shared.len() == both, "{:?} {:?}", configs(&few), configs(&many));
        }
    }

    #[test]
    fn large_products_take_large_tiles_and_small_ones_fill_the_device() {
        let first = |op: &Op, rows, k, n| of(&semantic(op.clone(), DType::BF16, rows, k, n, After::Nothing)).remove(0);
        let large = first(&Op::Matmul, 8192, 8192, 8192);
        assert_eq!((large.launch.grid[0], large.launch.block), (64 * 32, 256), "{}", large.config);
        let small = first(&Op::Matmul, 64, 2048, 2048);
        assert!(small.launch.grid[0] >= 64, "{}", small.config);
        let grouped = first(&GATHER, 64, 2048, 3584);
        assert!(grouped.config.starts_with("tile=64x") || grouped.config.starts_with("tile=32x"), "{}", grouped.config);
    }

    #[test]
    fn a_grid_holds_every_way_to_group_rows() {
        fn most(rows: u64, groups: u64, height: u64) -> u64 {
            match groups {
                0 => rows.div_ceil(height),
                _ => {
                    (0..=rows).map(|own| own.div_ceil(height) + most(rows - own, groups - 1, height)).max().unwrap_or(0)
                }
            }
        }
        for (rows, height) in (1..14).flat_map(|rows| [1, 2, 4, 8].map(|height| (rows, height))) {
            let product = Product::of(&semantic(Op::GroupedMatmul, DType::BF16, rows, 64, 48, After::Nothing));
            let bound = product.expect("a product").row_tiles(height);
            assert_eq!(most(rows, 5, height), bound, "{rows} rows in tiles of {height}");
        }
    }

    /// With `KERNELS_OUT=folder cargo test --lib codegen::kernels::tile`, writes kernels to compile.
    #[test]
    fn texts() {
        let cases = [
            (Op::Matmul, 8192, 8192, 8192, After::Nothing, DType::BF16),
            (Op::Matmul, 100, 2048, 2048, After::Residual, DType::F16),
            (Op::Matmul, 16, 264, 72, After::Nothing, DType::BF16),
            (GATHER, 2048, 2048, 3584, After::Swiglu(Some(8)), DType::BF16),
            (Op::GroupedMatmul, 256, 1792, 2048, After::Residual, DType::BF16),
            (Op::Matmul, 150, 200, 272, After::Swiglu(Some(8)), DType::F16),
            (Op::Matmul, 150, 384, 264, After::Residual, DType::BF16),
            (GATHER, 37, 200, 272, After::Swiglu(Some(8)), DType::BF16),
            (Op::GroupedMatmul, 150, 136, 264, After::Residual, DType::BF16),
        ];
        for (case, (op, rows, k, n, after, ty)) in cases.into_iter().enumerate() {
            let semantic = semantic(op, ty, rows, k, n, after);
            let problem = Problem { semantic: &semantic, phase: Phase::Prefill };
            let product = Product::of_tensor_cores(problem.semantic).expect("a product");
            for (i, shape) in SHAPES.iter().enumerate() {
                let Some(found) = shape.specialise(&problem, &product) else { continue };
                write(&format!("tile.{case}.{i}"), &format!("{}\n{}", found.prelude(), Tile.source()));
            }
        }
        let semantic = typed(Op::Matmul, [DType::BF16, DType::BF16, DType::F32], 512, 2048, 2048, After::Residual);
        let found = of(&semantic).remove(0);
        write("tile.f32", &format!("{}\n{}", found.prelude(), Tile.source()));
    }
}
