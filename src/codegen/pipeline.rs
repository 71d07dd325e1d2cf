//! What the passes make of a graph for one rank: each bucket's final graph, scheduled and placed.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow};
use rayon::prelude::*;

use crate::codegen::CompileOptions;
use crate::codegen::compile::{BucketReport, Observer};
use crate::codegen::lower::{self, Prepared};
use crate::codegen::select::Selector;
use crate::ir::Graph;
use crate::passes::driver::{Driver, PassReport};
use crate::passes::{
    BucketSpec, ExpertShare, LayerShare, PLAN_MEMORY, PassContext, SCHEDULE, Stage, place_apart, plan_memory, schedule,
    schedule_in_sequence,
};
use crate::plan::ALIGNMENT;

/// The passes with their choices, for ranks one after the other.
pub(super) struct Pipeline<'a> {
    pub(super) options: &'a CompileOptions,
    pub(super) observer: &'a dyn Observer,
    pub(super) specs: &'a [BucketSpec],
    pub(super) selector: Option<&'a Selector<'a>>,
    pub(super) ranks: usize,
}

/// What a rank has of a model that is spread over several.
#[derive(Clone)]
pub(super) struct Share {
    pub(super) experts: Option<ExpertShare>,
    pub(super) layers: Option<LayerShare>,
}

/// A rank's buckets, and what each pass did.
pub(super) struct Passed {
    pub(super) once: Vec<PassReport>,
    pub(super) buckets: Vec<BucketReport>,
    pub(super) prepared: Vec<Prepared>,
}

impl Pipeline<'_> {
    /// Runs all passes for a rank; texts that `texts` has not yet are added.
    pub(super) fn run(&self, mut graph: Graph, share: Share, rank: usize, texts: &mut Vec<String>) -> Result<Passed> {
        let context = |bucket| {
            let Share { experts, layers } = share.clone();
            PassContext { target: self.options.target, bucket, experts, layers }
        };
        let mut first = self.driver(None, rank)?;
        let once = first.run_stage(Stage::Once, &mut graph, &context(self.specs[0]))?;
        let patches = first.patches();
        let done = AtomicUsize::new(rank * self.specs.len());
        let compiled: Vec<(Graph, BucketReport)> = self
            .specs
            .par_iter()
            .map(|spec| {
                let bucket = self.bucket(graph.clone(), &context(*spec), patches, rank)?;
                self.observer.progress(1 + done.fetch_add(1, Ordering::Relaxed), self.ranks * self.specs.len());
                Ok(bucket)
            })
            .collect::<Result<_>>()?;
        let mut buckets = vec![];
        let mut named = vec![];
        for (spec, (graph, mut report)) in self.specs.iter().zip(compiled) {
            let text = graph.to_string();
            let at = texts.iter().position(|known| *known == text).unwrap_or_else(|| {
                texts.push(text);
                texts.len() - 1
            });
            for name in [SCHEDULE, PLAN_MEMORY].into_iter().filter(|name| self.enabled(name)) {
                let ops = graph.ops.len();
                report.passes.push(PassReport { name, rewrites: 0, ops_before: ops, ops_after: ops });
                if rank == 0 {
                    self.observer.pass(Some(&spec.name()), name, &graph);
                }
            }
            buckets.push(report);
            named.push((*spec, graph, at as u32));
        }
        let prepared: Result<Vec<Prepared>, String> =
            named.into_par_iter().map(|(spec, graph, text)| self.prepare(spec, graph, text)).collect();
        Ok(Passed { once, buckets, prepared: prepared.map_err(|fault| anyhow!(fault))? })
    }

    fn driver(&self, bucket: Option<String>, rank: usize) -> Result<Driver<'_>> {
        let observer = self.observer;
        let hook = move |pass: &str, graph: &Graph| {
            if rank == 0 {
                observer.pass(bucket.as_deref(), pass, graph);
            }
        };
        Driver::new(&self.options.disabled, self.options.stop_after_patch, hook).map_err(|fault| anyhow!(fault))
    }

    /// The final graph of a bucket.
    fn bucket(
        &self,
        mut graph: Graph,
        context: &PassContext,
        patches: usize,
        rank: usize,
    ) -> Result<(Graph, BucketReport)> {
        let (spec, phase) = (context.bucket, lower::plan_phase(context.bucket.phase));
        let optional = RefCell::new(BTreeSet::new());
        let mut driver = self.driver(Some(spec.name()), rank)?.after(patches);
        if let Some(selector) = self.selector {
            driver = driver
                .admitting(|graph, op| selector.admits(graph, op, phase, &spec.extents, &mut optional.borrow_mut()));
        }
        let passes = driver.run_stage(Stage::PerBucket, &mut graph, context)?;
        drop(driver);
        if let Some(selector) = self.selector {
            selector.dissolve(&mut graph, phase, &spec.extents).map_err(|fault| anyhow!(fault))?;
        }
        Ok((graph, BucketReport { name: spec.name(), passes, optional: optional.into_inner() }))
    }

    fn prepare(&self, spec: BucketSpec, graph: Graph, text: u32) -> Result<Prepared, String> {
        let mut schedule = if self.enabled(SCHEDULE) { schedule(&graph) } else { schedule_in_sequence(&graph) };
        let placement = if self.enabled(PLAN_MEMORY) {
            plan_memory(&graph, &mut schedule, &spec.extents, ALIGNMENT)?
        } else {
            place_apart(&graph, &schedule, &spec.extents, ALIGNMENT)?
        };
        Ok(Prepared { spec, graph, schedule, placement, text })
    }

    fn enabled(&self, name: &str) -> bool {
        !self.options.disabled.iter().any(|disabled| disabled == name)
    }
}
