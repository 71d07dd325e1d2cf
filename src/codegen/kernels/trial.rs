//! What tests of twins share.

use super::{Candidate, Problem, Specialised, Twin};
use crate::plan::{DType, Instr, Phase, Semantic, TensorType};

/// A semantic of these types and this body.
pub fn semantic(
    inputs: &[(DType, Vec<u64>)],
    outputs: &[(DType, Vec<u64>)],
    temps: &[(DType, Vec<u64>)],
    body: Vec<Instr>,
) -> Semantic {
    let types = |list: &[(DType, Vec<u64>)]| list.iter().map(|(d, s)| TensorType(*d, s.clone())).collect();
    Semantic { name: "test".into(), inputs: types(inputs), outputs: types(outputs), temps: types(temps), body }
}

/// A twin's candidates.
pub fn candidates(twin: &dyn Twin, semantic: &Semantic) -> Vec<Specialised> {
    twin.candidates(&Problem { semantic, phase: Phase::Decode })
}

/// Writes a candidate's text to `$KERNEL_TEXTS/TWIN.LABEL.cu`, if that folder is given: to look at it, or to compile it.
pub fn write_text(twin: &'static dyn Twin, semantic: &Semantic, at: usize, label: &str) {
    let Ok(folder) = std::env::var("KERNEL_TEXTS") else { return };
    let specialised = candidates(twin, semantic).swap_remove(at);
    let launch = format!("// {:?} {}\n", specialised.launch, specialised.config);
    let text = launch + &Candidate { twin, specialised }.text();
    std::fs::write(format!("{folder}/{}.{label}.cu", twin.name()), text).expect("the folder can be written");
}
