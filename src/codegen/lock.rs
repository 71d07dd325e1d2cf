//! The lock file beside a recipe: which candidate of each kernel choice a measurement found fastest, so that a machine without
//! a GPU compiles the tuned plan.
//!
//! A lock is advice: a plan is right with any of a problem's candidates. So problems and candidates that this version does not
//! have are ignored: the next fastest candidate that there is stands in, or the registry's default, as for problems that the lock does not
//! have.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::codegen::select::Tactics;

/// Version of the lock file's form.
pub const LOCK_VERSION: u32 = 2;

const HEADING: &str =
    "// Times of kernels' candidates, and the choice among them: written by `lfm2c compile --tune`.\n";

/// What was measured, and what is chosen by it. Sorted, so that two of them can be compared line by line.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// [`LOCK_VERSION`].
    pub version: u32,
    /// Version of the lfm2c that measured.
    pub compiler: String,
    /// The GPU's name.
    pub gpu: String,
    /// Version of the CUDA toolkit that compiled the kernels, major and minor.
    pub toolkit: (u32, u32),
    /// By bucket, where whole graphs were timed.
    pub graphs: BTreeMap<String, GraphTime>,
    /// By [`crate::codegen::select::problem_key`].
    pub problems: BTreeMap<String, Measured>,
}

/// What a bucket's whole graph takes.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphTime {
    /// Microseconds with the registry's defaults.
    pub default_us: f64,
    /// Microseconds with the candidates that are chosen.
    pub us: f64,
    /// Graphs that were timed to find them.
    pub timed: usize,
}

/// The candidates of one problem.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Name of the candidate that is taken.
    pub chosen: String,
    /// The one that is taken instead where kernels may read packed weights, if it reads one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed: Option<String>,
    /// The library that is taken instead of both where steps may be calls of it, if it is faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<String>,
    /// What was measured of each, by name.
    pub candidates: BTreeMap<String, Time>,
}

/// What was measured of a candidate.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Time {
    /// Median time in microseconds.
    Us(f64),
    /// The device did not run it: why.
    Failed(String),
}

/// As much of a lock as every version has.
#[derive(Deserialize)]
struct Header {
    version: u32,
}

impl Lock {
    /// Reads a lock's text.
    ///
    /// # Errors
    /// No lock of this version, with line and column.
    pub fn parse(text: &str) -> Result<Lock> {
        let options = ron::Options::default().with_recursion_limit(32);
        let at = |e: ron::error::SpannedError| {
            anyhow!("line {}, column {}: {}", e.span.start.line, e.span.start.col, e.code)
        };
        let Header { version } = options.from_str(text).map_err(at)?;
        ensure!(
            version == LOCK_VERSION,
            "version of the lock file: expected {LOCK_VERSION}, found {version}; measure again with `lfm2c compile --tune`, or \
             leave it out with --no-lock"
        );
        options.from_str(text).map_err(at)
    }

    /// What the program brings: the lock of the model that it is made for, whose problems other descriptions of the model have too.
    ///
    /// # Errors
    /// None: a test reads it.
    pub fn shipped() -> Result<Lock> {
        Lock::parse(include_str!("../../plans/lfm2-8b-a1b.lock.ron"))
    }

