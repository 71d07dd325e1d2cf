//! The choice among kernels by measurement: which candidates a round of measurements runs, and what follows from its times.
//!
//! In round n of a phase each of its problems' n-th candidate runs. Problems that have fewer run some again, of which the
//! shortest time counts. Problems of other phases keep their default meanwhile: prefill fills the state that decode steps are
//! timed over, and some of its candidates take very long for many rows. Who measures is not said here: times come in, a [`Lock`]
//! comes out.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::codegen::kernels::candidates;
use crate::codegen::lock::{LOCK_VERSION, Lock, Measured, Time};
use crate::codegen::select::{Tactics, problem_key, step_problems};
use crate::plan::{Bucket, Manifest, Phase};

/// How much faster than the default another candidate must be: less is noise, and the default needs no lock.
const MARGIN: f64 = 0.02;

/// The measurements of a plan's problems.
#[derive(Clone, PartialEq, Debug)]
pub struct Tuning {
    problems: BTreeMap<String, Trials>,
    buckets: Vec<Steps>,
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
    time: Option<Time>,
}

impl Trial {
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

/// The choice of one problem; times in microseconds, none where a candidate failed or was not measured.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice<'a> {
    /// The problem.
    pub key: &'a str,
    /// Name of the first bucket with it.
    pub bucket: &'a str,
    /// Steps that it is the problem of, in all buckets.
    pub steps: usize,
    /// Candidates that there are.
    pub candidates: usize,
    /// The default's time.
    pub default_us: Option<f64>,
    /// The name of the candidate chosen.
    pub chosen: &'a str,
    /// Its time.
    pub us: Option<f64>,
}

/// A bucket's steps, one after the other, in microseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Total<'a> {
    /// The bucket's name.
    pub bucket: &'a str,
    /// Its steps.
    pub steps: usize,
    /// Sum of the defaults' times; where one failed, the chosen one's.
    pub default_us: f64,
    /// Sum of the chosen candidates' times.
    pub us: f64,
}

impl Tuning {
    /// Nothing measured yet of the problems of a plan's first rank, which need not have machine code.
    pub fn of(manifest: &Manifest) -> Tuning {
        let Some(program) = manifest.ranks.first() else {
            return Tuning { problems: BTreeMap::new(), buckets: vec![] };
        };
        let mut problems = BTreeMap::new();
        let steps = |bucket: &Bucket| Steps { name: bucket.name.clone(), phase: bucket.phase, keys: vec![] };
        let mut buckets: Vec<Steps> = program.buckets.iter().map(steps).collect();
        for (bucket, problem) in step_problems(program) {
            let key = problem_key(&problem);
            problems.entry(key.clone()).or_insert_with(|| {
                let list = candidates(&problem);
                let list = list.iter().map(|candidate| Trial { name: candidate.name(), time: None }).collect();
                Trials { phase: problem.phase, list }
            });
            buckets[bucket].keys.push(key);
        }
        Tuning { problems, buckets }
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

    /// The buckets in which a round runs a candidate that no round before has run.
    pub fn measured(&self, round: Round) -> Vec<usize> {
        let is_new = |key: &String| self.problems.get(key).is_some_and(|trials| trials.list.len() > round.nth);
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
        Ok(Tactics { chosen, nth: Some(round.nth) })
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
            samples.sort_by(f64::total_cmp);
            // The mean of the middle ones; no more digits than mean something.
            let us = f64::midpoint(samples[(samples.len() - 1) / 2], samples[samples.len() / 2]);
            let us = (us * 100.0).round() / 100.0;
            let trial = &mut trials.list[at];
            trial.time = Some(Time::Us(trial.us().map_or(us, |before| before.min(us))));
        }
        Ok(())
    }

    /// Takes in what a round could not run: bucket, step, and why.
    ///
    /// # Errors
    /// No such step.
    pub fn fail(&mut self, round: Round, steps: &[(usize, usize, String)]) -> Result<()> {
        // Of several steps with one problem, the first says what failed; the others ran the same.
        let mut failed: BTreeMap<String, &str> = BTreeMap::new();
        for (bucket, step, error) in steps {
            let key = self.buckets.get(*bucket).and_then(|bucket| bucket.keys.get(*step));
            let key = key.with_context(|| format!("no step {step} in bucket {bucket}"))?;
            failed.entry(key.clone()).or_insert(error);
        }
        for (key, error) in failed {
            let Some(trials) = self.problems.get_mut(&key) else { continue };
            if let Some(at) = trials.runs(round) {
                trials.list[at].time = Some(Time::Failed(error.to_owned()));
            }
        }
        Ok(())
    }

