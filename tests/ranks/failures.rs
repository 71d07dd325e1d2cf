//! A rank that is killed, stopped, cannot go on or is not like the others: all ranks end by themselves, soon, and one says why.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{LFM2C, compile, errors, lfm2c, mpirun, project};

/// How soon all must have ended.
const SOON: Duration = Duration::from_secs(10);
/// What mpirun starts instead of a rank: it notes the rank's process and what it exited with, and lets mpirun know nothing of that.
/// Told to end, it waits for the rank: if mpirun found nobody to wait for, it would be gone at once, and MPI ends a process whose
/// launcher is gone.
const RANK: &str = "#!/bin/sh\ntrap : TERM\n\"$@\" 2> errors.$OMPI_COMM_WORLD_RANK &\nchild=$!\n\
                    echo $child > pid.$OMPI_COMM_WORLD_RANK\nwait $child\ncode=$?\n\
                    while kill -0 $child 2> /dev/null; do wait $child; code=$?; done\n\
                    echo $code > end.$OMPI_COMM_WORLD_RANK.new && mv end.$OMPI_COMM_WORLD_RANK.new end.$OMPI_COMM_WORLD_RANK\n";

fn signal(name: &str, pid: &str) {
    let _ = Command::new("kill").args([&format!("-{name}"), pid]).stderr(Stdio::null()).status();
}

/// Ranks at a long piece of work, and an mpirun that is to look on.
struct World {
    folder: tempfile::TempDir,
    mpirun: Child,
    ranks: usize,
}

impl World {
    fn at_work(ranks: usize) -> World {
        World::with_plan(ranks, &[])
    }

    fn with_plan(ranks: usize, choices: &[&str]) -> World {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let at = folder.path();
        compile(at, "plans/synthetic.ron", "demo.plan", choices);
        let line = |i: usize| format!("{{\"tokens\": [{i}], \"max_new_tokens\": {}, \"ignore_eos\": true}}\n", 20 + i);
        fs::write(at.join("in.jsonl"), (1..400).map(line).collect::<String>().repeat(9)).expect("it is written");
        fs::write(at.join("rank"), RANK).expect("it is written");
        let (count, rank) = (ranks.to_string(), at.join("rank"));
        let run = ["run", "demo.plan", "--input", "in.jsonl", "--output", "out.jsonl"];
        let rank = ["-n", &count, "sh", rank.to_str().expect("UTF-8"), LFM2C];
        let mpirun = mpirun(at, &[&rank[..], &run].concat())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("mpirun starts");
        let world = World { folder, mpirun, ranks };
        let begun = Instant::now();
        while world.read("out.jsonl").is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(60), "no result: {}", world.read("errors.0"));
            sleep(Duration::from_millis(20));
        }
        world
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap_or_default().trim().to_owned()
    }

    /// What ranks but one have exited with, once all of them have: not because mpirun has ended them, since it is stopped.
    fn strike(&self, name: &str, victim: usize) -> (Duration, Vec<String>) {
        signal("STOP", &self.mpirun.id().to_string());
        let begun = Instant::now();
        signal(name, &self.read(&format!("pid.{victim}")));
        let others = || (0..self.ranks).filter(|&rank| rank != victim);
        loop {
            let ends: Vec<String> = others().map(|rank| self.read(&format!("end.{rank}"))).collect();
            if ends.iter().all(|end| !end.is_empty()) {
                return (begun.elapsed(), ends);
            }
            assert!(begun.elapsed() < SOON, "SIG{name} of rank {victim}: the others have exited with {ends:?}");
            sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for rank in 0..self.ranks {
            if self.read(&format!("end.{rank}")).is_empty() {
                signal("KILL", &self.read(&format!("pid.{rank}")));
            }
        }
        let _ = self.mpirun.kill();
        let _ = self.mpirun.wait();
    }
}

fn strike(name: &str, ranks: usize, victim: usize, cause: &str) {
    strike_in(&World::at_work(ranks), name, victim, cause);
}

