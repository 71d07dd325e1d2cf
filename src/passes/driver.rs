//! The driver: applies what passes propose, and checks, counts and stops.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::ir::Graph;
use crate::passes::{PIPELINE, Pass, PassContext, Stage, find, names};

/// A pass that proposes more patches than this for each operator of the graph it began with is taken not to end.
const PATCHES_PER_OP: usize = 100;

/// Called with a pass's name and the graph it left.
pub type OnPass = Arc<dyn Fn(&str, &Graph) + Send + Sync>;

/// Runs the pipeline. A clone goes on from where the original is: run [`Stage::Once`], then give each bucket a clone of the
/// driver and of the graph, and patches count as if that bucket were the only one.
#[derive(Clone)]
pub struct Driver {
    disabled: BTreeSet<String>,
    /// Stops after this many patches, counted over all passes: to find the patch that breaks something by bisection.
    pub stop_after_patch: Option<usize>,
    /// Verifies the graph before the first and after every pass.
    pub verify: bool,
    /// Called after every pass.
    pub on_pass: Option<OnPass>,
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
    #[error("no pass is called `{name}`; the passes are {}", names().collect::<Vec<_>>().join(", "))]
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

impl Default for Driver {
    fn default() -> Self {
        Driver {
            disabled: BTreeSet::new(),
            stop_after_patch: None,
            verify: true,
            on_pass: None,
            patches: 0,
            last_patch: None,
        }
    }
}

impl Driver {
    /// Leaves passes out.
    ///
    /// # Errors
    /// A name that is no pass.
    pub fn disable<N: Into<String>>(mut self, passes: impl IntoIterator<Item = N>) -> Result<Self, PassError> {
        for name in passes.into_iter().map(Into::into) {
            if find(&name).is_none() {
                return Err(PassError::UnknownPass { name });
            }
            self.disabled.insert(name);
        }
        Ok(self)
    }

    /// Patches applied so far.
    pub fn patches(&self) -> usize {
        self.patches
    }

    /// The pass and the operator of the patch after which [`Driver::stop_after_patch`] stopped, once it has.
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
        if let Some(on_pass) = &self.on_pass {
            on_pass(pass.name, graph);
        }
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
        verify(graph)
            .map_err(|faults| PassError::Invalid { place: place(), faults: faults.to_string() })
    }
}
fn verify(_: &Graph) -> Result<(), String> { Ok(()) }
