//! Which kernel runs which step: the registry's default, or what tactics say.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use crate::codegen::kernels::{Candidate, Problem, candidates};
use crate::codegen::semantic;
use crate::ir::{Extents, Graph, Op};
use crate::plan::{Phase, Semantic};

/// Choices among candidates, beside which the registry's first is taken.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Tactics {
    /// For a problem (see [`problem_key`]) the candidate's name.
    pub chosen: BTreeMap<String, String>,
    /// Takes each problem's candidate of this position, modulo their number: for tests that run all of them.
    pub nth: Option<usize>,
}

/// A name for a problem that stays the same from run to run.
pub fn problem_key(problem: &Problem) -> String {
    let text = format!("{:?} {:?}", problem.phase, problem.semantic);
    format!("{} {}", problem.semantic.name, &blake3::hash(text.as_bytes()).to_hex()[..16])
}

/// Chooses, and remembers what it chose.
pub struct Selector<'a> {
    tactics: &'a Tactics,
    known: Mutex<HashMap<String, Option<Arc<Candidate>>>>,
}

impl<'a> Selector<'a> {
    /// A selector that goes by these tactics.
    pub fn new(tactics: &'a Tactics) -> Self {
        Selector { tactics, known: Mutex::default() }
    }

    /// The candidate for a step, if any kernel can run it.
    pub fn choose(&self, semantic: &Semantic, phase: Phase) -> Option<Arc<Candidate>> {
        let key = format!("{phase:?} {semantic:?}");
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(&key) {
            return found.clone();
        }
        let problem = Problem { semantic, phase };
        let mut list = candidates(&problem);
        let at = match self.tactics.nth {
            Some(nth) if !list.is_empty() => nth % list.len(),
            _ if self.tactics.chosen.is_empty() => 0,
            _ => {
                let wanted = self.tactics.chosen.get(&problem_key(&problem));
                wanted.and_then(|wanted| list.iter().position(|found| found.name() == *wanted)).unwrap_or(0)
            }
        };
        let chosen = (at < list.len()).then(|| Arc::new(list.swap_remove(at)));
        known().insert(key, chosen.clone());
        chosen
    }

    /// Whether a kernel can run an operator of a graph.
    pub fn runs(&self, graph: &Graph, op: &Op, phase: Phase, extents: &Extents) -> bool {
        let lowered = semantic::lower(graph, op, &graph.state_roots(), extents);
        lowered.is_ok_and(|lowered| self.choose(&lowered.semantic, phase).is_some())
    }

    /// Takes apart each fused operator that no kernel can run.
    ///
    /// # Errors
    /// A primitive that no kernel can run.
    pub fn dissolve(&self, graph: &mut Graph, phase: Phase, extents: &Extents) -> Result<(), String> {
        let roots = graph.state_roots();
        let runs = |op: &Op| -> Result<bool, String> {
            Ok(self.choose(&semantic::lower(graph, op, &roots, extents)?.semantic, phase).is_some())
        };
        let mut ops = vec![];
        for op in &graph.ops {
            if runs(op)? {
                ops.push(op.clone());
                continue;
            }
            for inner in op.primitives() {
                if !runs(inner)? {
                    return Err(format!("no kernel for\n{}on this target", graph.print_op(inner, "  ")));
                }
                ops.push(inner.clone());
            }
        }
        graph.ops = ops;
        Ok(())
    }
}