    /// Reads a lock file; none if there is no such file.
    ///
    /// # Errors
    /// The file cannot be read or is no lock.
    pub fn read(path: &Path) -> Result<Option<Lock>> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("cannot read the lock file {}", path.display()))?,
        };
        Lock::parse(&text).with_context(|| format!("{} is not a lock file", path.display())).map(Some)
    }

    /// Writes it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.to_text()?).with_context(|| format!("cannot write the lock file {}", path.display()))
    }

    /// Its text: a line for each candidate.
    ///
    /// # Errors
    /// None that a lock can cause.
    pub fn to_text(&self) -> Result<String> {
        let config = ron::ser::PrettyConfig::new().depth_limit(4).new_line("\n");
        Ok(format!("{HEADING}{}\n", ron::ser::to_string_pretty(self, config)?))
    }

    /// Its choices.
    pub fn tactics(&self) -> Tactics {
        let chosen = self.problems.iter().map(|(key, measured)| (key.clone(), measured.chosen.clone()));
        let ranked = |measured: &Measured| {
            let us = |(name, time): (&String, &Time)| match time {
                Time::Us(us) => Some((*us, name.clone())),
                Time::Failed(_) => None,
            };
            let mut times: Vec<(f64, String)> = measured.candidates.iter().filter_map(us).collect();
            times.sort_by(|a, b| a.0.total_cmp(&b.0));
            times.into_iter().map(|(_, name)| name).collect()
        };
        let measured = self.problems.iter().map(|(key, measured)| (key.clone(), ranked(measured)));
        let packed = self.problems.iter().filter_map(|(key, measured)| Some((key.clone(), measured.packed.clone()?)));
        let library = self.problems.iter().filter_map(|(key, measured)| Some((key.clone(), measured.library.clone()?)));
        Tactics {
            chosen: chosen.collect(),
            packed: packed.collect(),
            library: library.collect(),
            measured: measured.collect(),
            nth: None,
        }
    }

    /// By which lfm2c, on which GPU and with which toolkit it was measured: times compare where all three are the same.
    fn measured_by(&self) -> (&str, &str, (u32, u32)) {
        (&self.compiler, &self.gpu, self.toolkit)
    }

    /// Whether measurements of this lfm2c on a GPU with a toolkit compare with what it has.
    ///
    /// # Errors
    /// They do not: by what each was measured.
    pub fn compares(&self, gpu: &str, toolkit: (u32, u32)) -> Result<()> {
        let here = (env!("CARGO_PKG_VERSION"), gpu, toolkit);
        let text = |(compiler, gpu, (major, minor)): (&str, &str, (u32, u32))| {
            format!("by lfm2c {compiler} with CUDA {major}.{minor} on {gpu}")
        };
        ensure!(
            self.measured_by() == here,
            "expected measurements {}, found some {}; measure all of it again with `lfm2c compile --tune`",
            text(here),
            text(self.measured_by())
        );
        Ok(())
    }

    /// Takes over what was measured earlier of other problems, such as those of other bucket sizes, if it compares: measured by
    /// the same lfm2c with the same toolkit on the same kind of GPU. Says how many problems it took.
    pub fn keep(&mut self, earlier: &Lock) -> usize {
        if self.measured_by() != earlier.measured_by() {
            return 0;
        }
        for (bucket, time) in &earlier.graphs {
            self.graphs.entry(bucket.clone()).or_insert(*time);
        }
        let before = self.problems.len();
        for (key, measured) in &earlier.problems {
            self.problems.entry(key.clone()).or_insert_with(|| measured.clone());
        }
        self.problems.len() - before
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::select::Pack;
    use crate::codegen::{CompileOptions, Compiled, Recipe, Source, Tuning, compile};
    use crate::passes::Target;

    fn lock() -> Lock {
        let candidates = BTreeMap::from([
            ("tile b=2".to_owned(), Time::Failed("too much".into())),
            ("stream a=1".to_owned(), Time::Us(5.25)),
        ]);
        Lock {
            version: LOCK_VERSION,
            compiler: "0.1.0".into(),
            gpu: "NVIDIA H200".into(),
            toolkit: (13, 0),
            graphs: BTreeMap::from([("decode_1".into(), GraphTime { default_us: 1450.0, us: 1390.5, timed: 31 })]),
            problems: BTreeMap::from([(
                "matmul 01".to_owned(),
                Measured { chosen: "stream a=1".into(), packed: None, library: None, candidates },
            )]),
        }
    }

    const TEXT: &str = r#"(
    version: 2,
    compiler: "0.1.0",
    gpu: "NVIDIA H200",
    toolkit: (13, 0),
    graphs: {
        "decode_1": (
            default_us: 1450.0,
            us: 1390.5,
            timed: 31,
        ),
    },
    problems: {
        "matmul 01": (
            chosen: "stream a=1",
            candidates: {
                "stream a=1": Us(5.25),
                "tile b=2": Failed("too much"),
            },
        ),
    },
)
"#;

    #[test]
    fn what_is_written_is_read_back() {
        let text = lock().to_text().expect("it can be written");
        assert_eq!(text.strip_prefix(HEADING).expect("a heading"), TEXT);
        assert_eq!(Lock::parse(&text).expect("it can be read"), lock());
    }

    #[test]
    fn the_program_brings_measurements() {
        let lock = Lock::shipped().expect("it is a lock");
        assert!(lock.problems.len() > 100 && lock.gpu.contains("H200"), "{} of {}", lock.problems.len(), lock.gpu);
    }

    #[test]
    fn faults_say_where() {
        let fault = |from: &str, to: &str| Lock::parse(&TEXT.replace(from, to)).expect_err("a fault").to_string();
        let unknown = fault("chosen:", "choosen:");
        assert!(unknown.starts_with("line 15, column ") && unknown.contains("choosen"), "{unknown}");
        assert!(fault("Us(5.25)", "Us(fast)").starts_with("line 17, column "));
        assert!(fault("gpu:", "gpus:").starts_with("line "));
        assert!(fault("toolkit: (13, 0),", "").starts_with("line "));
        // Not what is unknown in a form of tomorrow, but that it is one.
        let later = Lock::parse(&TEXT.replace("version: 2", "version: 3").replace("chosen", "better"));
        assert!(later.expect_err("another version").to_string().contains("expected 2, found 3"));
    }

    #[test]
    fn earlier_problems_are_kept_where_they_compare() {
        let other = |gpu: &str| {
            let measured = lock().problems["matmul 01"].clone();
            let newer = Measured { chosen: "tile b=2".into(), ..measured.clone() };
            let problems = BTreeMap::from([("matmul 01".into(), newer), ("norm 02".into(), measured)]);
            Lock { gpu: gpu.into(), problems, ..lock() }
        };
        let mut kept = lock();
        assert_eq!(kept.keep(&other("NVIDIA H200")), 1);
        assert_eq!(kept.problems.len(), 2);
        assert_eq!(kept.problems["matmul 01"].chosen, "stream a=1", "the newer measurement");
        let mut foreign = lock();
        assert_eq!(foreign.keep(&other("NVIDIA H100")), 0);
        assert_eq!(foreign, lock());
    }

    #[test]
    fn what_was_measured_otherwise_does_not_compare() {
        let here = Lock { compiler: env!("CARGO_PKG_VERSION").into(), ..lock() };
        here.compares("NVIDIA H200", (13, 0)).expect("measured alike");
        let older = Lock { compiler: "0.0.1".into(), ..here.clone() };
        for (lock, gpu, toolkit, found) in [
            (&here, "NVIDIA H100", (13, 0), "on NVIDIA H200; measure"),
            (&here, "NVIDIA H200", (13, 1), "with CUDA 13.0 on"),
            (&older, "NVIDIA H200", (13, 0), "found some by lfm2c 0.0.1 "),
        ] {
            let error = lock.compares(gpu, toolkit).expect_err("measured otherwise").to_string();
            assert!(error.contains(found) && error.contains("compile --tune"), "{error}");
        }
    }

    /// A small model for a GPU, a bucket of each phase.
    pub(in super::super) fn compiled(tactics: Tactics) -> Compiled {
        compiled_with(&options(tactics))
    }

    pub(in super::super) fn compiled_with(options: &CompileOptions) -> Compiled {
        let recipe = Recipe::parse(include_str!("../../plans/synthetic.ron")).expect("the recipe is valid");
        compile(&Source::Recipe(recipe.into(), None), options, &Silent).expect("it compiles")
    }

    pub(in super::super) fn options(tactics: Tactics) -> CompileOptions {
        CompileOptions {
            target: Target::Sm90a,
            dtype: Some(crate::ir::DType::BF16),
            prefill: Some(vec![64]),
            decode: Some(vec![1]),
            without_cubins: true,
            tactics,
            ..CompileOptions::default()
        }
    }

    /// Kernels that steps launch, as the plan names them.
    fn kernels(compiled: &Compiled) -> Vec<String> {
        let manifest = &compiled.file.manifest;
        let steps = manifest.ranks[0].buckets.iter().flat_map(|bucket| &bucket.steps);
        let launched = steps.filter_map(|step| step.launch.as_ref()).map(|launch| launch.kernel as usize);
        let name = |kernel: &crate::plan::Kernel| format!("{} {}", kernel.name, kernel.config).trim_end().to_owned();
        launched.map(|at| name(&manifest.kernels[at])).collect()
    }

    #[test]
    fn a_plan_has_the_choices_of_a_lock() {
        let default = compiled(Tactics::default());
        let tuning = Tuning::of(&default.file.manifest, Pack::default());
        let before = kernels(&default);
        let last = |(key, names): (&str, Vec<&str>)| Some((key.to_owned(), (*names.last()?).to_owned()));
        let mut last = tuning.problems().filter_map(last);
        let (key, chosen) = last.find(|(_, chosen)| !before.contains(chosen)).expect("there is a choice");
        let mut lock = lock();
        let measured = Measured { chosen: chosen.clone(), packed: None, library: None, candidates: BTreeMap::new() };
        lock.problems.insert(key, measured);
        let tuned = compiled(lock.tactics());
        assert!(kernels(&tuned).contains(&chosen), "{chosen} in {:?}", kernels(&tuned));
        assert_eq!((tuned.known.chosen, tuned.known.problems), (1, tuning.problems().count()));
        let again = compiled(lock.tactics());
        assert_eq!(tuned.file.hash(), again.file.hash(), "the same lock, the same plan");
        assert_ne!(tuned.file.hash(), default.file.hash());
    }

    #[test]
    fn the_fastest_that_there_is_stands_in_for_what_is_chosen() {
        let default = compiled(Tactics::default());
        let tuning = Tuning::of(&default.file.manifest, Pack::default());
        let mut problems = tuning.problems().filter(|(_, names)| names.len() > 2);
        let (key, names) = problems.next().expect("there is a choice");
        let (fast, slow) = (names[2].to_owned(), names[1].to_owned());
        let mut lock = lock();
        let times = [("wish speed=11", Time::Us(1.0)), (&fast, Time::Us(2.0)), (&slow, Time::Us(3.0))];
        let times = times.map(|(name, time)| (name.to_owned(), time));
        let failed = (names[0].to_owned(), Time::Failed("too much".into()));
        let candidates = times.into_iter().chain([failed]).collect();
        lock.problems.insert(
            key.to_owned(),
            Measured { chosen: "wish speed=11".into(), packed: None, library: None, candidates },
        );
        let tactics = lock.tactics();
        assert_eq!(tactics.measured[key], ["wish speed=11", &fast, &slow]);
        let tuned = compiled(tactics);
        assert!(kernels(&tuned).contains(&fast), "{fast} in {:?}", kernels(&tuned));
        assert_eq!(tuned.known.chosen, 1);
    }

    #[test]
    fn what_a_lock_says_of_unknown_things_is_ignored() {
        let default = compiled(Tactics::default());
        assert_eq!(default.known.chosen, 0);
        let mut lock = lock();
        let tuning = Tuning::of(&default.file.manifest, Pack::default());
        for (key, _) in tuning.problems() {
            let measured =
                Measured { chosen: "wish speed=11".into(), packed: None, library: None, candidates: BTreeMap::new() };
            lock.problems.insert(key.to_owned(), measured);
        }
        let tuned = compiled(lock.tactics());
        assert_eq!(tuned.known, default.known);
        assert_eq!(tuned.file.hash(), default.file.hash());
    }
}
