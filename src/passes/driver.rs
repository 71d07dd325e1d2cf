//! The driver: applies what passes propose, and checks, counts and stops.

use std::collections::BTreeSet;

use crate::ir::{Graph, Op, verify};
use crate::passes::{PIPELINE, Pass, PassContext, Patch, Stage, names};

/// A pass that proposes more patches than this for each operator of the graph it began with is taken not to end.
const PATCHES_PER_OP: usize = 100;

/// Called with a pass's name and the graph it left.
type OnPass<'a> = Box<dyn Fn(&str, &Graph) + 'a>;

/// Says whether an operator that a pass would fuse can run.
type Admits<'a> = Box<dyn Fn(&Graph, &Op) -> bool + 'a>;

/// Runs the pipeline. Make one for [`Stage::Once`], then one for each bucket, told [`Driver::after`] how many patches came before:
/// patches count as if that bucket were the only one.
pub struct Driver<'a> {
    disabled: BTreeSet<String>,
    stop_after_patch: Option<usize>,
    on_pass: OnPass<'a>,
    admits: Option<Admits<'a>>,
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
        if let Some(unknown) = disabled.iter().find(|name| !names().contains(&name.as_str())) {
            return Err(PassError::UnknownPass { name: unknown.clone() });
        }
        Ok(Driver {
            disabled: disabled.iter().cloned().collect(),
            stop_after_patch,
            on_pass: Box::new(on_pass),
            verify: true,
            patches: 0,
            last_patch: None,
            admits: None,
        })
    }

    /// Counts from `patches` on: those that another driver applied before.
    pub fn after(mut self, patches: usize) -> Self {
        self.patches = patches;
        self
    }

    /// Applies only those fusions whose operator can run.
    pub fn admitting(mut self, admits: impl Fn(&Graph, &Op) -> bool + 'a) -> Self {
        self.admits = Some(Box::new(admits));
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
                let proposed = pass.rewrite.propose(graph, &users, at, context);
                let admitted = |patch: &Patch| match (&self.admits, patch.fused()) {
                    (Some(admits), Some(op)) => admits(graph, op),
                    _ => true,
                };
                let Some(patch) = proposed.filter(admitted) else {
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;
    use crate::ir::testing::graphs;
    use crate::ir::{BinaryFn, Extents, Op, OpKind, Operand, Users, parse};
    use crate::passes::{BucketSpec, Patch, Phase, Rewrite, Target};

    fn context() -> PassContext {
        let extents = Extents { tokens: 4, sequences: 4, rows: 4 };
        PassContext {
            target: Target::Cpu,
            bucket: BucketSpec { phase: Phase::Fixed, extents },
            experts: None,
            layers: None,
        }
    }

    fn chain() -> Graph {
        let text = "graph @g (%x: f32[T,8]) {
            %a = mul 1.0, %x : f32[T,8]
            %b = add 0.0, %a : f32[T,8]
            %unused = exp %b : f32[T,8]
            %c = tanh %b : f32[T,8]
            return %c
        }";
        parse(text).expect("the text is a graph").graph
    }

    fn run(driver: &mut Driver, rewrite: &'static dyn Rewrite, graph: &mut Graph) -> Result<PassReport, PassError> {
        let pass = Pass { name: "test", summary: "", stage: Stage::Once, rewrite };
        driver.run_pass(&pass, graph, &context())
    }

    fn driver() -> Driver<'static> {
        Driver::new(&[], None, |_, _| ()).expect("no name is unknown")
    }

    #[test]
    fn fusions_that_cannot_run_are_not_applied() {
        let fuse = crate::passes::find("fuse-pointwise").expect("it is a pass");
        let (mut free, mut refused) = (chain(), chain());
        let applied = driver().run_pass(fuse, &mut free, &context()).expect("the graph is valid");
        assert!(applied.rewrites > 0 && free.ops.iter().any(|op| !op.body.is_empty()));
        let mut strict = driver().admitting(|_, op| op.body.is_empty());
        let report = strict.run_pass(fuse, &mut refused, &context()).expect("the graph is valid");
        assert_eq!((report.rewrites, refused.to_string()), (0, chain().to_string()));
    }

    #[test]
    fn a_stage_runs_its_passes_in_order_and_reports_each() {
        let seen = RefCell::new(vec![]);
        let hook = |name: &str, graph: &Graph| seen.borrow_mut().push((name.to_owned(), graph.ops.len()));
        let mut driver = Driver::new(&["cse".to_owned()], None, hook).expect("cse is a pass");
        let mut graph = chain();
        let reports = driver.run_stage(Stage::Once, &mut graph, &context()).expect("the graph is valid");
        let names_of_stage: Vec<&str> =
            PIPELINE.iter().filter(|p| p.stage == Stage::Once && p.name != "cse").map(|p| p.name).collect();
        assert_eq!(reports.iter().map(|report| report.name).collect::<Vec<_>>(), names_of_stage);
        assert_eq!(reports[0], PassReport { name: "canonicalize", rewrites: 4, ops_before: 4, ops_after: 2 });
        assert_eq!(reports[1], PassReport { name: "dce", rewrites: 1, ops_before: 2, ops_after: 1 });
        assert_eq!(driver.patches(), 5);
        drop(driver);
        assert_eq!(seen.into_inner()[..2], [("canonicalize".to_owned(), 2), ("dce".to_owned(), 1)]);
    }

    #[test]
    fn names_are_unique_and_unknown_ones_are_refused() {
        let unique: BTreeSet<&str> = names().into_iter().collect();
        // Those that rewrite, schedule and plan-memory.
        assert_eq!(unique.len(), PIPELINE.len() + 2);
        let error = Driver::new(&["fuse-all".to_owned()], None, |_, _| ()).err().expect("no such pass");
        let text = error.to_string();
        assert!(text.contains("`fuse-all`") && text.contains("canonicalize, cse, dce"), "{text}");
    }

    #[test]
    fn stops_after_any_patch_with_a_valid_graph() {
        for stop in 0..=6 {
            let mut driver = Driver::new(&[], Some(stop), |_, _| ()).expect("no name is unknown");
            let mut graph = chain();
            driver.run_stage(Stage::Once, &mut graph, &context()).expect("every prefix leaves a valid graph");
            assert_eq!(driver.patches(), stop.min(5));
            assert_eq!(driver.last_patch().is_some(), (1..=5).contains(&stop));
            let mut next = Driver::new(&[], Some(5), |_, _| ()).expect("no name is unknown").after(driver.patches());
            next.run_stage(Stage::Once, &mut graph, &context()).expect("the rest applies as well");
            assert_eq!((next.patches(), graph.ops.len()), (5, 1), "stopped after {stop} and went on");
        }
        let mut driver = Driver::new(&[], Some(5), |_, _| ()).expect("no name is unknown");
        driver.run_stage(Stage::Once, &mut chain(), &context()).expect("the graph is valid");
        assert_eq!(driver.last_patch(), Some("dce at\n  %unused = exp %x : f32[T,8]\n"));
    }

    /// Exchanges operands for ever.
    struct Flip;
    impl Rewrite for Flip {
        fn propose(&self, graph: &Graph, _: &Users, at: usize, _: &PassContext) -> Option<Patch> {
            let mut op = graph.ops[at].clone();
            op.operands.reverse();
            (op.kind == OpKind::Binary(BinaryFn::Mul)).then(|| Patch::new(graph).remove(at).insert(op))
        }
    }

    #[test]
    fn a_pass_that_does_not_end_is_named() {
        let error = run(&mut driver(), &Flip, &mut chain()).expect_err("it never ends");
        assert!(matches!(error, PassError::Endless { pass: "test", patches: 400 }), "{error}");
    }

    /// Makes the first operator use the last one's result.
    struct Circle;
    impl Rewrite for Circle {
        fn propose(&self, graph: &Graph, _: &Users, _: usize, _: &PassContext) -> Option<Patch> {
            let last = graph.ops.last()?.results[0];
            let op = Op { operands: vec![last.into(), Operand::Const(1.0)], ..graph.ops[0].clone() };
            Some(Patch::new(graph).remove(0).insert(op))
        }
    }

    #[test]
    fn a_circle_is_an_error_with_the_operator() {
        let error = run(&mut driver(), &Circle, &mut chain()).expect_err("there is no order");
        assert!(error.to_string().contains("%a = mul 1.0, %x"), "{error}");
    }

    /// Gives the first result another shape.
    struct Reshape;
    impl Rewrite for Reshape {
        fn propose(&self, graph: &Graph, users: &Users, at: usize, _: &PassContext) -> Option<Patch> {
            let op = &graph.ops[at];
            let mut ty = graph.ty(op.results[0]).clone();
            let mut patch = Patch::new(graph);
            if at > 0 || ty.shape.len() == 1 || users.is_output(op.results[0]) {
                return None;
            }
            ty.shape.pop();
            let wrong = patch.value("wrong", ty);
            Some(patch.remove(0).insert(Op { results: vec![wrong], ..op.clone() }).replace(op.results[0], wrong.into()))
        }
    }

    #[test]
    fn an_invalid_graph_is_found_after_the_pass_that_made_it() {
        let error = run(&mut driver(), &Reshape, &mut chain()).expect_err("the shapes do not fit");
        assert!(error.to_string().starts_with("the graph is invalid after pass `test`"), "{error}");
        let mut unverified = driver().unverified();
        assert_eq!(run(&mut unverified, &Reshape, &mut chain()).expect("nobody looks").rewrites, 1);
    }

    proptest! {
        #[test]
        fn every_pass_and_all_in_turn_leave_random_graphs_valid(graph in graphs()) {
            let mut whole = graph.clone();
            let mut all = driver();
            for pass in PIPELINE {
                let mut alone = graph.clone();
                let report = driver().run_pass(pass, &mut alone, &context());
                prop_assert!(report.is_ok(), "{} alone: {}", pass.name, report.unwrap_err());
                let report = all.run_pass(pass, &mut whole, &context());
                prop_assert!(report.is_ok(), "{} in turn: {}", pass.name, report.unwrap_err());
            }
            prop_assert_eq!(whole.outputs.len(), graph.outputs.len());
        }
    }
}