fn strike_in(world: &World, name: &str, victim: usize, cause: &str) {
    let ranks = world.ranks;
    let pid = world.read(&format!("pid.{victim}"));
    let (elapsed, ends) = world.strike(name, victim);
    println!("SIG{name} of rank {victim} of {ranks}: the others have ended after {:.2} s", elapsed.as_secs_f64());
    assert!(ends.iter().all(|end| end == "1"), "{ends:?}");
    let said: Vec<String> = (0..ranks).map(|rank| world.read(&format!("errors.{rank}"))).collect();
    // Rank 0 tells; without it each of the others does.
    for (rank, text) in said.iter().enumerate().filter(|&(rank, _)| rank != victim) {
        let ours = ours(text);
        if rank > 0 && victim > 0 {
            assert!(ours.is_empty(), "rank {rank}: {text}");
            continue;
        }
        let [line] = ours[..] else { panic!("rank {rank}: expected one message: {text}") };
        let start = format!("lfm2c: rank {victim} (host ");
        assert!(line.starts_with(&start) && line.contains(&format!("pid {pid}): {cause}")), "rank {rank}: {text}");
    }
}

/// What lfm2c itself says. MPI may add that a rank has ended whose memory it was reading.
fn ours(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.starts_with('[')).collect()
}

#[test]
fn a_rank_that_is_killed() {
    strike("KILL", 4, 3, "has ended before the work was done");
    strike("KILL", 2, 0, "has ended before the work was done");
}

/// The others are within a collective with it, or wait for it to agree on the next step.
#[test]
fn a_rank_with_experts_that_others_wait_for() {
    let spread = |ranks, size| World::with_plan(ranks, &["--ranks", size]);
    strike_in(&spread(2, "expert=2"), "KILL", 1, "has ended before the work was done");
    strike_in(&spread(2, "expert=2"), "KILL", 0, "has ended before the work was done");
    strike_in(&spread(4, "expert=2"), "STOP", 3, "no sign of life for 5 s");
}

/// The others wait for rows of it, or for it to take theirs, at once or behind another that does.
#[test]
fn a_rank_with_layers_that_others_wait_for() {
    let spread = |ranks, size| World::with_plan(ranks, &["--ranks", size]);
    strike_in(&spread(2, "pipeline=2"), "KILL", 1, "has ended before the work was done");
    strike_in(&spread(4, "pipeline=4"), "KILL", 2, "has ended before the work was done");
    strike_in(&spread(2, "pipeline=2"), "STOP", 1, "no sign of life for 5 s");
    strike_in(&spread(4, "expert=2,pipeline=2"), "KILL", 3, "has ended before the work was done");
}

#[test]
fn a_rank_that_is_told_to_end() {
    strike("TERM", 4, 2, "was told to end by a signal (SIGTERM)");
}

#[test]
fn a_rank_that_is_stopped() {
    strike("STOP", 4, 1, "no sign of life for 5 s");
}

#[test]
fn rank_0_is_stopped() {
    strike("STOP", 2, 0, "no sign of life for 5 s");
}

/// Ctrl-C: `mpirun` is told to end, and ends the ranks. What is written stays, and the rest can be resumed.
#[test]
fn an_interrupted_run_can_be_resumed() {
    let mut world = World::at_work(2);
    let begun = Instant::now();
    signal("INT", &world.mpirun.id().to_string());
    assert!(!world.mpirun.wait().expect("it ends").success());
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    (0..2).for_each(|rank| fs::write(world.folder.path().join(format!("end.{rank}")), "0").expect("it is written"));
    // Nobody is at fault.
    assert_eq!([0, 1].map(|rank| world.read(&format!("errors.{rank}"))), ["", ""]);
    let at = world.folder.path();
    let count = |name: &str| fs::read_to_string(at.join(name)).expect("it was written").lines().count();
    let kept = count("out.jsonl");
    assert!(kept > 0 && kept < count("in.jsonl"), "{kept} results");
    let first = (kept + 40).to_string();
    let run = ["run", "demo.plan", "--input", "in.jsonl", "-n", &first, "--output"];
    super::succeeded(&super::on_ranks(at, "2", &[&run[..], &["out.jsonl", "--resume"]].concat()));
    super::succeeded(&lfm2c(at, &[&run[..], &["one.jsonl"]].concat()));
    let [resumed, whole] = ["out.jsonl", "one.jsonl"].map(|name| fs::read(at.join(name)).expect("it was written"));
    assert!(resumed == whole, "another result");
}