    /// What was measured and what is chosen by it, of the problems whose candidates have all been measured.
    pub fn lock(&self, gpu: &str, toolkit: (u32, u32)) -> Lock {
        let measured = |trials: &Trials| {
            let times = trials.list.iter().map(|trial| Some((trial.name.clone(), trial.time.clone()?)));
            Some(Measured { candidates: times.collect::<Option<_>>()?, chosen: choose(&trials.list)?.name.clone() })
        };
        let problems = self.problems.iter().filter_map(|(key, trials)| Some((key.clone(), measured(trials)?)));
        Lock {
            version: LOCK_VERSION,
            compiler: env!("CARGO_PKG_VERSION").to_owned(),
            gpu: gpu.to_owned(),
            toolkit,
            problems: problems.collect(),
        }
    }

    /// The choices, in the order in which the buckets' steps come.
    pub fn choices(&self) -> Vec<Choice<'_>> {
        let mut choices: Vec<Choice> = vec![];
        let mut known: BTreeMap<&str, usize> = BTreeMap::new();
        let steps = self.buckets.iter().flat_map(|bucket| bucket.keys.iter().map(move |key| (&bucket.name, key)));
        for (bucket, key) in steps {
            if let Some(&at) = known.get(&**key) {
                choices[at].steps += 1;
                continue;
            }
            let Some(trials) = self.problems.get(key) else { continue };
            let (Some(default), Some(chosen)) = (trials.list.first(), choose(&trials.list)) else { continue };
            known.insert(key, choices.len());
            choices.push(Choice {
                key,
                bucket,
                steps: 1,
                candidates: trials.list.len(),
                default_us: default.us(),
                chosen: &chosen.name,
                us: chosen.us(),
            });
        }
        choices
    }

    /// The buckets' sums.
    pub fn totals(&self) -> Vec<Total<'_>> {
        let choices = self.choices();
        let times: BTreeMap<&str, (Option<f64>, Option<f64>)> =
            choices.iter().map(|choice| (choice.key, (choice.default_us, choice.us))).collect();
        let totals = self.buckets.iter().map(|Steps { name, keys, .. }| {
            let found = keys.iter().filter_map(|key| times.get(&**key));
            let (default_us, us) = found.fold((0.0, 0.0), |(default_us, us), (default, chosen)| {
                (default_us + default.or(*chosen).unwrap_or(f64::NAN), us + chosen.unwrap_or(f64::NAN))
            });
            Total { bucket: name, steps: keys.len(), default_us, us }
        });
        totals.collect()
    }
}

