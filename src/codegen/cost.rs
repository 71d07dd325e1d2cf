//! What a step moves and computes: the bytes that must cross memory once, and floating-point operations.

use crate::ir::{Extents, Graph, Op, OpKind, Operand, Type};
use crate::plan::Cost;

/// The cost of an operator in a bucket; a fused operator's temporaries cost nothing.
pub fn cost(graph: &Graph, op: &Op, extents: &Extents) -> Cost {
    let mut cost = Cost::default();
    for operand in &op.operands {
        let ty = graph.operand_type(operand);
        let reader = op.primitives().iter().find_map(|inner| {
            let at = inner.operands.iter().position(|o| o == operand)?;
            Some((inner, at))
        });
        let Some((inner, at)) = reader else { continue };
        read(&mut cost, graph, inner, at, operand, &ty, extents);
    }
    for &result in &op.results {
        let updated = op.state_updates().iter().any(|(_, new)| *new == result);
        if !updated {
            cost.bytes += bytes(graph.ty(result), extents);
        }
    }
    for inner in op.primitives() {
        cost.link_bytes += link_bytes(graph, inner, extents);
        cost.flops += flops(graph, inner, extents);
        // Of the primitives, because a fused cache write hides the cache that attention reads.
        if let OpKind::Attention { .. } = inner.kind {
            let cache = graph.operand_type(&inner.operands[1]);
            let per_position: u64 = [1, 2, 4].iter().filter_map(|&i| cache.shape.get(i)?.as_fixed()).product();
            cost.bytes_per_position += per_position * cache.dtype.bytes();
        }
        if let Some((_, result)) = inner.kind.state_update() {
            // What is written to the state: one column or one key and value a row.
            let columns = match inner.kind {
                OpKind::KvWrite => 2,
                OpKind::Conv1dCausal => 1,
                _ => 0,
            };
            let state = graph.ty(inner.results[result]);
            let row = graph.operand_type(&inner.operands[0]).last().unwrap_or(0);
            cost.bytes += extents.tokens * columns * row * state.dtype.bytes();
        }
    }
    cost
}

fn read(cost: &mut Cost, graph: &Graph, op: &Op, at: usize, operand: &Operand, ty: &Type, extents: &Extents) {
    let rows = |ty: &Type| ty.shape.first().and_then(|dim| dim.size(extents)).unwrap_or(0);
    let row_bytes = |ty: &Type| ty.last().unwrap_or(0) * ty.dtype.bytes();
    match (&op.kind, at) {
        // Only the rows that are looked up.
        (OpKind::Embed, 1) => cost.bytes += rows(&graph.operand_type(&op.operands[0])) * row_bytes(ty),
        (OpKind::GatherRows, 0) => cost.bytes += rows(&graph.operand_type(&op.operands[1])) * row_bytes(ty),
        (OpKind::ExpertMatmul | OpKind::GroupedMatmulGather { .. } | OpKind::GroupedMatmul, 1)
            if operand.weight().is_some() =>
        {
            let experts = rows(ty).max(1);
            cost.bytes_per_expert += bytes(ty, extents) / experts;
        }
        (OpKind::Conv1dCausal, 2) => {
            let taps = graph.operand_type(&op.operands[1]).last().unwrap_or(1);
            cost.bytes += extents.sequences * (taps - 1) * row_bytes(ty);
        }
        // The cache is read by position and written by row; tables and parameters are small and read by row.
        (OpKind::Attention { .. }, 1) | (OpKind::KvWrite, 2) => {}
        (OpKind::KvWrite, 3) | (OpKind::Attention { .. }, 2) => cost.bytes += extents.tokens * ty.dtype.bytes(),
        (OpKind::Sample, 4) => cost.bytes += extents.rows * row_bytes(ty),
        _ => cost.bytes += bytes(ty, extents),
    }
}

