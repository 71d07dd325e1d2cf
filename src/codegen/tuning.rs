//! The choice among kernels by measurement: which candidates a round of measurements runs, and what follows from its times.
//! For buckets whose whole graphs were timed as well (see [`super::refine`]), what was found there goes before it.
//!
//! In round n of a phase each of its problems' n-th candidate runs. Problems that have fewer run some again, of which the
//! shortest time counts. Problems of other phases keep their default meanwhile: prefill fills the state that decode steps are
//! timed over, and some of its candidates take very long for many rows. Who measures is not said here: times come in, a [`Lock`]
//! comes out.

pub mod libraries;
mod summary;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::codegen::lock::{GraphTime, LOCK_VERSION, Lock, Measured, Time};
use crate::codegen::refine::{Entry, Refined};
use crate::codegen::select::{APART, Allowed, Tactics, Way, admitted, problem_key, step_problems};
use crate::plan::{Bucket, Collective, Manifest, Phase};

pub use self::summary::{Choice, Total};

/// How much faster than the default another candidate must be: less is noise, and the default needs no lock.
const MARGIN: f64 = 0.02;

/// The measurements of a plan's problems.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Tuning {
    problems: BTreeMap<String, Trials>,
    buckets: Vec<Steps>,
    /// By problem: the candidate that whole graphs chose, or [`APART`].
    refined: BTreeMap<String, String>,
    /// By bucket: what they took.
    graphs: BTreeMap<String, GraphTime>,
}

/// A round of measurements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// Whose buckets are measured.
    pub phase: Phase,
    /// Position of the candidates that run.
    pub nth: usize,
}

/// A problem.
#[derive(Clone, PartialEq, Debug)]
struct Trials {
    phase: Phase,
    /// The candidates in the registry's order.
    list: Vec<Trial>,
}

/// A bucket.
#[derive(Clone, PartialEq, Debug)]
struct Steps {
    name: String,
    phase: Phase,
    /// The problem of each step.
    keys: Vec<String>,
}

/// A candidate, and what was measured of it.
#[derive(Clone, PartialEq, Debug)]
struct Trial {
    name: String,
    /// Whether it reads packed weights.
    packed: bool,
    /// Whether it is a library.
    library: bool,
    time: Option<Time>,
}

impl Trial {
    fn of(way: &Way) -> Trial {
        Trial { name: way.name(), packed: way.reads_packed(), library: way.kernel().is_none(), time: None }
    }

    fn us(&self) -> Option<f64> {
        match self.time {
            Some(Time::Us(us)) => Some(us),
            _ => None,
        }
    }

    fn failed(&self) -> bool {
        matches!(self.time, Some(Time::Failed(_)))
    }
}

impl Trials {
    /// Position of the candidate that a round runs; none if all have failed.
    fn runs(&self, round: Round) -> Option<usize> {
        let nth = if self.phase == round.phase { round.nth } else { 0 };
        let at = nth.checked_rem(self.list.len())?;
        if self.list[at].failed() { self.list.iter().position(|trial| !trial.failed()) } else { Some(at) }
    }
}

impl Tuning {
    /// Nothing measured yet of the problems of a plan's first rank, which need not have machine code, and was compiled with what candidates may use.
    pub fn of(manifest: &Manifest, allowed: impl Into<Allowed>) -> Tuning {
        let allowed = allowed.into();
        let Some(program) = manifest.ranks.first() else {
            return Tuning::default();
        };
        let mut problems = BTreeMap::new();
        // A lock has what whole graphs take by these names, which those of plans of other ranks do not share.
        let of = if manifest.ranks.len() > 1 { format!(" of {} ranks", manifest.ranks.len()) } else { String::new() };
        let steps = |bucket: &Bucket| Steps { name: format!("{}{of}", bucket.name), phase: bucket.phase, keys: vec![] };
        let mut buckets: Vec<Steps> = program.buckets.iter().map(steps).collect();
        for (bucket, problem) in step_problems(program) {
            let key = problem_key(&problem);
            // What ranks do together has no candidates.
            if Collective::of(problem.semantic).is_none() {
                problems.entry(key.clone()).or_insert_with(|| {
                    let list = admitted(&problem, allowed);
                    let list = list.iter().map(Trial::of).collect();
                    Trials { phase: problem.phase, list }
                });
            }
            buckets[bucket].keys.push(key);
        }
        Tuning { problems, buckets, ..Tuning::default() }
    }

    /// What is known of a bucket's problems, for the search by whole graphs.
    pub fn entries(&self, bucket: usize) -> Vec<Entry> {
        let mut steps: BTreeMap<&str, usize> = BTreeMap::new();
        for key in self.buckets.get(bucket).into_iter().flat_map(|bucket| &bucket.keys) {
            *steps.entry(key).or_default() += 1;
        }
        let entry = |(key, steps): (&str, usize)| {
            let trials = self.problems.get(key)?;
            let timed = trials.list.iter().filter_map(|trial| Some((trial.name.clone(), trial.us()?)));
            let fixed = self.refined.get(key).cloned();
            Some(Entry { key: key.to_owned(), steps, candidates: timed.collect(), fixed })
        };
        steps.into_iter().filter_map(entry).collect()
    }