/// Ranks that are started with different words after `lfm2c run`; all of what is said must be in one message.
fn disagree(folder: &Path, ranks: &[&[&str]], code: i32, said: &[&str]) {
    let begun = Instant::now();
    let mut words = vec![];
    for (at, arguments) in ranks.iter().enumerate() {
        words.extend_from_slice(if at > 0 { &[":", "-n", "1", LFM2C, "run"] } else { &["-n", "1", LFM2C, "run"] });
        words.extend_from_slice(arguments);
    }
    let output = mpirun(folder, &words).output().expect("mpirun starts");
    let text = errors(&output);
    assert!(begun.elapsed() < SOON, "{text}");
    assert_eq!(output.status.code(), Some(code), "{text}");
    let ours: Vec<&str> = text.lines().filter(|line| line.starts_with("lfm2c: ")).collect();
    assert_eq!(ours.len(), 1, "one message: {text}");
    for words in said {
        assert!(ours[0].contains(words), "expected `{words}`: {text}");
    }
}

#[test]
fn ranks_that_are_not_alike() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    compile(at, "plans/synthetic.ron", "a.plan", &[]);
    compile(at, "plans/synthetic.ron", "b.plan", &["--dtype", "bf16"]);
    let hash = |name: &str| {
        let text = String::from_utf8(lfm2c(at, &["inspect", name, "--format", "json"]).stdout).expect("UTF-8");
        assert!(!text.is_empty());
        blake3::hash(&fs::read(at.join(name)).expect("it was written")).to_hex()[..12].to_owned()
    };
    let (a, b): (&[&str], &[&str]) = (&["a.plan"], &["b.plan"]);
    let expected = format!("plan: expected {}, as on rank 0, found {}", hash("a.plan"), hash("b.plan"));
    disagree(at, &[a, b], 1, &["lfm2c: rank 1 (host ", &expected, "; give every rank the same plan"]);
    disagree(at, &[a, a, a, b], 1, &["lfm2c: rank 3 (host ", &expected]);
    disagree(at, &[a, &["none.plan"]], 1, &["lfm2c: rank 1 (host ", "): none.plan: No such file"]);
    // What the input is, only rank 0 asks.
    let none = ["a.plan", "--input", "none.jsonl"];
    disagree(at, &[&none, &none], 1, &["lfm2c: rank 0 (host ", "cannot read none.jsonl"]);
    let wrong = ["a.plan", "--input", "a.jsonl", "--validate", "answers.bin"];
    disagree(at, &[&wrong, &wrong], 2, &["lfm2c: --validate"]);
    let same = ["a.plan", "--input", "in.bin", "--output", "in.bin"];
    fs::write(at.join("in.bin"), [1, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0]).expect("it is written");
    disagree(at, &[&same, &same], 2, &["lfm2c: --output in.bin"]);
    // A GPU for each of four ranks, or a plan for GPUs: there is one message, whoever fails first, and all do at once.
    let cuda: &[&str] = &["a.plan", "--device", "cuda"];
    disagree(at, &[cuda; 4], 1, &["lfm2c: rank "]);
    let model = project("models/demo");
    let other = ["a.plan", "--model", &model];
    disagree(at, &[&["a.plan"], &other], 1, &["lfm2c: rank 1 (host ", "compiled for another model"]);
    // The others of its group wait for it.
    compile(at, "plans/synthetic.ron", "c.plan", &["--ranks", "expert=2"]);
    let other = ["c.plan", "--model", &model];
    disagree(at, &[&["c.plan"], &other], 1, &["lfm2c: rank 1 (host ", "compiled for another model"]);
}