/// The fastest of a problem's candidates; the default, which is the first, unless another is faster by [`MARGIN`].
fn choose(trials: &[Trial]) -> Option<&Trial> {
    let default = trials.first()?;
    let timed = trials.iter().filter_map(|trial| Some((trial, trial.us()?)));
    let Some((fastest, us)) = timed.min_by(|a, b| a.1.total_cmp(&b.1)) else { return Some(default) };
    let stays = match default.us() {
        Some(default_us) => us > default_us * (1.0 - MARGIN),
        // Not measured says nothing against it.
        None => !default.failed(),
    };
    Some(if stays { default } else { fastest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::{CompileOptions, Recipe, Source, compile};
    use crate::passes::Target;

    fn trials(times: &[Option<f64>]) -> Vec<Trial> {
        let trial = |(i, us): (usize, &Option<f64>)| Trial {
            name: format!("stream n={i}"),
            time: Some(us.map_or_else(|| Time::Failed("no".into()), Time::Us)),
        };
        times.iter().enumerate().map(trial).collect()
    }

    #[test]
    fn the_default_stays_unless_another_is_clearly_faster() {
        let chosen = |times: &[Option<f64>]| choose(&trials(times)).map(|trial| trial.name.clone());
        assert_eq!(chosen(&[Some(10.0), Some(9.9), Some(11.0)]).as_deref(), Some("stream n=0"));
        assert_eq!(chosen(&[Some(10.0), Some(9.8)]).as_deref(), Some("stream n=1"), "just by the margin");
        assert_eq!(chosen(&[Some(10.0), Some(9.0), Some(8.0), Some(8.5)]).as_deref(), Some("stream n=2"));
        assert_eq!(chosen(&[Some(10.0), None]).as_deref(), Some("stream n=0"));
        assert_eq!(chosen(&[None, Some(50.0)]).as_deref(), Some("stream n=1"), "the default does not run");
        assert_eq!(chosen(&[]), None);
        let mut unknown = trials(&[Some(10.0), Some(1.0)]);
        unknown[0].time = None;
        assert_eq!(choose(&unknown).map(|trial| &*trial.name), Some("stream n=0"));
    }

    fn tuning() -> Tuning {
        let recipe = Recipe::parse(include_str!("../../plans/demo.ron")).expect("the recipe is valid");
        let options = CompileOptions {
            target: Target::Sm90a,
            dtype: Some(crate::ir::DType::BF16),
            prefill: Some(vec![64]),
            decode: Some(vec![1]),
            without_cubins: true,
            ..CompileOptions::default()
        };
        let compiled = compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles");
        Tuning::of(&compiled.file.manifest)
    }

    /// Times of a round in which each problem's candidate takes what `us` says of its position.
    fn times(tuning: &Tuning, round: Round, us: impl Fn(usize) -> f64) -> Vec<(usize, Vec<f64>)> {
        let time = |key: &String| us(tuning.problems[key].runs(round).expect("one runs"));
        let measured = tuning.measured(round).into_iter();
        measured.map(|bucket| (bucket, tuning.buckets[bucket].keys.iter().map(time).collect())).collect()
    }

    #[test]
    fn rounds_measure_every_candidate_and_the_fastest_is_chosen() {
        let mut tuning = tuning();
        let rounds = tuning.rounds();
        assert_eq!((rounds[0].phase, rounds[rounds.len() - 1].phase), (Phase::Prefill, Phase::Decode));
        assert!(rounds.iter().any(|round| round.nth > 1), "a demo without choices");
        for round in rounds {
            let tactics = tuning.tactics(round).expect("all run");
            for (key, trials) in &tuning.problems {
                let expected = if trials.phase == round.phase { round.nth % trials.list.len() } else { 0 };
                let found = tactics.chosen.get(key).unwrap_or(&trials.list[round.nth % trials.list.len()].name);
                assert_eq!(*found, trials.list[expected].name, "{key} in {round:?}");
            }
            let times = times(&tuning, round, |at| 100.0 - 3.0 * at as f64 + 0.01 * round.nth as f64);
            assert_eq!(times.len(), 1, "{round:?} measures the bucket of its phase");
            tuning.record(round, &times).expect("times of all steps");
            let lock = tuning.lock("a GPU", (13, 0));
            for (key, trials) in tuning.problems.iter().filter(|(_, trials)| trials.phase == round.phase) {
                assert_eq!(
                    lock.problems.contains_key(key),
                    trials.list.len() <= round.nth + 1,
                    "{key} after {round:?}"
                );
            }
        }
        let lock = tuning.lock("a GPU", (13, 0));
        for (key, names) in tuning.problems() {
            let measured = &lock.problems[key];
            assert_eq!(Some(&*measured.chosen), names.last().copied(), "{key}");
            assert_eq!(measured.candidates.len(), names.len(), "{key}");
            // Measured first, before it took longer in later rounds.
            assert_eq!(measured.candidates[names[0]], Time::Us(100.0), "{key}");
        }
        for total in tuning.totals() {
            assert_eq!(total.default_us, 100.0 * total.steps as f64, "{}", total.bucket);
            assert!(total.us < total.default_us, "{}", total.bucket);
        }
        let steps: usize = tuning.choices().iter().map(|choice| choice.steps).sum();
        assert_eq!(steps, tuning.totals().iter().map(|total| total.steps).sum::<usize>());
        let round = Round { phase: Phase::Decode, nth: 0 };
        assert!(tuning.record(round, &[(0, vec![1.0])]).is_err(), "times of another plan");
        assert!(tuning.measured(Round { nth: 1000, ..round }).is_empty());
    }

    #[test]
    fn what_fails_is_replaced_and_not_chosen() {
        let mut tuning = tuning();
        let find = |(b, bucket): (usize, &Steps)| {
            let mut keys = bucket.keys.iter();
            keys.position(|key| tuning.problems[key].list.len() > 1).map(|step| (b, step))
        };
        let (bucket, step) = tuning.buckets.iter().enumerate().find_map(find).expect("there is a choice");
        let (phase, key) = (tuning.buckets[bucket].phase, tuning.buckets[bucket].keys[step].clone());
        let names: Vec<String> = tuning.problems[&key].list.iter().map(|trial| trial.name.clone()).collect();
        // Told of the same step twice: one candidate failed.
        let refused = vec![(bucket, step, "too much".to_owned()); 2];
        let round = Round { phase, nth: 1 };
        tuning.fail(round, &refused).expect("there is such a step");
        assert_eq!(tuning.tactics(round).expect("others run").chosen[&key], names[0]);
        for round in tuning.rounds() {
            tuning.record(round, &times(&tuning, round, |at| 100.0 - at as f64)).expect("times of all steps");
        }
        let lock = tuning.lock("a GPU", (13, 0));
        assert_eq!(lock.problems[&key].candidates[&names[1]], Time::Failed("too much".into()));
        assert_ne!(lock.problems[&key].chosen, names[1]);
        for nth in 0..names.len() {
            tuning.fail(Round { phase, nth }, &refused).expect("there is such a step");
        }
        let error = tuning.tactics(Round { phase, nth: 0 }).expect_err("none is left").to_string();
        assert!(error.contains(&key) && error.contains("too much"), "{error}");
    }
}
