//! The choice among kernels by whole graphs: from the times of single steps to what the steps of a bucket take together.
//!
//! In a captured graph neighbours overlap: a kernel that is slower by itself but starts early, or leaves room beside it, can make
//! the graph faster. So a bucket begins with the best of several choices: the registry's defaults, the fastest of each problem
//! by itself, and for each kernel that runs more than one problem, that kernel wherever it runs, since what a kernel leaves to
//! its neighbours shows only where they are of its kind. Then it takes one problem after the other, the longest first, and tries
//! its best candidates within the whole graph. What makes the graph faster stays. In the end it tries neighbours together: one that
//! takes less of a multiprocessor pays where the other one uses what is left. Who measures is not said here: times come in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::codegen::select::{APART, Tactics};

/// How much faster a graph must be for a choice to change: less is noise.
const MARGIN: f64 = 0.003;
/// Candidates of a problem that are tried, beside the default: of one that most layers have, which in company are seldom the fastest by
/// themselves, and of any other.
const MOST_TRIED_OF_LAYERS: usize = 16;
const MOST_TRIED: usize = 3;
/// Steps from which on a problem is one of layers.
const LAYERS: usize = 6;
/// Candidates that take this much longer than the fastest by themselves are not tried.
const FAR: f64 = 1.6;
/// Neighbours that are tried together, and candidates of each of the two.
const MOST_PAIRS: usize = 4;
const MOST_PAIRED: usize = 6;

/// What is tried of a fused operator beside [`APART`].
const TOGETHER: &str = "together";

/// A problem of the bucket: what is known of its candidates.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry {
    /// The problem.
    pub key: String,
    /// Steps of the bucket that it is the problem of.
    pub steps: usize,
    /// Names of the candidates that run, with the time of one step in microseconds by itself; the default, if it runs, is the first.
    pub candidates: Vec<(String, f64)>,
    /// The choice, if it was made for another bucket already and stays.
    pub fixed: Option<String>,
}

impl Entry {
    /// Whether a fused operator stays together or is taken apart: nothing is known of either.
    pub fn fusion(key: &str) -> Entry {
        let candidates = [TOGETHER, APART].map(|name| (name.to_owned(), 1.0)).to_vec();
        Entry { key: key.to_owned(), steps: 1, candidates, fixed: None }
    }

    /// The candidates, the fastest first.
    fn by_time(&self) -> Vec<&(String, f64)> {
        let mut list: Vec<_> = self.candidates.iter().collect();
        list.sort_by(|a, b| a.1.total_cmp(&b.1));
        list
    }

    /// The fastest candidates, as many as are worth a try.
    fn near(&self, most: usize) -> Vec<&String> {
        let list = self.by_time();
        let least = list.first().map_or(0.0, |(_, us)| *us);
        list.into_iter().take_while(|(_, us)| *us <= least * FAR).take(most).map(|(name, _)| name).collect()
    }

    /// Whether there is something to choose.
    fn is_free(&self) -> bool {
        self.fixed.is_none() && self.candidates.len() > 1
    }

    /// Time of all its steps, each by itself.
    fn total(&self) -> f64 {
        self.steps as f64 * self.by_time().first().map_or(0.0, |(_, us)| *us)
    }
}

/// Changes of two problems at a time whose steps follow each other: of those that take longest together, each candidate of the one with
/// each of the other. `order` has the problem of each step.
fn pairs(entries: &[Entry], order: &[String]) -> Vec<Change> {
    let entry = |key: &String| entries.iter().find(|entry| entry.key == *key && entry.is_free());
    let mut found: Vec<(&Entry, &Entry)> = vec![];
    for two in order.windows(2) {
        if let (Some(a), Some(b)) = (entry(&two[0]), entry(&two[1]))
            && a.key != b.key
            && !found.iter().any(|(x, y)| [&x.key, &y.key] == [&a.key, &b.key] || [&y.key, &x.key] == [&a.key, &b.key])
        {
            found.push((a, b));
        }
    }
    found.sort_by(|(a, b), (c, d)| (c.total() + d.total()).total_cmp(&(a.total() + b.total())));
    let mut changes = vec![];
    for (a, b) in found.into_iter().take(MOST_PAIRS) {
        for of_a in a.near(MOST_PAIRED) {
            for of_b in b.near(MOST_PAIRED) {
                changes.push(vec![(a.key.clone(), of_a.clone()), (b.key.clone(), of_b.clone())]);
            }
        }
    }
    changes
}

/// The first word of a name: the kernel of a candidate, the stages of a problem.
fn first_word(name: &str) -> &str {
    name.split(' ').next().unwrap_or(name)
}

/// Of problems of fused operators, those to which no stage was added to make another of them: what is taken apart first, as that
/// leaves the others as they were before.
pub fn last_fused<'a>(keys: impl Iterator<Item = &'a String>) -> Vec<String> {
    let keys: Vec<&String> = keys.collect();
    let grows = |key: &str| keys.iter().any(|other| other.starts_with(&format!("{}+", first_word(key))));
    keys.iter().filter(|key| !grows(key)).map(|key| (*key).clone()).collect()
}

/// Kernels that run more than one of the problems.
fn shared_kernels(entries: &[Entry]) -> BTreeSet<&str> {
    let mut once = BTreeSet::new();
    let mut shared = BTreeSet::new();
    for entry in entries {
        let kernels: BTreeSet<&str> = entry.candidates.iter().map(|(name, _)| first_word(name)).collect();
        shared.extend(kernels.into_iter().filter(|kernel| !once.insert(*kernel)));
    }
    shared
}

