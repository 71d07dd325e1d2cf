//! The ways to run a step: kernels and libraries.

use super::{Allowed, Libraries, Pack};
use crate::codegen::kernels::{Candidate, Problem, candidates};
use crate::plan::{Arg, LibraryCall, Phase};

/// A way to run a step.
pub enum Way {
    /// By a kernel.
    Kernel(Candidate),
    /// By a library.
    Library(LibraryCall),
}

impl Way {
    /// What tactics call it: `stream rows=16 warps=8`, `cublaslt`.
    pub fn name(&self) -> String {
        match self {
            Way::Kernel(candidate) => candidate.name(),
            Way::Library(call) => call.name().to_owned(),
        }
    }

    /// The kernel, if it is one.
    pub fn kernel(&self) -> Option<&Candidate> {
        match self {
            Way::Kernel(candidate) => Some(candidate),
            Way::Library(_) => None,
        }
    }

    /// Whether it reads the packed form of a weight.
    pub fn reads_packed(&self) -> bool {
        let args = self.kernel().map_or(&[][..], |candidate| &candidate.specialised.launch.args);
        args.iter().any(|arg| matches!(arg, Arg::Packed(_)))
    }

    /// Whether it multiplies numbers of f32 as such.
    pub fn exact(&self) -> bool {
        self.kernel().is_none_or(|candidate| candidate.twin.exact())
    }
}

/// The call that a step may be where libraries are allowed. Steps of decode are none: their neighbours overlap, and no kernel does with a
/// library's.
pub fn library_call(problem: &Problem) -> Option<LibraryCall> {
    if problem.phase == Phase::Decode { None } else { LibraryCall::of(problem.semantic) }
}

/// The ways to run a step that may be chosen: kernels, the default first, and behind them a library, which is never the default.
pub fn admitted(problem: &Problem, allowed: impl Into<Allowed>) -> Vec<Way> {
    let Allowed { pack, libraries } = allowed.into();
    let mut list: Vec<Way> = candidates(problem).into_iter().map(Way::Kernel).collect();
    if pack == Pack::Never {
        list.retain(|found| !found.reads_packed());
    }
    if libraries != Libraries::Never && !list.is_empty() {
        list.extend(library_call(problem).map(Way::Library));
    }
    list
}
