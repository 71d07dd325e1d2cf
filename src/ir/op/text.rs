//! The text form of operators: their names and attributes, written and read.

use super::{BinaryFn, OpKind, UnaryFn, name_of};
use crate::ir::attributes::{Attribute, AttributeReader};

impl OpKind {
    /// The operator's name in the text form.
    pub fn mnemonic(&self) -> &'static str {
        match self {
            OpKind::Embed => "embed",
            OpKind::RmsNorm { .. } => "rms_norm",
            OpKind::Matmul => "matmul",
            OpKind::Split { .. } => "split",
            OpKind::Unary(function) => name_of(&UnaryFn::ALL, function),
            OpKind::Binary(function) => name_of(&BinaryFn::ALL, function),
            OpKind::Cast => "cast",
            OpKind::Conv1dCausal => "conv1d_causal",
            OpKind::Rope { .. } => "rope",
            OpKind::KvWrite => "kv_write",
            OpKind::Attention { .. } => "attention",
            OpKind::TopK { .. } => "top_k",
            OpKind::GatherRows => "gather",
            OpKind::GatherColumns => "gather_columns",
            OpKind::RowSum => "row_sum",
            OpKind::ExpertMatmul => "expert_matmul",
            OpKind::WeightedSum => "weighted_sum",
            OpKind::GroupRows { .. } => "group_rows",
            OpKind::GatherPairs { .. } => "gather_pairs",
            OpKind::GroupedMatmulGather { .. } => "grouped_matmul_gather",
            OpKind::GroupedMatmul => "grouped_matmul",
            OpKind::GroupedWeightedSum => "grouped_weighted_sum",
            OpKind::AllGather { .. } => "all_gather",
            OpKind::AllToAll { .. } => "all_to_all",
            OpKind::Send { .. } => "send",
            OpKind::Receive { .. } => "receive",
            OpKind::LocalExperts { .. } => "local_experts",
            OpKind::BlockSum { .. } => "block_sum",
            OpKind::Sample => "sample",
            OpKind::Fused(_) => "fused",
        }
    }

    /// The attributes by name, in print order.
    pub fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        match self {
            OpKind::RmsNorm { eps } => vec![("eps", Attribute::Float(*eps))],
            OpKind::Split { sizes, block } => {
                let mut list = vec![("sizes", Attribute::Ints(sizes.clone()))];
                list.extend(block.map(|b| ("block", Attribute::Int(b))));
                list
            }
            OpKind::Rope { theta, head_dim } => {
                vec![("theta", Attribute::Float(*theta)), ("head_dim", Attribute::Int(*head_dim))]
            }
            OpKind::Attention { heads, scale } => {
                vec![("heads", Attribute::Int(*heads)), ("scale", Attribute::Float(*scale))]
            }
            OpKind::TopK { k } | OpKind::GatherPairs { k } | OpKind::GroupedMatmulGather { k } => {
                vec![("k", Attribute::Int(*k))]
            }
            OpKind::GroupRows { experts } => vec![("experts", Attribute::Int(*experts))],
            OpKind::AllGather { ranks } | OpKind::AllToAll { ranks } => vec![("ranks", Attribute::Int(*ranks))],
            OpKind::Send { to, ranks } => vec![("to", Attribute::Int(*to)), ("ranks", Attribute::Int(*ranks))],
            OpKind::Receive { from, ranks } => vec![("from", Attribute::Int(*from)), ("ranks", Attribute::Int(*ranks))],
            OpKind::LocalExperts { of, experts, parts } => {
                let mut list = vec![("of", Attribute::Int(*of)), ("experts", Attribute::Ints(experts.clone()))];
                if !parts.is_empty() {
                    let (from, to) = parts.iter().copied().unzip();
                    list.extend([("from", Attribute::Ints(from)), ("to", Attribute::Ints(to))]);
                }
                list
            }
            OpKind::BlockSum { blocks } => vec![("blocks", Attribute::Int(*blocks))],
            _ => vec![],
        }
    }

    /// Reads an operator other than `fused` from its name and attributes.
    ///
    /// # Errors
    /// An unknown name, a missing, unknown or mistyped attribute, each named.
    pub fn from_text(mnemonic: &str, attributes: &[(String, Attribute)]) -> Result<OpKind, String> {
        let mut attributes = AttributeReader { mnemonic, rest: attributes.to_vec() };
        let kind = match mnemonic {
            "embed" => OpKind::Embed,
            "rms_norm" => OpKind::RmsNorm { eps: attributes.float("eps")? },
            "matmul" => OpKind::Matmul,
            "split" => OpKind::Split { sizes: attributes.ints("sizes")?, block: attributes.optional_int("block")? },
            "cast" => OpKind::Cast,
            "conv1d_causal" => OpKind::Conv1dCausal,
            "rope" => OpKind::Rope { theta: attributes.float("theta")?, head_dim: attributes.int("head_dim")? },
            "kv_write" => OpKind::KvWrite,
            "attention" => OpKind::Attention { heads: attributes.int("heads")?, scale: attributes.float("scale")? },
            "top_k" => OpKind::TopK { k: attributes.int("k")? },
            "gather" => OpKind::GatherRows,
            "gather_columns" => OpKind::GatherColumns,
            "row_sum" => OpKind::RowSum,
            "expert_matmul" => OpKind::ExpertMatmul,
            "weighted_sum" => OpKind::WeightedSum,
            "group_rows" => OpKind::GroupRows { experts: attributes.int("experts")? },
            "gather_pairs" => OpKind::GatherPairs { k: attributes.int("k")? },
            "grouped_matmul_gather" => OpKind::GroupedMatmulGather { k: attributes.int("k")? },
            "grouped_matmul" => OpKind::GroupedMatmul,
            "grouped_weighted_sum" => OpKind::GroupedWeightedSum,
            "all_gather" => OpKind::AllGather { ranks: attributes.int("ranks")? },
            "all_to_all" => OpKind::AllToAll { ranks: attributes.int("ranks")? },
            "send" => OpKind::Send { to: attributes.int("to")?, ranks: attributes.int("ranks")? },
            "receive" => OpKind::Receive { from: attributes.int("from")?, ranks: attributes.int("ranks")? },
            "local_experts" => {
                let (of, experts) = (attributes.int("of")?, attributes.ints("experts")?);
                let [from, to] = ["from", "to"].map(|name| attributes.optional_ints(name));
                let (from, to) = (from?.unwrap_or_default(), to?.unwrap_or_default());
                if from.len() != to.len() {
                    return Err(format!("expected as many `from` as `to`, found {} and {}", from.len(), to.len()));
                }
                OpKind::LocalExperts { of, experts, parts: from.into_iter().zip(to).collect() }
            }
            "block_sum" => OpKind::BlockSum { blocks: attributes.int("blocks")? },
            "sample" => OpKind::Sample,
            name => {
                let unary = UnaryFn::ALL.iter().find(|(_, n)| *n == name).map(|(u, _)| OpKind::Unary(*u));
                let binary = BinaryFn::ALL.iter().find(|(_, n)| *n == name).map(|(b, _)| OpKind::Binary(*b));
                unary.or(binary).ok_or_else(|| format!("unknown operator `{name}`"))?
            }
        };
        match attributes.rest.first() {
            None => Ok(kind),
            Some((name, _)) => Err(format!("`{mnemonic}` has no attribute `{name}`")),
        }
    }
}
