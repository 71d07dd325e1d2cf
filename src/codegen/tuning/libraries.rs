//! The choice between the kernel that tactics choose and a library, for the problems that a library has a call for: by whole graphs, beside
//! the time of each by itself. Who measures is not said here, as in [`super`].

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

use super::{round, typical};
use crate::codegen::CompileOptions;
use crate::codegen::lock::{Lock, Measured, Time};
use crate::codegen::refine::{Entry, Refined};
use crate::codegen::select::{Pack, Selector, Tactics, library_call, problem_key, step_problems};
use crate::plan::{Arg, Kernel, Manifest, Step};

/// What runs a step that nothing runs.
const NOTHING: &str = "neither a kernel nor a library";

/// A problem that a library has a call for.
#[derive(Clone, PartialEq, Debug)]
pub struct LibraryTrial {
    /// The problem.
    pub key: String,
    /// Position of its bucket, and its name.
    pub bucket: (usize, String),
    /// Its steps, by position in the bucket.
    pub steps: Vec<usize>,
    /// The kernel that is chosen without the library, and its median time in microseconds.
    pub kernel: (String, Option<f64>),
    /// The kernel that is chosen where none may read packed weights: the same, unless that one does.
    pub plain: String,
    /// The library, and its time.
    pub library: (String, Option<f64>),
    /// Whether whole graphs choose the library; none as long as none were timed.
    pub chosen: Option<bool>,
}

impl LibraryTrial {
    /// Which of both whole graphs choose, if they were timed.
    fn choice(&self) -> Option<&str> {
        Some(if self.chosen? { &self.library.0 } else { &self.kernel.0 })
    }
}

/// Those of a plan.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct LibraryTrials {
    /// In the order of the plan's steps.
    pub list: Vec<LibraryTrial>,
}

impl LibraryTrials {
    /// Nothing measured yet of the problems of the first rank of a plan of kernels alone, which was compiled with these options.
    ///
    /// # Errors
    /// A step without a kernel.
    pub fn of(manifest: &Manifest, options: &CompileOptions) -> Result<LibraryTrials> {
        let mut list: Vec<LibraryTrial> = vec![];
        let Some(program) = manifest.ranks.first() else { return Ok(LibraryTrials::default()) };
        let unpacked = Selector::new(&options.tactics, options.f32, Pack::Never);
        let mut positions = vec![0usize; program.buckets.len()];
        let runner = |step: &Step| manifest.runner(step).unwrap_or_else(|| NOTHING.into());
        for (at, problem) in step_problems(program) {
            let bucket = &program.buckets[at];
            let step = positions[at];
            positions[at] += 1;
            let Some(call) = library_call(&problem) else { continue };
            let key = problem_key(&problem);
            if let Some(known) = list.iter_mut().find(|trial| trial.key == key && trial.bucket.0 == at) {
                known.steps.push(step);
                continue;
            }
            let fault = || {
                format!(
                    "bucket {}, step {step}, problem {key}: expected a kernel, found {}; measure its kernels with --tune, or take \
                     the problem out of the lock file",
                    bucket.name,
                    bucket.steps.get(step).map_or_else(|| "no step".into(), runner)
                )
            };
            let launch = bucket.steps.get(step).and_then(|step| step.launch.as_ref()).with_context(fault)?;
            let kernel = manifest.kernels.get(launch.kernel as usize).map(Kernel::title).with_context(fault)?;
            let plain = match launch.args.iter().any(|arg| matches!(arg, Arg::Packed(_))) {
                true => unpacked.choose(problem.semantic, problem.phase).with_context(fault)?.name(),
                false => kernel.clone(),
            };
            list.push(LibraryTrial {
                key,
                bucket: (at, bucket.name.clone()),
                steps: vec![step],
                kernel: (kernel, None),
                plain,
                library: (call.name().to_owned(), None),
                chosen: None,
            });
        }
        Ok(LibraryTrials { list })
    }

