//! What shape rules are made of: an operator with the types of its operands, and questions about these.

use crate::ir::{Dim, OpKind, Type};

pub(super) fn positive(what: &str, number: u64) -> Result<(), String> {
    if number > 0 { Ok(()) } else { Err(format!("`{what}`: expected at least 1, found 0")) }
}

pub(super) fn show(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("[{}]", dims.join(","))
}

pub(super) struct Rule<'a> {
    pub(super) kind: &'a OpKind,
    pub(super) operands: &'a [Type],
}

impl<'a> Rule<'a> {
    /// The operands' shapes, once their number and ranks fit.
    pub(super) fn operands<const N: usize>(&self, ranks: [&[usize]; N]) -> Result<[&'a [Dim]; N], String> {
        if self.operands.len() != N {
            return Err(format!("`{}` takes {N} operands, found {}", self.kind.mnemonic(), self.operands.len()));
        }
        for (i, (operand, ranks)) in self.operands.iter().zip(ranks).enumerate() {
            if !ranks.contains(&operand.shape.len()) {
                let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
                return Err(format!("operand {i}: expected rank {}, found {operand}", ranks.join(" or ")));
            }
        }
        for (i, operand) in self.operands.iter().enumerate() {
            let index_like = self.index_operands().contains(&i);
            if operand.dtype.is_float() == index_like {
                let expected = if index_like { "i32" } else { "a float type" };
                return Err(format!("operand {i}: expected {expected}, found {operand}"));
            }
        }
        Ok(std::array::from_fn(|i| &self.operands[i].shape[..]))
    }

    fn index_operands(&self) -> &'static [usize] {
        match self.kind {
            OpKind::Embed => &[0],
            OpKind::Conv1dCausal => &[3, 4],
            OpKind::Rope { .. }
            | OpKind::TopK { .. }
            | OpKind::GatherRows
            | OpKind::GatherColumns
            | OpKind::GatherPairs { .. } => &[1],
            OpKind::KvWrite => &[3, 4, 5],
            OpKind::Attention { .. } => &[2, 3, 4],
            OpKind::ExpertMatmul | OpKind::WeightedSum | OpKind::GroupedMatmul | OpKind::GroupedWeightedSum => &[2],
            OpKind::GroupRows { .. } | OpKind::LocalExperts { .. } => &[0],
            OpKind::GroupedMatmulGather { .. } => &[2, 3],
            OpKind::Sample => &[1, 2, 3, 4],
            _ => &[],
        }
    }

    pub(super) fn fixed(&self, what: &str, dim: Dim) -> Result<u64, String> {
        dim.as_fixed().ok_or_else(|| format!("{what}: expected a constant, found {dim}"))
    }

    pub(super) fn same(&self, what: &str, found: Dim, expected: Dim) -> Result<(), String> {
        if found == expected { Ok(()) } else { Err(format!("{what}: expected {expected}, found {found}")) }
    }

    pub(super) fn multiple(&self, what: &str, dim: Dim, unit: u64) -> Result<(), String> {
        let size = self.fixed(what, dim)?;
        if unit != 0 && size % unit == 0 {
            Ok(())
        } else {
            Err(format!("{what}: expected a multiple of {unit}, found {size}"))
        }
    }

    /// The rows of one of so many blocks of equal size.
    pub(super) fn blocks(&self, what: &str, rows: Dim, blocks: u64) -> Result<Dim, String> {
        positive(what, blocks)?;
        if rows.factor.is_multiple_of(blocks) {
            Ok(Dim { factor: rows.factor / blocks, ..rows })
        } else {
            Err(format!("rows: expected a multiple of {blocks}, found {rows}"))
        }
    }

    pub(super) fn rows(&self, expected: Dim, operands: &[&[Dim]]) -> Result<(), String> {
        operands.iter().try_for_each(|shape| self.same("rows", shape[0], expected))
    }

    pub(super) fn cache(&self, kv: &[Dim], table: &[Dim]) -> Result<(), String> {
        self.same("halves of the cache", kv[1], Dim::fixed(2))?;
        for &dim in kv.iter().chain(table) {
            self.fixed("cache dimension", dim)?;
        }
        Ok(())
    }

    pub(super) fn grouped(&self, inner: Dim, weight: &[Dim], offsets: &[Dim]) -> Result<(), String> {
        self.same("inner dimension", weight[2], inner)?;
        let experts = self.fixed("experts", weight[0])?;
        self.same("offsets", offsets[0], Dim::fixed(experts.checked_add(1).ok_or("overflow")?))
    }
}
