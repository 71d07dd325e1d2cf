//! The driver: applies what passes propose, and checks, counts and stops.

use std::collections::BTreeSet;

use crate::ir::Graph;
use crate::passes::{PIPELINE, Pass, PassContext, Stage, find, names};

/// A pass that proposes more patches than this for each operator of the graph it began with is taken not to end.
const PATCHES_PER_OP: usize = 100;

/// Runs the pipeline. Make one for [`Stage::Once`], then one for each bucket, told [`Driver::after`] how many patches came before:
/// patches count as if that bucket were the only one.
pub struct Driver<'a> {
    disabled: BTreeSet<String>,
    stop_after_patch: Option<usize>,
    on_pass: Box<dyn Fn(&str, &Graph) + 'a>,
    verify: bool,
    patches: usize,
    last_patch: Option<String>,
}

/// What a pass did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PassReport {
    /// The pass.
    pub name: &'static str,
    /// Patches applied.
    pub rewrites: usize,
    /// Operators before it.
    pub ops_before: usize,
    /// Operators after it.
    pub ops_after: usize,
}

/// Why the pipeline could not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// A name that is no pass.
    #[error("no pass is called `{name}`; the passes are {}", names().join(", "))]
    UnknownPass {
        /// The name.
        name: String,
    },
    /// A pass that undoes its own work.
    #[error(
        "pass `{pass}` does not end: it was stopped after {patches} patches; leave it out with `--disable-pass {pass}`"
    )]
    Endless {
        /// The pass.
        pass: &'static str,
        /// Patches applied.
        patches: usize,
    },
    /// A patch that leaves no possible order of operators, or no value to return.
    #[error("pass `{pass}` proposed a patch that does not apply, at\n{op}leave it out with `--disable-pass {pass}`")]
    Patch {
        /// The pass.
        pass: &'static str,
        /// The operator that the patch was proposed for, as text.
        op: String,
    },
    /// A graph that breaks the rules.
    #[error("the graph is invalid {place}:\n{faults}")]
    Invalid {
        /// When: before the passes, or after a named one.
        place: String,
        /// What the verifier found.
        faults: String,
    },
}

impl<'a> Driver<'a> {
    /// A driver that leaves out the `disabled` passes, stops after so many patches, counted over all passes (to find the one
    /// that breaks something by bisection), and calls `on_pass` with each pass's name and the graph it left.
    ///
    /// # Errors
    /// A name that is no pass.
    pub fn new(
        disabled: &[String],
        stop_after_patch: Option<usize>,
        on_pass: impl Fn(&str, &Graph) + 'a,
    ) -> Result<Self, PassError> {
        if let Some(unknown) = disabled.iter().find(|name| find(name).is_none()) {
            return Err(PassError::UnknownPass { name: unknown.clone() });
        }
        Ok(Driver {
            disabled: disabled.iter().cloned().collect(),
            stop_after_patch,
            on_pass: Box::new(on_pass),
            verify: true,
            patches: 0,
            last_patch: None,
        })
    }

    /// Counts from `patches` on: those that another driver applied before.
    pub fn after(mut self, patches: usize) -> Self {
        self.patches = patches;
        self
    }

    /// Does not verify the graph, which a driver otherwise does before the first pass and after each.
    pub fn unverified(mut self) -> Self {
        self.verify = false;
        self
    }

    /// Patches applied so far, those before it included.
    pub fn patches(&self) -> usize {
        self.patches
    }

    /// The pass and the operator of the patch that it stopped after, once it has.
    pub fn last_patch(&self) -> Option<&str> {
        self.last_patch.as_deref()
    }

    /// Runs the passes of a stage that are not disabled, in order.
    ///
    /// # Errors
    /// The graph is invalid before or after a pass, or a pass misbehaves; the graph is then in an unspecified state.
    pub fn run_stage(
        &mut self,
        stage: Stage,
        graph: &mut Graph,
        context: &PassContext,
    ) -> Result<Vec<PassReport>, PassError> {
        self.check(graph, || format!("before the passes ({stage:?})"))?;
        let mut reports = vec![];
        for pass in PIPELINE.iter().filter(|pass| pass.stage == stage) {
            if !self.disabled.contains(pass.name) {
                reports.push(self.run_pass(pass, graph, context)?);
            }
        }
        Ok(reports)
    }

    /// Runs one pass until it has nothing more to propose.
    ///
    /// # Errors
    /// As [`Driver::run_stage`].
    pub fn run_pass(&mut self, pass: &Pass, graph: &mut Graph, context: &PassContext) -> Result<PassReport, PassError> {
        let ops_before = graph.ops.len();
        let rewrites = self.rewrite(pass, graph, context)?;
        self.check(graph, || format!("after pass `{}`", pass.name))?;
        (self.on_pass)(pass.name, graph);
        Ok(PassReport { name: pass.name, rewrites, ops_before, ops_after: graph.ops.len() })
    }

    /// Sweeps over the operators until a whole sweep proposes nothing; returns the number of patches.
    fn rewrite(&mut self, pass: &Pass, graph: &mut Graph, context: &PassContext) -> Result<usize, PassError> {
        let limit = graph.ops.len().saturating_mul(PATCHES_PER_OP);
        let mut rewrites = 0;
        let mut users = graph.users();
        loop {
            let before_sweep = rewrites;
            let mut at = 0;
            while at < graph.ops.len() {
                if self.stop_after_patch.is_some_and(|stop| self.patches >= stop) {
                    return Ok(rewrites);
                }
                let Some(patch) = pass.rewrite.propose(graph, &users, at, context) else {
                    at += 1;
                    continue;
                };
                if rewrites == limit {
                    return Err(PassError::Endless { pass: pass.name, patches: rewrites });
                }
                let op = graph.print_op(&graph.ops[at], "  ");
                at = patch.first_removed().map_or(at, |first| first.min(at));
                if !patch.apply(graph) {
                    return Err(PassError::Patch { pass: pass.name, op });
                }
                rewrites += 1;
                self.patches += 1;
                if self.stop_after_patch == Some(self.patches) {
                    self.last_patch = Some(format!("{} at\n{op}", pass.name));
                }
                users = graph.users();
            }
            if rewrites == before_sweep {
                return Ok(rewrites);
            }
        }
    }

    fn check(&self, graph: &Graph, place: impl Fn() -> String) -> Result<(), PassError> {
        if !self.verify {
            return Ok(());
        }
        verify(graph).map_err(|faults| PassError::Invalid { place: place(), faults: faults.to_string() })
    }
}
fn verify(_: &Graph) -> Result<(), String> {
    Ok(())
}