    /// Tactics that have the library run all of these problems of a bucket, and kernels those of which `libraries` is false. Nothing
    /// that the base says of these problems goes before that.
    pub fn tactics(&self, bucket: usize, base: &Tactics, libraries: bool) -> Tactics {
        let mut tactics = Tactics { library: BTreeMap::new(), ..base.clone() };
        for trial in self.of_bucket(bucket) {
            let (name, _) = if libraries { &trial.library } else { &trial.kernel };
            tactics.packed.remove(&trial.key);
            tactics.measured.remove(&trial.key);
            tactics.chosen.insert(trial.key.clone(), name.clone());
        }
        tactics
    }

    /// Makes sure that a plan runs these problems of a bucket as [`LibraryTrials::tactics`] say; `own` is the bucket's position in the plan.
    ///
    /// # Errors
    /// A step is run by something else, so that its time would be recorded as that of another.
    pub fn check(&self, bucket: usize, manifest: &Manifest, own: usize, libraries: bool) -> Result<()> {
        let steps = manifest.ranks.first().and_then(|program| program.buckets.get(own)).map(|bucket| &bucket.steps);
        let runner = |step: &Step| manifest.runner(step).unwrap_or_else(|| NOTHING.into());
        for trial in self.of_bucket(bucket) {
            let (expected, _) = if libraries { &trial.library } else { &trial.kernel };
            for &at in &trial.steps {
                let step = steps.and_then(|steps| steps.get(at));
                let found = step.map_or_else(|| "no step".into(), runner);
                if found != *expected {
                    bail!(
                        "bucket {}, step {at}, problem {}: expected {expected} to measure, found {found}; measure with --tune instead, \
                         or without --pack",
                        trial.bucket.1,
                        trial.key
                    );
                }
            }
        }
        Ok(())
    }

    /// Those of a bucket.
    pub fn of_bucket(&self, bucket: usize) -> impl Iterator<Item = &LibraryTrial> {
        self.list.iter().filter(move |trial| trial.bucket.0 == bucket)
    }

    /// Takes in the times of a bucket's steps in microseconds, by kernels or by libraries.
    ///
    /// # Errors
    /// Times of fewer steps than the bucket has.
    pub fn record(&mut self, bucket: usize, times: &[f64], libraries: bool) -> Result<()> {
        for trial in self.list.iter_mut().filter(|trial| trial.bucket.0 == bucket) {
            let found = trial.steps.iter().map(|&step| times.get(step).copied()).collect::<Option<Vec<f64>>>();
            let mut samples = found.with_context(|| format!("bucket {}: times of {} steps", bucket, times.len()))?;
            ensure!(!samples.is_empty(), "bucket {bucket}: a problem without steps");
            let us = typical(&mut samples);
            let (_, time) = if libraries { &mut trial.library } else { &mut trial.kernel };
            *time = Some(us);
        }
        Ok(())
    }

    /// Leaves out the problems of some steps of a bucket, because the library has no algorithm for them.
    ///
    /// # Errors
    /// None of the steps is one of a library's.
    pub fn leave_out(&mut self, bucket: usize, steps: &[usize]) -> Result<()> {
        let before = self.list.len();
        self.list.retain(|trial| trial.bucket.0 != bucket || !trial.steps.iter().any(|step| steps.contains(step)));
        ensure!(
            self.list.len() < before,
            "bucket {bucket}: the device refuses kernels of steps {steps:?}; measure with --tune"
        );
        Ok(())
    }

    /// What whole graphs of other buckets chose for a problem: the first bucket's choice.
    fn decided(&self, key: &str, bucket: usize) -> Option<&LibraryTrial> {
        self.list.iter().find(|trial| trial.key == key && trial.bucket.0 != bucket && trial.chosen.is_some())
    }

