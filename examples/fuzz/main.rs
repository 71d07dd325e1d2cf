//! Fuzzing, without a special compiler: valid inputs, changed at random, go into whatever reads files.
//!
//!     cargo run --release --example fuzz -- plan --cases 1000000 --seed 1
//!
//! The cases follow from the seed alone. A case that panics, takes too long or breaks a promise is reported with the command
//! that repeats it, and the exit code is 1.

mod mutate;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use mutate::Random;
use targets::{Outcome, TARGETS, Target};

/// Feeds changed inputs to a reader of files.
#[derive(Parser)]
struct Arguments {
    /// What to fuzz: plan, ir, checkpoint, recipe.
    #[arg(value_parser = target)]
    target: &'static Target,
    /// How many inputs.
    #[arg(long, default_value_t = 100_000)]
    cases: u64,
    /// Chooses the inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The first case, to go on or to repeat one.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Seconds that one case may take.
    #[arg(long, default_value_t = 10)]
    limit: u64,
    /// Writes each input that fails into this folder.
    #[arg(long)]
    keep: Option<std::path::PathBuf>,
}

fn target(name: &str) -> Result<&'static Target, String> {
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    TARGETS.iter().find(|target| target.name == name).ok_or_else(|| format!("expected one of {}", names.join(", ")))
}

/// After so many failures nobody needs more.
const MAX_FAILURES: usize = 10;
/// A worker that has no case in hand.
const IDLE: u64 = u64::MAX;

/// What a worker is doing.
struct Worker {
    case: AtomicU64,
    /// Milliseconds after the start.
    since: AtomicU64,
}

struct Run<'a> {
    arguments: &'a Arguments,
    seeds: Vec<targets::Seed>,
    start: Instant,
    next: AtomicU64,
    accepted: AtomicU64,
    rejected: AtomicU64,
    running: AtomicUsize,
    failures: Mutex<Vec<u64>>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let run = Run {
        arguments: &arguments,
        seeds: (arguments.target.seeds)(),
        start: Instant::now(),
        next: AtomicU64::new(arguments.first),
        accepted: AtomicU64::new(0),
        rejected: AtomicU64::new(0),
        running: AtomicUsize::new(0),
        failures: Mutex::new(vec![]),
    };
    for seed in &run.seeds {
        if let Outcome::Rejected = (arguments.target.run)(&seed.bytes()) {
            eprintln!("a seed of `{}` is no valid input: nothing that follows would mean much", arguments.target.name);
            return ExitCode::FAILURE;
        }
    }
    let count = std::thread::available_parallelism().map_or(1, |count| count.get());
    let workers: Vec<Worker> =
        (0..count).map(|_| Worker { case: AtomicU64::new(IDLE), since: AtomicU64::new(0) }).collect();
    run.running.store(count, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for worker in &workers {
            scope.spawn(|| {
                run.work(worker);
                run.running.fetch_sub(1, Ordering::SeqCst);
            });
        }
        while run.running.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(20));
            run.watch(&workers);
        }
    });
    let failed = run.failures.lock().map_or(0, |failures| failures.len() as u64);
    let (accepted, rejected) = (run.accepted.load(Ordering::SeqCst), run.rejected.load(Ordering::SeqCst));
    let seconds = run.start.elapsed().as_secs_f64();
    let total = accepted + rejected + failed;
    println!(
        "{}: {total} cases, {accepted} accepted, {rejected} rejected, {failed} failed, {:.0} cases/s (seed {})",
        arguments.target.name,
        total as f64 / seconds,
        arguments.seed
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Run<'_> {
    fn work(&self, worker: &Worker) {
        let end = self.arguments.first.saturating_add(self.arguments.cases);
        loop {
            let case = self.next.fetch_add(1, Ordering::SeqCst);
            let enough = self.failures.lock().is_ok_and(|failures| failures.len() >= MAX_FAILURES);
            if case >= end || enough {
                return;
            }
            let mut random = Random::new(self.arguments.seed, case);
            let seed = &self.seeds[random.below(self.seeds.len())];
            let input = seed.mutated(&mut random);
            worker.since.store(self.start.elapsed().as_millis() as u64, Ordering::SeqCst);
            worker.case.store(case, Ordering::SeqCst);
            let outcome = catch_unwind(AssertUnwindSafe(|| (self.arguments.target.run)(&input)));
            worker.case.store(IDLE, Ordering::SeqCst);
            match outcome {
                Ok(Outcome::Accepted) => {
                    self.accepted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Outcome::Rejected) => {
                    self.rejected.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Outcome::Broken(promise)) => self.fail(case, &input, &promise),
                Err(_) => self.fail(case, &input, "it panicked"),
            }
        }
    }

    fn fail(&self, case: u64, input: &[u8], what: &str) {
        let Arguments { target, seed, keep, .. } = self.arguments;
        eprintln!("case {case}: {what}\n  repeat with: fuzz {} --seed {seed} --first {case} --cases 1", target.name);
        if let Some(folder) = keep {
            let path = folder.join(format!("{}-{seed}-{case}", target.name));
            if let Err(error) = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, input)) {
                eprintln!("  cannot keep the input: {error}");
            }
        }
        if let Ok(mut failures) = self.failures.lock() {
            failures.push(case);
        }
    }

    /// Ends the process if a case takes too long: a hanging thread cannot be ended alone.
    fn watch(&self, workers: &[Worker]) {
        let now = self.start.elapsed().as_millis() as u64;
        for worker in workers {
            let case = worker.case.load(Ordering::SeqCst);
            let since = worker.since.load(Ordering::SeqCst);
            if case != IDLE && now.saturating_sub(since) > self.arguments.limit.saturating_mul(1000) {
                let Arguments { target, seed, limit, .. } = self.arguments;
                eprintln!("case {case}: still running after {limit} s");
                eprintln!("  repeat with: fuzz {} --seed {seed} --first {case} --cases 1", target.name);
                std::process::exit(1);
            }
        }
    }
}
