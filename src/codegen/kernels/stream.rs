//! `kernels/stream.cu`: products of few 16-bit rows with 16-bit weights, on tensor cores, at the speed of memory.

use super::frame::{self, Engine, Shape};
use super::hopper::PROCESSORS;
use super::pattern::{dtype, is_half};
use super::product::{Product, Prologue, Routing};
use super::{Problem, Specialised, Twin};

/// The twin.
pub struct Stream;

/// Configurations offered, at the most.
const MOST: usize = 6;

impl Twin for Stream {
    fn name(&self) -> &'static str {
        "stream"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/stream.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(product) = Product::of(problem).filter(|product| fits(problem, product)) else { return vec![] };
        let engine = Engine { span: 32, rows: 16, staged: product.rows_dtype };
        let mut found = frame::specialise_all(problem, &product, engine, &shapes(&product));
        found.truncate(MOST);
        found
    }
}

/// Whether tensor cores can run a product.
pub fn fits(problem: &Problem, product: &Product) -> bool {
    let weight = dtype(problem.semantic, product.weight);
    let block = product.block().unwrap_or(8);
    let whole = product.n.is_multiple_of(16) && 64 % (2 * block) == 0;
    is_half(weight) && weight == product.rows_dtype && whole && frame::runs(product)
}

fn shapes(product: &Product) -> Vec<Shape> {
    let columns = frame::rows_together(product).next_multiple_of(8).min(64);
    // Sums and what is loaded ahead have to fit into 128 registers.
    let depth = if columns <= 16 { 8 } else { 4 };
    let whole = Shape { row_groups: 1, k_groups: 8, depth, split: 1, per_sm: 1, columns };
    if let Routing::Dense { rows, .. } = product.routing {
        let stripes = product.n / 16;
        // Bytes of x that blocks load from the L2 cache, beside those of weights from memory.
        let read = if matches!(product.prologue, Prologue::ShortConv(_)) { 5 } else { 1 };
        let beside = (rows * read * stripes.min(PROCESSORS)) as f64 / product.n as f64;
        let split = [1u64, 2].into_iter().find(|&split| beside / split as f64 <= 0.35).unwrap_or(4);
        let of = |split| Shape { row_groups: split, k_groups: 8 / split, split, ..whole };
        let twice = |shape| Shape { per_sm: 2, ..shape };
        // So few stripes that two blocks an SM have one each.
        let few = (PROCESSORS + 1..=2 * PROCESSORS).contains(&(stripes / split * split));
        let first = if few { [twice(of(split)), of(split)] } else { [of(split), twice(of(split))] };
        // The last where rows are so long that no fewer blocks hold them.
        let others = [1, 2, 4, 8].into_iter().map(of);
        let shallow = Shape { depth: 4, ..twice(of(split)) };
        return first.into_iter().chain([shallow]).chain(others).collect();
    }
    let twice = Shape { per_sm: 2, ..whole };
    let tall = Shape { row_groups: 2, k_groups: 4, ..twice };
    let mut shapes = vec![twice, whole, Shape { depth: 4, ..twice }, tall];
    if matches!(product.routing, Routing::Grouped { .. }) {
        let other = |columns| Shape { columns, depth: if columns <= 16 { 8 } else { 4 }, ..twice };
        shapes.push(other(columns + 8));
        shapes.extend((columns > 8).then(|| other(columns - 8)));
        // Where rows are long, fewer of them at a time.
        shapes.push(other(8));
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::super::product::samples::{self, Sample};
    use super::*;
    use crate::plan::{DType, Phase, Slot};

    fn found(sample: &Sample) -> Vec<Specialised> {
        let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
        Stream.candidates(&problem)
    }

    #[test]
    fn every_body_of_the_model_has_candidates() {
        for sample in samples::all(DType::BF16, DType::BF16) {
            assert!(!found(&sample).is_empty(), "{}", sample.name);
        }
    }

    #[test]
    fn bodies_of_other_types_sizes_or_wires_have_none() {
        for (x, w) in [(DType::F32, DType::BF16), (DType::F16, DType::BF16), (DType::F32, DType::F32)] {
            assert!(samples::all(x, w).iter().all(|sample| found(sample).is_empty()), "{x:?} {w:?}");
        }
        let half = DType::F16;
        assert!(found(&samples::matmul(half, half, 65, 64, 64)).is_empty(), "too many rows");
        assert!(found(&samples::matmul(half, half, 4, 24, 64)).is_empty(), "rows that no stripe divides");
        assert!(found(&samples::matmul(half, half, 4, 64, 60)).is_empty(), "columns that no load divides");
        for sample in samples::broken(half) {
            assert!(found(&sample).is_empty(), "{}", sample.name);
        }
        let mut prefill = samples::short_conv(half, half, 4, 64, false);
        assert!(!found(&prefill).is_empty());
        prefill.phase = Phase::Prefill;
        assert!(found(&prefill).is_empty(), "rows of one sequence");
    }

    #[test]
    fn buckets_of_one_tile_share_a_kernel() {
        let text = |rows| found(&samples::matmul(DType::BF16, DType::BF16, rows, 4096, 2048))[0].prelude();
        assert_eq!(text(5), text(8));
        assert_ne!(text(8), text(16));
    }

    #[test]
    fn rows_cost_few_bytes_beside_the_weight() {
        let config = |sample: &Sample| found(sample)[0].config.clone();
        let half = DType::BF16;
        assert_eq!(config(&samples::matmul(half, half, 1, 2048, 2048)), "rows=16 split=1 depth=8 blocks=1");
        assert_eq!(config(&samples::short_conv(half, half, 8, 2048, false)), "rows=64 split=4 depth=8 blocks=1");
        let blocks = |sample: &Sample| found(sample)[0].launch.grid[0];
        assert_eq!(blocks(&samples::matmul(half, half, 1, 3072, 2048)), 192);
        assert_eq!(blocks(&samples::matmul(half, half, 64, 2048, 2048)), 128);
        for candidate in found(&samples::norm(half, half, 64, 6144, 2048)) {
            assert!(candidate.launch.shared <= 200 << 10 && candidate.launch.grid[0] % candidate.launch.cluster == 0);
        }
    }

    #[test]
    fn a_state_is_written_where_the_convolution_is_in_the_prologue() {
        let sample = samples::short_conv(DType::BF16, DType::BF16, 2, 64, true);
        let text = found(&sample)[0].prelude();
        assert!(text.contains("bf16* ring") && text.contains(", bias, writes, early)"), "{text}");
        assert!(matches!(sample.semantic.body[2].1[2], Slot::In(_)));
    }

    /// Writes every candidate's text for the compiler: `KERNEL_TEXTS=DIR cargo test --lib stream`.
    #[test]
    fn texts() {
        let Some(folder) = std::env::var_os("KERNEL_TEXTS") else { return };
        samples::write(&[&Stream, &super::super::stream_fma::StreamFma], folder.as_ref());
    }
}