    /// What is known of a bucket's problems, for the search by whole graphs. What those of another bucket chose stays, because a lock
    /// knows problems whatever their bucket.
    pub fn entries(&self, bucket: usize) -> Vec<Entry> {
        let entry = |trial: &LibraryTrial| {
            let candidates = [&trial.kernel, &trial.library].map(|(name, us)| Some((name.clone(), (*us)?)));
            let candidates = candidates.into_iter().collect::<Option<Vec<_>>>()?;
            let decided = self.decided(&trial.key, bucket).and_then(LibraryTrial::choice);
            let fixed = decided.map(str::to_owned);
            Some(Entry { key: trial.key.clone(), steps: trial.steps.len(), candidates, fixed })
        };
        self.of_bucket(bucket).filter_map(entry).collect()
    }

    /// Takes in what whole graphs of a bucket chose.
    pub fn refine(&mut self, bucket: usize, found: &Refined) {
        for trial in self.list.iter_mut().filter(|trial| trial.bucket.0 == bucket) {
            trial.chosen = found.chosen.get(&trial.key).map(|name| *name == trial.library.0);
        }
    }

    /// Writes what was found to a lock, beside what it knows of the problems. Of one that it does not have, what `brought` knows is taken
    /// over, or what the plan has. Of one in several buckets, what the first found is written.
    pub fn write(&self, lock: &mut Lock, brought: Option<&Lock>) {
        let mut written = BTreeSet::new();
        for trial in &self.list {
            let LibraryTrial { key, kernel: (kernel, kernel_us), plain, library: (library, library_us), .. } = trial;
            let (Some(chosen), Some(kernel_us), Some(library_us)) = (trial.chosen, *kernel_us, *library_us) else {
                continue;
            };
            if !written.insert(key) {
                continue;
            }
            let measured = lock.problems.entry(key.clone()).or_insert_with(|| {
                let known = brought.and_then(|brought| brought.problems.get(key)).cloned();
                known.unwrap_or_else(|| Measured {
                    chosen: plain.clone(),
                    packed: (kernel != plain).then(|| kernel.clone()),
                    library: None,
                    candidates: BTreeMap::from([(kernel.clone(), Time::Us(kernel_us))]),
                })
            });
            measured.library = chosen.then(|| library.clone());
            measured.candidates.insert(library.clone(), Time::Us(library_us));
        }
    }
}

/// Tactics that choose no library for a plan's problems, whatever they say and whatever else they name is gone.
pub fn without_libraries(tactics: &Tactics, manifest: &Manifest) -> Tactics {
    let calls = manifest.ranks.iter().flat_map(step_problems).filter_map(|(_, problem)| library_call(&problem));
    let names: BTreeSet<&str> = calls.map(|call| call.name()).collect();
    let is_kernel = |name: &String| !names.contains(name.as_str());
    let mut tactics = Tactics { library: BTreeMap::new(), ..tactics.clone() };
    tactics.measured.values_mut().for_each(|list| list.retain(is_kernel));
    // An entry stays even so: without one nobody asks what was measured.
    tactics.chosen.values_mut().filter(|name| !is_kernel(name)).for_each(String::clear);
    tactics
}

/// What a bucket's whole graph takes by kernels and with the libraries that were chosen, in words; `entries` are what was searched, of which
/// those that another bucket decided are as they are there in both.
pub fn graph_text(name: &str, found: &Refined, entries: &[Entry]) -> String {
    let saved = 100.0 * (1.0 - found.us / found.default_us);
    let (kernels, us) = (round(found.default_us), round(found.us));
    let fixed = match entries.iter().filter(|entry| entry.fixed.is_some()).count() {
        0 => String::new(),
        fixed => format!("; {fixed} of its problems as chosen in another bucket"),
    };
    format!(
        "{name}: {kernels} us by kernels, {us} us as chosen, {saved:.2} % less; {} graphs timed{fixed}",
        found.timed
    )
}

#[cfg(test)]
mod tests;
