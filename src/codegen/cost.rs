//! What a step moves and computes: the bytes that must cross memory once, and floating-point operations.

use crate::ir::{Extents, Graph, Op, OpKind, Operand, Type};
use crate::plan::Cost;

/// The cost of an operator in a bucket; a fused operator's temporaries cost nothing.
pub fn cost(graph: &Graph, op: &Op, extents: &Extents) -> Cost {
    let mut cost = Cost { bytes: 0, bytes_per_expert: 0, bytes_per_position: 0, flops: 0 };
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
        cost.flops += flops(graph, inner, extents);
        if let Some((_, result)) = inner.kind.state_update() {
            // What is written to the state: one column or one key and value a row.
            let columns = match inner.kind {
                OpKind::KvWrite => 2,
                _ => 1,
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
        (OpKind::Attention { .. }, 1) => {
            let per_position: u64 = [1, 2, 4].iter().filter_map(|&i| ty.shape.get(i)?.as_fixed()).product();
            cost.bytes_per_position += per_position * ty.dtype.bytes();
        }
        // The cache is written by row; tables and parameters are small and read by row.
        (OpKind::KvWrite, 2) => {}
        (OpKind::KvWrite, 3) | (OpKind::Attention { .. }, 2) => cost.bytes += extents.tokens * ty.dtype.bytes(),
        (OpKind::Sample, 4) => cost.bytes += extents.rows * row_bytes(ty),
        _ => cost.bytes += bytes(ty, extents),
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
        OpKind::Unary(_) | OpKind::Binary(_) | OpKind::RowSum => elements(&graph.operand_type(&op.operands[0])),
        _ => 0,
    }
}
