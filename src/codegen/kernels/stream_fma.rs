//! `kernels/stream_fma.cu`: products of few rows with weights of any float types, in f32, at the speed of memory.

use super::frame::{self, Engine, Shape};
use super::pattern::dtype;
use super::product::{Product, Prologue, Routing};
use super::{Problem, Specialised, Twin, stream};
use crate::plan::DType;

/// The twin.
pub struct StreamFma;

/// Rows of x at a time, at the most: the sums of four times as many are in registers.
const MOST_COLUMNS: u64 = 8;

/// Configurations offered, at the most.
const MOST: usize = 6;

impl Twin for StreamFma {
    fn name(&self) -> &'static str {
        "stream_fma"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/stream_fma.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let fits = |product: &Product| frame::runs(product) && !stream::fits(problem, product);
        let Some(product) = Product::of(problem).filter(fits) else { return vec![] };
        let span = 32 * 16 / dtype(problem.semantic, product.weight).bytes();
        let engine = Engine { span, rows: 4, staged: DType::F32 };
        let mut found = frame::specialise_all(problem, &product, engine, &shapes(&product));
        found.truncate(MOST);
        found
    }
}

fn shapes(product: &Product) -> Vec<Shape> {
    let columns = frame::rows_together(product).next_power_of_two().min(MOST_COLUMNS);
    let routed = !matches!(product.routing, Routing::Dense { .. });
    // What is loaded ahead has to fit into 128 registers beside the sums, and beside what a convolution or a weighted sum needs.
    let summed = matches!(product.routing, Routing::Pairs { weighted: Some(_), .. });
    let crowded = columns > 2 || summed || matches!(product.prologue, Prologue::ShortConv(_));
    let of = |row_groups, split| {
        let depth = if crowded || row_groups != 4 { 2 } else { 4 };
        let per_sm = if routed { 2 } else { 1 };
        Shape { row_groups, k_groups: 8 / row_groups, depth, split, per_sm, columns }
    };
    let first = of(4, 1);
    let mut shapes = vec![first, Shape { per_sm: 3 - first.per_sm, ..first }];
    if !routed {
        // Where rows are long: all warps on rows, and less of K a block.
        shapes.extend([of(8, 2), of(8, 4)]);
    }
    shapes.extend([of(2, 1), of(1, 1)]);
    if columns > 2 {
        shapes.push(Shape { columns: columns / 2, ..first });
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::super::product::samples;
    use super::*;

    #[test]
    fn every_body_has_candidates_in_f32_and_in_mixed_types() {
        for (x, w) in [(DType::F32, DType::BF16), (DType::F32, DType::F32), (DType::F16, DType::BF16)] {
            for sample in samples::all(x, w) {
                let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
                assert!(!StreamFma.candidates(&problem).is_empty(), "{} {x:?} {w:?}", sample.name);
            }
        }
    }

    #[test]
    fn what_tensor_cores_can_do_is_left_to_them() {
        for sample in samples::all(DType::F16, DType::F16) {
            let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
            assert!(StreamFma.candidates(&problem).is_empty(), "{}", sample.name);
        }
        let sample = samples::matmul(DType::F16, DType::F16, 3, 20, 64);
        let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
        assert_eq!(StreamFma.candidates(&problem)[0].config, "rows=4 split=1 depth=1 blocks=1");
    }

    #[test]
    fn wrong_wires_match_nothing_and_rows_are_no_part_of_the_text() {
        for sample in samples::broken(DType::F32) {
            let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
            assert!(StreamFma.candidates(&problem).is_empty(), "{}", sample.name);
        }
        let text = |rows| {
            let sample = samples::matmul(DType::F32, DType::F32, rows, 4096, 2048);
            StreamFma.candidates(&Problem { semantic: &sample.semantic, phase: sample.phase })[0].prelude()
        };
        assert_eq!(text(5), text(33));
    }
}
