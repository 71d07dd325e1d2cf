//! What was measured, for a person to read: the choice of each problem, and what the steps of each bucket take.

use std::collections::BTreeMap;

use super::{Steps, Tuning};

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
            let (Some(default), Some(chosen)) = (trials.list.first(), self.chosen(key)) else { continue };
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
