//! The choice between the kernel that tactics choose and a library, for the problems that a library has a call for: by whole graphs, beside
//! the time of each by itself. Who measures is not said here, as in [`super`].

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::round;
use crate::codegen::lock::{Lock, Measured, Time};
use crate::codegen::refine::{Entry, Refined};
use crate::codegen::select::{Tactics, library_call, problem_key, step_problems};
use crate::plan::Manifest;

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
    /// The library, and its time.
    pub library: (String, Option<f64>),
    /// Whether whole graphs choose the library.
    pub chosen: bool,
}

/// Those of a plan.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct LibraryTrials {
    /// In the order of the plan's steps.
    pub list: Vec<LibraryTrial>,
}

impl LibraryTrials {
    /// Nothing measured yet of the problems of the first rank of a plan of kernels alone.
    ///
    /// # Errors
    /// A step without a kernel.
    pub fn of(manifest: &Manifest) -> Result<LibraryTrials> {
        let mut list: Vec<LibraryTrial> = vec![];
        let Some(program) = manifest.ranks.first() else { return Ok(LibraryTrials::default()) };
        let mut positions = vec![0usize; program.buckets.len()];
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
            let launch = bucket.steps.get(step).and_then(|step| step.launch.as_ref());
            let kernel = launch.and_then(|launch| manifest.kernels.get(launch.kernel as usize));
            let kernel = kernel.with_context(|| format!("bucket {}: step {step} has no kernel", bucket.name))?;
            list.push(LibraryTrial {
                key,
                bucket: (at, bucket.name.clone()),
                steps: vec![step],
                kernel: (format!("{} {}", kernel.name, kernel.config).trim_end().to_owned(), None),
                library: (call.name().to_owned(), None),
                chosen: false,
            });
        }
        Ok(LibraryTrials { list })
    }

    /// Tactics that have the library run all of these problems of a bucket, and kernels those of which `libraries` is false.
    pub fn tactics(&self, bucket: usize, base: &Tactics, libraries: bool) -> Tactics {
        let mut tactics = Tactics { library: BTreeMap::new(), ..base.clone() };
        for trial in self.of_bucket(bucket) {
            let (name, _) = if libraries { &trial.library } else { &trial.kernel };
            tactics.chosen.insert(trial.key.clone(), name.clone());
        }
        tactics
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
            samples.sort_by(f64::total_cmp);
            ensure!(!samples.is_empty(), "bucket {bucket}: a problem without steps");
            let us = (samples[samples.len() / 2] * 100.0).round() / 100.0;
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

    /// What is known of a bucket's problems, for the search by whole graphs.
    pub fn entries(&self, bucket: usize) -> Vec<Entry> {
        let entry = |trial: &LibraryTrial| {
            let candidates = [&trial.kernel, &trial.library].map(|(name, us)| Some((name.clone(), (*us)?)));
            let candidates = candidates.into_iter().collect::<Option<Vec<_>>>()?;
            Some(Entry { key: trial.key.clone(), steps: trial.steps.len(), candidates, fixed: None })
        };
        self.of_bucket(bucket).filter_map(entry).collect()
    }

    /// Takes in what whole graphs of a bucket chose.
    pub fn refine(&mut self, bucket: usize, found: &Refined) {
        for trial in self.list.iter_mut().filter(|trial| trial.bucket.0 == bucket) {
            trial.chosen = found.chosen.get(&trial.key) == Some(&trial.library.0);
        }
    }

    /// Writes what was found of some buckets to a lock, beside what it knows of the problems.
    pub fn write(&self, lock: &mut Lock, buckets: &[usize]) {
        for LibraryTrial { key, bucket, kernel, library, chosen, .. } in &self.list {
            let (Some(kernel_us), Some(library_us)) = (kernel.1, library.1) else { continue };
            if !buckets.contains(&bucket.0) {
                continue;
            }
            let measured = lock.problems.entry(key.clone()).or_insert_with(|| Measured {
                chosen: kernel.0.clone(),
                packed: None,
                library: None,
                candidates: BTreeMap::from([(kernel.0.clone(), Time::Us(kernel_us))]),
            });
            measured.library = chosen.then(|| library.0.clone());
            measured.candidates.insert(library.0.clone(), Time::Us(library_us));
        }
    }
}

