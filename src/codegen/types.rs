//! Types of the graph as types of the plan.

use crate::ir::{self, Extents};
use crate::plan;

/// A type with its symbols bound.
pub fn tensor_type(ty: &ir::Type, extents: &Extents) -> Result<plan::TensorType, String> {
    let sizes = ty.sizes(extents).ok_or_else(|| format!("{ty} is too large"))?;
    Ok(plan::TensorType(plan_dtype(ty.dtype), sizes))
}

/// The plan's name of an element type.
pub fn plan_dtype(dtype: ir::DType) -> plan::DType {
    match dtype {
        ir::DType::F32 => plan::DType::F32,
        ir::DType::F16 => plan::DType::F16,
        ir::DType::BF16 => plan::DType::BF16,
        ir::DType::I32 => plan::DType::I32,
    }
}

/// The graph's name of an element type.
pub fn graph_dtype(dtype: plan::DType) -> ir::DType {
    match dtype {
        plan::DType::F32 => ir::DType::F32,
        plan::DType::F16 => ir::DType::F16,
        plan::DType::BF16 => ir::DType::BF16,
        plan::DType::I32 => ir::DType::I32,
    }
}