/// Candidates for problems.
type Change = Vec<(String, String)>;

/// The search for one bucket.
#[derive(Clone, PartialEq, Debug)]
pub struct Refinement {
    /// By problem: the choice so far.
    chosen: BTreeMap<String, String>,
    /// The other beginnings that are left.
    beginnings: VecDeque<BTreeMap<String, String>>,
    /// What is left to try.
    queue: VecDeque<Change>,
    /// What is being timed.
    trial: Trial,
    /// The graph with the defaults, in microseconds.
    default_us: f64,
    /// The graph with the choice so far.
    us: f64,
    timed: usize,
}

#[derive(Clone, PartialEq, Debug)]
enum Trial {
    Defaults,
    Beginning(BTreeMap<String, String>),
    Change(Change),
    Done,
}

/// What a bucket's graph takes.
#[derive(Clone, PartialEq, Debug)]
pub struct Refined {
    /// By problem: the candidate.
    pub chosen: BTreeMap<String, String>,
    /// Microseconds with the registry's defaults.
    pub default_us: f64,
    /// Microseconds with what is chosen.
    pub us: f64,
    /// Graphs timed.
    pub timed: usize,
}

impl Refinement {
    /// Begins with nothing timed. `order` has the problem of each of the bucket's steps; with an empty one no neighbours are tried.
    pub fn new(entries: &[Entry], order: &[String]) -> Refinement {
        let first = |entry: &Entry| entry.candidates.first().map(|(name, _)| name.clone());
        let best = |entry: &Entry| entry.by_time().first().map(|(name, _)| name.clone());
        let choice = |of: &dyn Fn(&Entry) -> Option<String>| -> BTreeMap<String, String> {
            let named = entries
                .iter()
                .filter_map(|entry| Some((entry.key.clone(), entry.fixed.clone().or_else(|| of(entry))?)));
            named.collect()
        };
        let chosen = choice(&first);
        let mut beginnings = VecDeque::from([choice(&best)]);
        beginnings.extend(shared_kernels(entries).into_iter().map(|kernel| {
            let of_kernel = |entry: &Entry| {
                entry.by_time().into_iter().find(|at| first_word(&at.0) == kernel).map(|at| at.0.clone())
            };
            choice(&|entry| of_kernel(entry).or_else(|| first(entry)))
        }));
        let mut known = BTreeSet::from([chosen.clone()]);
        beginnings.retain(|beginning| known.insert(beginning.clone()));
        let mut free: Vec<&Entry> = entries.iter().filter(|entry| entry.is_free()).collect();
        free.sort_by(|a, b| b.total().total_cmp(&a.total()));
        let mut queue = VecDeque::new();
        for entry in free {
            let mut names = entry.near(if entry.steps >= LAYERS { MOST_TRIED_OF_LAYERS } else { MOST_TRIED });
            let default = entry.candidates.first().map(|(name, _)| name);
            names.extend(default.filter(|name| !names.contains(name)));
            queue.extend(names.into_iter().map(|name| vec![(entry.key.clone(), name.clone())]));
        }
        queue.extend(pairs(entries, order));
        Refinement { chosen, beginnings, queue, trial: Trial::Defaults, default_us: f64::NAN, us: f64::NAN, timed: 0 }
    }

    /// What to time next; none when the search is done.
    pub fn next(&self) -> Option<Tactics> {
        let mut chosen = self.chosen.clone();
        match &self.trial {
            Trial::Defaults => {}
            Trial::Beginning(beginning) => chosen = beginning.clone(),
            Trial::Change(change) => chosen.extend(change.clone()),
            Trial::Done => return None,
        }
        // Fused is what an operator is where nothing is said.
        chosen.retain(|_, name| name != TOGETHER);
        Some(Tactics { chosen, ..Tactics::default() })
    }

    /// Takes in what that took: the graph's time in microseconds, or none if it does not run.
    pub fn record(&mut self, us: Option<f64>) {
        self.timed += 1;
        let faster = us.is_some_and(|us| us < self.us * (1.0 - MARGIN));
        match std::mem::replace(&mut self.trial, Trial::Done) {
            Trial::Defaults => {
                (self.default_us, self.us) = (us.unwrap_or(f64::INFINITY), us.unwrap_or(f64::INFINITY));
                self.trial = self.following();
                return;
            }
            Trial::Beginning(beginning) if faster => self.chosen = beginning,
            Trial::Change(change) if faster => self.chosen.extend(change),
            _ => {}
        }
        if let Some(us) = us.filter(|_| faster) {
            self.us = us;
        }
        self.trial = self.following();
    }

    /// The next beginning, and after these the next change that is one, of all that it names.
    fn following(&mut self) -> Trial {
        if let Some(beginning) = self.beginnings.pop_front() {
            return Trial::Beginning(beginning);
        }
        while let Some(change) = self.queue.pop_front() {
            if change.iter().all(|(key, name)| self.chosen.get(key) != Some(name)) {
                return Trial::Change(change);
            }
        }
        Trial::Done
    }

    /// Graphs that are left to time, at the most.
    pub fn left(&self) -> usize {
        self.beginnings.len() + self.queue.len() + usize::from(self.trial != Trial::Done)
    }

    /// What was found, when the search is done.
    pub fn finish(self) -> Refined {
        Refined { chosen: self.chosen, default_us: self.default_us, us: self.us, timed: self.timed }
    }
}

#[cfg(test)]
mod tests;
