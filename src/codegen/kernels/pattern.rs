//! What twins ask of a semantic: types, shapes, and the shape of its body.

use crate::plan::{DType, Instr, Op, Semantic, Slot, TensorType};

/// The type of a value.
pub fn ty(semantic: &Semantic, slot: Slot) -> &TensorType {
    match slot {
        Slot::In(i) => &semantic.inputs[i as usize],
        Slot::Out(i) => &semantic.outputs[i as usize],
        Slot::Temp(i) => &semantic.temps[i as usize],
    }
}

/// A value's shape, if it has this many axes.
pub fn dims<const N: usize>(semantic: &Semantic, slot: Slot) -> Option<[u64; N]> {
    ty(semantic, slot).1[..].try_into().ok()
}

/// A value's element type.
pub fn dtype(semantic: &Semantic, slot: Slot) -> DType {
    ty(semantic, slot).0
}

/// The rows of a value (all axes but the last, joined) and the size of the last.
pub fn rows_and_last(semantic: &Semantic, slot: Slot) -> (u64, u64) {
    let shape = &ty(semantic, slot).1;
    match shape.split_last() {
        Some((last, rows)) => (rows.iter().product(), *last),
        None => (1, 1),
    }
}

/// True if an input is used as a weight: as the second argument of an operator that takes one there. Kernels may load weights
/// before the steps before are done; where a graph puts a value in such a place, its step is launched after them.
pub fn is_weight(semantic: &Semantic, slot: Slot) -> bool {
    let takes_weight = |op: &Op| {
        matches!(
            op,
            Op::Embed
                | Op::RmsNorm { .. }
                | Op::Matmul
                | Op::Conv1dCausal
                | Op::ExpertMatmul
                | Op::GroupedMatmul
                | Op::GroupedMatmulGather { .. }
        )
    };
    semantic.body.iter().any(|Instr(op, arguments, _)| takes_weight(op) && arguments.get(1) == Some(&slot))
}

/// The only instruction of a body.
pub fn only(semantic: &Semantic) -> Option<&Instr> {
    match &semantic.body[..] {
        [one] => Some(one),
        _ => None,
    }
}

/// Arguments of an instruction that has this many.
pub fn args<const N: usize>(instr: &Instr) -> Option<[Slot; N]> {
    instr.1[..].try_into().ok()
}

/// Results of an instruction that has this many.
pub fn results<const N: usize>(instr: &Instr) -> Option<[Slot; N]> {
    instr.2[..].try_into().ok()
}

/// True for the 16-bit types that tensor cores multiply.
pub fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// True for the types of numbers that are no integers.
pub fn is_float(semantic: &Semantic, slot: Slot) -> bool {
    dtype(semantic, slot) != DType::I32
}

/// A body from the front: each step takes the next instruction if it is what is asked for.
pub struct Body<'a> {
    /// Instructions not taken yet.
    pub rest: &'a [Instr],
}

impl<'a> Body<'a> {
    /// All of a semantic's body.
    pub fn of(semantic: &'a Semantic) -> Self {
        Body { rest: &semantic.body }
    }

    /// Takes the next instruction if its operator is one that `wanted` gives something for.
    pub fn take<T>(&mut self, wanted: impl FnOnce(&Op) -> Option<T>) -> Option<(T, &'a Instr)> {
        let (first, rest) = self.rest.split_first()?;
        let found = wanted(&first.0)?;
        self.rest = rest;
        Some((found, first))
    }
}
