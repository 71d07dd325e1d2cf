//! What the tests of twins share.

use super::{Candidate, Problem, Twin};
use crate::plan::{DType, Instr, Op, Phase, Semantic, Slot, TensorType};

/// A type.
pub fn ty(dtype: DType, shape: &[u64]) -> TensorType {
    TensorType(dtype, shape.to_vec())
}

/// An instruction.
pub fn instr(op: Op, arguments: &[Slot], results: &[Slot]) -> Instr {
    Instr(op, arguments.to_vec(), results.to_vec())
}

/// What a step computes, from its inputs and outputs, temporaries and body.
pub fn semantic(
    (inputs, outputs): (Vec<TensorType>, Vec<TensorType>),
    temps: Vec<TensorType>,
    body: Vec<Instr>,
) -> Semantic {
    Semantic { name: String::new(), inputs, outputs, temps, body }
}

/// Writes the text of each candidate to the directory that `KERNEL_TEXTS` names, if set, for a compiler to try.
pub fn dump(twin: &'static dyn Twin, semantic: &Semantic, phase: Phase) {
    for specialised in twin.candidates(&Problem { semantic, phase }) {
        let candidate = Candidate { twin, specialised };
        write(twin.name(), &candidate.text());
    }
}

/// As [`dump`], of one text.
pub fn write(name: &str, text: &str) {
    if let Some(directory) = std::env::var_os("KERNEL_TEXTS") {
        let digest = blake3::hash(text.as_bytes()).to_hex();
        let path = std::path::Path::new(&directory).join(format!("{name}-{}.cu", &digest[..8]));
        std::fs::write(&path, text).unwrap_or_else(|fault| panic!("{}: {fault}", path.display()));
    }
}