/// What a bucket's whole graph takes by kernels and with the libraries that were chosen, in words.
pub fn graph_text(name: &str, found: &Refined) -> String {
    let saved = 100.0 * (1.0 - found.us / found.default_us);
    let (kernels, us) = (round(found.default_us), round(found.us));
    format!("{name}: {kernels} us by kernels, {us} us as chosen, {saved:.2} % less; {} graphs timed", found.timed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::lock::tests::compiled;
    use crate::codegen::select::Libraries;
    use crate::codegen::tuning::Tuning;

    #[test]
    fn what_graphs_choose_is_written_beside_what_a_lock_knows() {
        let manifest = compiled(Tactics::default()).file.manifest;
        let mut trials = LibraryTrials::of(&manifest).expect("every step has a kernel");
        let (prefill, keys) = (0, trials.list.iter().map(|trial| trial.key.clone()).collect::<Vec<_>>());
        assert!(keys.len() > 2 && trials.list.iter().all(|trial| trial.bucket.0 == prefill), "{trials:?}");
        let known = Tuning::of(&manifest, Libraries::Asked);
        let with: Vec<&str> =
            known.problems().filter(|(_, names)| names.contains(&"cublaslt")).map(|(key, _)| key).collect();
        assert!(with.len() == keys.len() && keys.iter().all(|key| with.contains(&key.as_str())));

        let count = manifest.ranks[0].buckets[prefill].steps.len();
        trials.record(prefill, &vec![10.0; count], false).expect("times of all steps");
        assert!(trials.entries(prefill).is_empty(), "nothing is known of the library yet");
        trials.record(prefill, &vec![8.0; count], true).expect("times of all steps");
        assert!(trials.record(prefill, &[1.0], true).is_err());
        let entries = trials.entries(prefill);
        assert_eq!(entries.len(), keys.len());
        assert!(entries.iter().all(|entry| entry.candidates[1] == ("cublaslt".to_owned(), 8.0)));
        let base = Tactics { library: BTreeMap::from([(keys[0].clone(), "wish".into())]), ..Tactics::default() };
        let tactics = trials.tactics(prefill, &base, true);
        assert!(tactics.library.is_empty() && keys.iter().all(|key| tactics.chosen[key] == "cublaslt"));
        let kernels = trials.tactics(prefill, &base, false);
        assert_eq!(kernels.chosen[&keys[0]], trials.list[0].kernel.0);

        let chosen = BTreeMap::from([(keys[0].clone(), "cublaslt".into()), (keys[1].clone(), "wgmma".into())]);
        let found = Refined { chosen, default_us: 200.0, us: 190.0, timed: 5 };
        trials.refine(prefill, &found);
        assert_eq!(
            graph_text("prefill_64", &found),
            "prefill_64: 200 us by kernels, 190 us as chosen, 5.00 % less; 5 graphs timed"
        );
        let mut lock = Tuning::default().lock("a GPU", (13, 0));
        let stream = ("stream a=1".to_owned(), Time::Us(9.0));
        let earlier = |library: Option<&str>| Measured {
            chosen: stream.0.clone(),
            packed: None,
            library: library.map(str::to_owned),
            candidates: BTreeMap::from([stream.clone()]),
        };
        lock.problems.insert(keys[0].clone(), earlier(None));
        lock.problems.insert(keys[1].clone(), earlier(Some("cublaslt")));
        trials.write(&mut lock, &[]);
        assert_eq!(lock.problems.len(), 2, "of buckets that were not measured nothing is written");
        trials.write(&mut lock, &[prefill]);
        let (first, second) = (&lock.problems[&keys[0]], &lock.problems[&keys[1]]);
        assert_eq!((first.library.as_deref(), &*first.chosen), (Some("cublaslt"), "stream a=1"));
        assert_eq!((second.library.as_deref(), second.candidates.len()), (None, 2));
        assert_eq!(first.candidates["cublaslt"], Time::Us(8.0));
        assert_eq!(lock.problems[&keys[2]].chosen, trials.list[2].kernel.0);

        trials.leave_out(prefill, &trials.list[1].steps.clone()).expect("one is left out");
        assert_eq!(trials.list.len(), keys.len() - 1);
        assert!(trials.leave_out(prefill, &[]).is_err());
    }
}