    /// The problem of each step of a bucket.
    pub fn order(&self, bucket: usize) -> &[String] {
        self.buckets.get(bucket).map_or(&[], |bucket| &bucket.keys)
    }

    /// Takes in what whole graphs of a bucket chose.
    pub fn refine(&mut self, bucket: usize, found: Refined) {
        let Some(Steps { name, .. }) = self.buckets.get(bucket) else { return };
        let time = GraphTime { default_us: round(found.default_us), us: round(found.us), timed: found.timed };
        self.graphs.insert(name.clone(), time);
        for (key, name) in found.chosen {
            self.refined.entry(key).or_insert(name);
        }
    }

    /// Takes in what a bucket's graph takes with some fused operators apart, if that was worth it.
    pub fn take_apart(&mut self, bucket: usize, found: Refined) {
        let Some(Steps { name, .. }) = self.buckets.get(bucket) else { return };
        let Some(time) = self.graphs.get_mut(name) else { return };
        time.us = round(found.us.min(time.us));
        time.timed += found.timed;
        let apart = found.chosen.into_iter().filter(|(_, chosen)| chosen == APART);
        self.refined.extend(apart);
    }

    /// Takes over what another has measured of the same problems.
    pub fn learn(&mut self, other: &Tuning) {
        for (key, trials) in &mut self.problems {
            if let Some(known) = other.problems.get(key) {
                trials.list.clone_from(&known.list);
            }
        }
    }

    /// Takes over the problems of another that this one does not have.
    pub fn absorb(&mut self, other: Tuning) {
        for (key, trials) in other.problems {
            self.problems.entry(key).or_insert(trials);
        }
    }

    /// What whole graphs took, by bucket.
    pub fn graphs(&self) -> &BTreeMap<String, GraphTime> {
        &self.graphs
    }

    /// What is chosen for a problem.
    fn chosen(&self, key: &str) -> Option<&Trial> {
        let trials = self.problems.get(key)?;
        let refined = self.refined.get(key).and_then(|name| trials.list.iter().find(|trial| trial.name == *name));
        let kernels: Vec<&Trial> = trials.list.iter().filter(|trial| !trial.library).collect();
        let best = refined.or_else(|| choose(&kernels))?;
        // A library must be faster than the best kernel, too, by more than is noise.
        let faster = |trial: &Trial| match (trial.us(), best.us()) {
            (Some(us), Some(best_us)) => us < best_us * (1.0 - MARGIN),
            (us, None) => us.is_some() && best.failed(),
            _ => false,
        };
        let library = trials.list.iter().find(|trial| trial.library && faster(trial));
        Some(library.filter(|_| refined.is_none()).unwrap_or(best))
    }

    /// The problems and the names of their candidates, the default first.
    pub fn problems(&self) -> impl Iterator<Item = (&str, Vec<&str>)> {
        self.problems.iter().map(|(key, trials)| (&**key, trials.list.iter().map(|trial| &*trial.name).collect()))
    }

    /// Rounds that run every candidate: prefill's first, so that what fails of it is known when it fills the state.
    pub fn rounds(&self) -> Vec<Round> {
        let of_phase = |phase| {
            let most =
                self.problems.values().filter(|trials| trials.phase == phase).map(|trials| trials.list.len()).max();
            (0..most.unwrap_or(0)).map(move |nth| Round { phase, nth })
        };
        [Phase::Prefill, Phase::Decode, Phase::Fixed].into_iter().flat_map(of_phase).collect()
    }

    /// The buckets in which a round runs a candidate of which nothing is known.
    pub fn measured(&self, round: Round) -> Vec<usize> {
        let is_new = |key: &String| {
            let trial = self.problems.get(key).and_then(|trials| trials.list.get(round.nth));
            trial.is_some_and(|trial| trial.time.is_none())
        };
        let buckets = self.buckets.iter().enumerate();
        let found = buckets.filter(|(_, bucket)| bucket.phase == round.phase && bucket.keys.iter().any(is_new));
        found.map(|(i, _)| i).collect()
    }

    /// What a round runs. A candidate that has failed is replaced by the first that has not.
    ///
    /// # Errors
    /// All candidates of a problem have failed.
    pub fn tactics(&self, round: Round) -> Result<Tactics> {
        let mut chosen = BTreeMap::new();
        for (key, trials) in &self.problems {
            let at = trials.runs(round).with_context(|| {
                let failures = trials.list.iter().filter_map(|trial| match &trial.time {
                    Some(Time::Failed(error)) => Some(format!("{}: {error}", trial.name)),
                    _ => None,
                });
                let failures: Vec<String> = failures.collect();
                format!("problem {key}: expected a candidate that the device runs, found none\n{}", failures.join("\n"))
            })?;
            if at != round.nth % trials.list.len() {
                chosen.insert(key.clone(), trials.list[at].name.clone());
            }
        }
        Ok(Tactics { chosen, nth: Some(round.nth), ..Tactics::default() })
    }

