//! Families of operators, and their colours.

use crate::ir::{Op, OpKind, Stage};
use crate::plan;

/// What an operator mostly is. The order is precedence: a fused operator belongs to the first family of its stages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Family {
    /// Softmax attention, RoPE, cache writes.
    Attention,
    /// Routing and products with experts.
    Experts,
    /// Short convolution.
    Conv,
    /// Dense matrix products.
    Matmul,
    /// Embedding, sampling.
    Ends,
    /// RMSNorm.
    Norm,
    /// Elementwise operators.
    Pointwise,
    /// Parts and rows of other values.
    Movement,
}

impl Family {
    /// All families, in the order of a legend.
    pub const ALL: [Family; 8] = [
        Family::Matmul,
        Family::Norm,
        Family::Conv,
        Family::Attention,
        Family::Experts,
        Family::Pointwise,
        Family::Movement,
        Family::Ends,
    ];

    /// The family of an operator.
    pub fn of(op: &Op) -> Family {
        match &op.kind {
            OpKind::Fused(stages) => {
                stages.iter().map(|&stage| Family::of_stage(stage)).min().unwrap_or(Family::Pointwise)
            }
            OpKind::Matmul => Family::Matmul,
            OpKind::RmsNorm { .. } => Family::Norm,
            OpKind::Conv1dCausal => Family::Conv,
            OpKind::Attention { .. } | OpKind::KvWrite | OpKind::Rope { .. } => Family::Attention,
            OpKind::ExpertMatmul
            | OpKind::WeightedSum
            | OpKind::TopK { .. }
            | OpKind::GroupRows { .. }
            | OpKind::GroupedMatmulGather { .. }
            | OpKind::GroupedMatmul
            | OpKind::GroupedWeightedSum
            | OpKind::LocalExperts { .. } => Family::Experts,
            OpKind::Unary(_) | OpKind::Binary(_) | OpKind::Cast | OpKind::RowSum | OpKind::BlockSum { .. } => {
                Family::Pointwise
            }
            OpKind::Split { .. }
            | OpKind::GatherRows
            | OpKind::GatherPairs { .. }
            | OpKind::GatherColumns
            | OpKind::AllGather { .. }
            | OpKind::AllToAll { .. }
            | OpKind::Send { .. }
            | OpKind::Receive { .. } => Family::Movement,
            OpKind::Embed | OpKind::Sample => Family::Ends,
        }
    }

    /// The family of a stage.
    pub fn of_stage(stage: Stage) -> Family {
        match stage {
            Stage::Attention | Stage::HeadRope | Stage::KvWrite => Family::Attention,
            Stage::Router | Stage::Local | Stage::Group | Stage::ExpertMatmul | Stage::Combine => Family::Experts,
            Stage::ShortConv => Family::Conv,
            Stage::Matmul => Family::Matmul,
            Stage::Embed | Stage::Sample => Family::Ends,
            Stage::Norm => Family::Norm,
            Stage::Swiglu | Stage::Residual | Stage::BlockSum | Stage::Pointwise => Family::Pointwise,
            Stage::Gather => Family::Movement,
        }
    }

    /// The family of an operator of a plan.
    pub fn of_instruction(op: &plan::Op) -> Family {
        match op {
            plan::Op::Matmul => Family::Matmul,
            plan::Op::RmsNorm { .. } => Family::Norm,
            plan::Op::Conv1dCausal => Family::Conv,
            plan::Op::Attention { .. } | plan::Op::KvWrite | plan::Op::Rope { .. } => Family::Attention,
            plan::Op::ExpertMatmul
            | plan::Op::WeightedSum
            | plan::Op::TopK
            | plan::Op::GroupRows
            | plan::Op::GroupedMatmulGather { .. }
            | plan::Op::GroupedMatmul
            | plan::Op::GroupedWeightedSum
            | plan::Op::LocalExperts { .. } => Family::Experts,
            plan::Op::Pointwise(_) | plan::Op::RowSum | plan::Op::BlockSum { .. } => Family::Pointwise,
            plan::Op::Split { .. }
            | plan::Op::GatherRows
            | plan::Op::GatherColumns
            | plan::Op::GatherPairs { .. }
            | plan::Op::AllGather { .. }
            | plan::Op::AllToAll { .. }
            | plan::Op::Send { .. }
            | plan::Op::Receive { .. } => Family::Movement,
            plan::Op::Embed | plan::Op::Sample => Family::Ends,
        }
    }

    /// What a legend calls it.
    pub fn name(self) -> &'static str {
        match self {
            Family::Attention => "attention",
            Family::Experts => "experts",
            Family::Conv => "convolution",
            Family::Matmul => "matmul",
            Family::Ends => "embed, sample",
            Family::Norm => "norm",
            Family::Pointwise => "pointwise",
            Family::Movement => "split, gather",
        }
    }

    /// Fill of a box.
    pub fn fill(self) -> &'static str {
        match self {
            Family::Attention => "#ffeddd",
            Family::Experts => "#fde6ef",
            Family::Conv => "#ece7fb",
            Family::Matmul => "#e2eefc",
            Family::Ends => "#def3f3",
            Family::Norm => "#e4f5e8",
            Family::Pointwise => "#fdf5d4",
            Family::Movement => "#eff1f4",
        }
    }

    /// Outline of a box, and its strong colour.
    pub fn stroke(self) -> &'static str {
        match self {
            Family::Attention => "#d97a2b",
            Family::Experts => "#cc4f83",
            Family::Conv => "#7d5fc7",
            Family::Matmul => "#3f78c3",
            Family::Ends => "#2f9393",
            Family::Norm => "#3f9a5f",
            Family::Pointwise => "#b8952a",
            Family::Movement => "#8490a0",
        }
    }
}