/// What a rank sends to the others.
fn link_bytes(graph: &Graph, op: &Op, extents: &Extents) -> u64 {
    let operands: u64 = op.operands.iter().map(|operand| bytes(&graph.operand_type(operand), extents)).sum();
    match op.kind {
        OpKind::AllGather { ranks } => operands * (ranks - 1),
        OpKind::AllToAll { ranks } => operands / ranks * (ranks - 1),
        // All but the link.
        OpKind::Send { .. } => {
            operands - op.operands.first().map_or(0, |link| bytes(&graph.operand_type(link), extents))
        }
        _ => 0,
    }
}

fn bytes(ty: &Type, extents: &Extents) -> u64 {
    ty.bytes(extents).unwrap_or(u64::MAX)
}

fn flops(graph: &Graph, op: &Op, extents: &Extents) -> u64 {
    let elements = |ty: &Type| bytes(ty, extents) / ty.dtype.bytes();
    let Some(&result) = op.results.first() else { return 0 };
    let produced = elements(graph.ty(result));
    match op.kind {
        OpKind::Matmul | OpKind::ExpertMatmul | OpKind::GroupedMatmul | OpKind::GroupedMatmulGather { .. } => {
            2 * produced * graph.operand_type(&op.operands[1]).last().unwrap_or(0)
        }
        OpKind::Conv1dCausal => 2 * produced * graph.operand_type(&op.operands[1]).last().unwrap_or(0),
        OpKind::RmsNorm { .. } => 4 * produced,
        OpKind::Rope { .. } => 3 * produced,
        OpKind::WeightedSum | OpKind::GroupedWeightedSum => {
            2 * produced * graph.operand_type(&op.operands[1]).last().unwrap_or(1)
        }
        OpKind::Unary(_) | OpKind::Binary(_) | OpKind::RowSum | OpKind::BlockSum { .. } => {
            elements(&graph.operand_type(&op.operands[0]))
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::{CompileOptions, Recipe, Source, compile};
    use crate::ir::{parse, verify};
    use crate::plan::PlanFile;

    const EXTENTS: Extents = Extents { tokens: 3, sequences: 2, rows: 1 };

    /// The costs of a graph's operators, three rows of two sequences.
    fn costs(text: &str) -> Vec<Cost> {
        let graph = parse(text).unwrap_or_else(|fault| panic!("{fault}")).graph;
        verify(&graph).unwrap_or_else(|faults| panic!("{faults}"));
        graph.ops.iter().map(|op| cost(&graph, op, &EXTENTS)).collect()
    }

    fn plain(bytes: u64, flops: u64) -> Cost {
        Cost { bytes, flops, ..Cost::default() }
    }

    #[test]
    fn products_read_their_operands_and_lookups_their_rows() {
        let found = costs(
            "graph @g (%tokens: i32[T]) {
              weight @e : bf16[100,8]
              weight @w : bf16[4,8]
              %x = embed %tokens, @e : f32[T,8]
              %y = matmul %x, @w : f32[T,4]
              return %y
            }",
        );
        // Three tokens, three rows of the table, three rows made; then x, w and y.
        assert_eq!(found, [plain(12 + 48 + 96, 0), plain(96 + 64 + 48, 2 * 12 * 8)]);
    }

    #[test]
    fn what_stays_inside_a_fused_operator_moves_no_bytes() {
        let found = costs(
            "graph @g (%x: f32[T,8]) {
              weight @n : f32[8]
              weight @w : f32[4,8]
              %y = fused[norm+matmul] %x, @n, @w : f32[T,4] {
                %h = rms_norm %x, @n {eps = 1e-5} : f32[T,8]
                %y = matmul %h, @w : f32[T,4]
              }
              return %y
            }",
        );
        assert_eq!(found, [plain(96 + 32 + 128 + 48, 4 * 24 + 2 * 12 * 8)]);
    }

    #[test]
    fn experts_cost_by_their_number() {
        let found = costs(
            "graph @g (%x: f32[T,8], %experts: i32[T,2]) {
              weight @w : bf16[16,4,8]
              %y = expert_matmul %x, @w, %experts : f32[T,2,4]
              return %y
            }",
        );
        let expected = Cost { bytes_per_expert: 4 * 8 * 2, ..plain(96 + 24 + 96, 2 * 24 * 8) };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn history_counts_once_with_the_cache_write_fused_or_not() {
        let head = "graph @g (%q: bf16[T,8], %k: bf16[T,4], %v: bf16[T,4], %pos: i32[T], %slot: i32[T]) {
              state %table : i32[2,3]
              state %kv : bf16[5,2,1,64,4]";
        let write = "%kv.next = kv_write %k, %v, %kv, %table, %pos, %slot : bf16[5,2,1,64,4]";
        let attend = "%a = attention %q, %kv.next, %table, %pos, %slot {heads = 2, scale = 0.5} : bf16[T,8]";
        let apart = costs(&format!("{head}\n{write}\n{attend}\nreturn %a, %kv.next\n}}"));
        // k, v, a table entry, pos and slot of each row; a key and a value written.
        assert_eq!(apart[0], plain(24 + 24 + 12 + 12 + 12 + 48, 0));
        let attention = Cost { bytes_per_position: 2 * 4 * 2, ..plain(48 + 12 + 12 + 12 + 48, 0) };
        assert_eq!(apart[1], attention);
        let results = "%a, %kv.next = fused[kvwrite+attention] %k, %v, %kv, %table, %pos, %slot, %q";
        let types = "bf16[T,8], bf16[5,2,1,64,4]";
        let fused = costs(&format!("{head}\n{results} : {types} {{\n{write}\n{attend}\n}}\nreturn %a, %kv.next\n}}"));
        assert_eq!(fused[0].bytes_per_position, attention.bytes_per_position);
        assert_eq!(fused[0].bytes, apart[0].bytes + apart[1].bytes - 36, "table, pos and slot are read once");
    }

    fn total(file: &PlanFile, bucket: &str, part: impl Fn(&Cost) -> u64) -> u64 {
        let buckets = &file.manifest.ranks[0].buckets;
        let bucket = buckets.iter().find(|found| found.name == bucket).expect("the bucket was asked for");
        bucket.steps.iter().map(|step| part(&step.cost)).sum()
    }

    /// The sums by hand: 22 layers of 32 experts of 3 * 1792 * 2048, 6 of attention with 8 KV heads of 64, all in bf16.
    #[test]
    fn lfm2_8b_a1b_moves_what_its_shape_says() {
        let recipe = Recipe::parse(include_str!("../../plans/lfm2-8b-a1b.ron")).expect("the recipe is valid");
        let source = Source::Recipe(recipe.into(), None);
        let every_pass = crate::passes::names().into_iter().map(str::to_owned).collect();
        for disabled in [vec![], every_pass] {
            let options = CompileOptions {
                prefill: Some(vec![512]),
                decode: Some(vec![1]),
                max_sequences: Some(1),
                disabled,
                ..CompileOptions::default()
            };
            let file = compile(&source, &options, &Silent).expect("it compiles").file;
            for bucket in ["decode_1", "prefill_512"] {
                assert_eq!(total(&file, bucket, |cost| cost.bytes_per_expert), 22 * 3 * 1792 * 2048 * 2);
                assert_eq!(total(&file, bucket, |cost| cost.bytes_per_position), 6 * 2 * 8 * 64 * 2);
            }
            let weights = &file.manifest.ranks[0].weights;
            let other = weights.iter().filter(|weight| !weight.name.contains(".experts."));
            let other: u64 = other.filter_map(|weight| weight.ty.bytes()).sum();
            assert!((1.177e9..1.178e9).contains(&(other as f64)), "weights beside experts: {other}");
            let decode = total(&file, "decode_1", |cost| cost.bytes);
            // Activations come on top: fused, under half a percent.
            let most = if options.disabled.is_empty() { 1.005 } else { 1.02 };
            assert!(decode > other && (decode as f64) < most * other as f64, "{decode} bytes a step for {other}");
            let flops = total(&file, "decode_1", |cost| cost.flops) as f64;
            assert!((flops / (2.847e9 + 2.0 * 65536.0 * 2048.0) - 1.0).abs() < 1e-2, "{flops} flop");
        }
    }
}