    /// Takes in the times of a round, in microseconds, for buckets by position and each of their steps. The median over a
    /// problem's steps counts.
    ///
    /// # Errors
    /// Times of other steps than the plan's.
    pub fn record(&mut self, round: Round, times: &[(usize, Vec<f64>)]) -> Result<()> {
        let mut samples: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (bucket, times) in times {
            let bucket = self.buckets.get(*bucket).with_context(|| format!("no bucket {bucket}"))?;
            let (expected, found) = (bucket.keys.len(), times.len());
            ensure!(expected == found, "bucket {}: expected times of {expected} steps, found {found}", bucket.name);
            for (key, &us) in bucket.keys.iter().zip(times).filter(|(_, us)| us.is_finite()) {
                samples.entry(key).or_default().push(us);
            }
        }
        for (key, mut samples) in samples {
            let Some(trials) = self.problems.get_mut(key) else { continue };
            let Some(at) = trials.runs(round) else { continue };
            let us = typical(&mut samples);
            let trial = &mut trials.list[at];
            trial.time = Some(Time::Us(trial.us().map_or(us, |before| before.min(us))));
        }
        Ok(())
    }

    /// Takes in what a round could not run: bucket, step, and why.
    ///
    /// # Errors
    /// No such step, or one that is no choice.
    pub fn fail(&mut self, round: Round, steps: &[(usize, usize, String)]) -> Result<()> {
        // Of several steps with one problem, the first says what failed; the others ran the same.
        let mut failed: BTreeMap<String, &str> = BTreeMap::new();
        for (bucket, step, error) in steps {
            let key = self.buckets.get(*bucket).and_then(|bucket| bucket.keys.get(*step));
            let key = key.with_context(|| format!("no step {step} in bucket {bucket}"))?;
            failed.entry(key.clone()).or_insert(error);
        }
        for (key, error) in failed {
            let trials = self.problems.get_mut(&key);
            let trials = trials.with_context(|| {
                format!("step {key}: expected an exchange with itself that the device runs, found {error}; there is no other way to do it")
            })?;
            if let Some(at) = trials.runs(round) {
                trials.list[at].time = Some(Time::Failed(error.to_owned()));
            }
        }
        Ok(())
    }

    /// What was measured and what is chosen by it, of the problems whose candidates have all been measured.
    pub fn lock(&self, gpu: &str, toolkit: (u32, u32)) -> Lock {
        let measured = |key: &str, trials: &Trials| {
            let times = trials.list.iter().map(|trial| Some((trial.name.clone(), trial.time.clone()?)));
            let best = self.chosen(key)?;
            let library = best.library.then(|| best.name.clone());
            let kernels: Vec<&Trial> = trials.list.iter().filter(|trial| !trial.library).collect();
            let best = if best.library { choose(&kernels)? } else { best };
            let plain: Vec<&Trial> = kernels.into_iter().filter(|trial| !trial.packed).collect();
            let chosen = if best.packed { choose(&plain)? } else { best }.name.clone();
            let packed = best.packed.then(|| best.name.clone());
            Some(Measured { candidates: times.collect::<Option<_>>()?, chosen, packed, library })
        };
        let apart = |key: &String| self.refined.get(key).is_some_and(|chosen| chosen == APART);
        let mut problems: BTreeMap<String, Measured> = BTreeMap::new();
        for (key, trials) in &self.problems {
            problems.extend(measured(key, trials).map(|measured| (key.clone(), measured)));
        }
        for key in self.refined.keys().filter(|key| apart(key)) {
            let none = Measured { chosen: String::new(), packed: None, library: None, candidates: BTreeMap::new() };
            APART.clone_into(&mut problems.entry(key.clone()).or_insert(none).chosen);
        }
        Lock {
            version: LOCK_VERSION,
            compiler: env!("CARGO_PKG_VERSION").to_owned(),
            gpu: gpu.to_owned(),
            toolkit,
            graphs: self.graphs.clone(),
            problems,
        }
    }
}

/// The median of times, which are not none: between two in the middle, their mean.
fn typical(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    hundredths(f64::midpoint(samples[(samples.len() - 1) / 2], samples[samples.len() / 2]))
}

/// A step's time with no more digits than mean something.
fn hundredths(us: f64) -> f64 {
    (us * 100.0).round() / 100.0
}

/// A graph's.
fn round(us: f64) -> f64 {
    (us * 10.0).round() / 10.0
}

/// The fastest of a problem's candidates; the default, which is the first, unless another is faster by [`MARGIN`].
fn choose<'a>(trials: &[&'a Trial]) -> Option<&'a Trial> {
    let default = *trials.first()?;
    let timed = trials.iter().filter_map(|trial| Some((*trial, trial.us()?)));
    let Some((fastest, us)) = timed.min_by(|a, b| a.1.total_cmp(&b.1)) else { return Some(default) };
    let stays = match default.us() {
        Some(default_us) => us > default_us * (1.0 - MARGIN),
        // Not measured says nothing against it.
        None => !default.failed(),
    };
    Some(if stays { default } else { fastest })
}

#[cfg(test)]
mod tests;
