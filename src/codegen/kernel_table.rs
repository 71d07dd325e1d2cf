//! The kernels of a plan, each once, whichever steps of whichever ranks launch it.

use std::collections::HashMap;

use crate::codegen::cubins::Source;
use crate::codegen::kernels::Candidate;
use crate::plan::{Kernel, Target};

/// Kernels without machine code, and what each is compiled from.
#[derive(Default)]
pub struct KernelTable {
    /// As the plan lists them.
    pub kernels: Vec<Kernel>,
    /// What each of them is compiled from.
    pub sources: Vec<Source>,
    /// Positions, by the hash of the source.
    ids: HashMap<String, u32>,
}

impl KernelTable {
    /// The position of a candidate's kernel, which is added if it is new.
    pub fn add(&mut self, candidate: &Candidate) -> u32 {
        let source = Source { name: candidate.twin.name().to_owned(), text: candidate.text() };
        let hash = source.hash(Target::Sm_90a);
        let next = self.kernels.len() as u32;
        let id = *self.ids.entry(hash.clone()).or_insert(next);
        if id == next {
            self.kernels.push(Kernel {
                name: source.name.clone(),
                config: candidate.specialised.config.clone(),
                source: hash,
                params: candidate.specialised.params.clone(),
                cubin: None,
            });
            self.sources.push(source);
        }
        id
    }
}
