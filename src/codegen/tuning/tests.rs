//! What rounds and whole graphs choose.

use std::collections::BTreeSet;

use super::*;
use crate::codegen::CompileOptions;
use crate::codegen::compile::Compiled;
use crate::codegen::lock::tests::{compiled, compiled_with, options};
use crate::plan::{ExpertCounts, Program};

fn trials(times: &[Option<f64>]) -> Vec<Trial> {
    let trial = |(i, us): (usize, &Option<f64>)| Trial {
        name: format!("stream n={i}"),
        packed: false,
        library: false,
        time: Some(us.map_or_else(|| Time::Failed("no".into()), Time::Us)),
    };
    times.iter().enumerate().map(trial).collect()
}

#[test]
fn the_default_stays_unless_another_is_clearly_faster() {
    let first = |list: &[Trial]| choose(&list.iter().collect::<Vec<_>>()).map(|trial| trial.name.clone());
    let chosen = |times: &[Option<f64>]| first(&trials(times));
    assert_eq!(chosen(&[Some(10.0), Some(9.9), Some(11.0)]).as_deref(), Some("stream n=0"));
    assert_eq!(chosen(&[Some(10.0), Some(9.8)]).as_deref(), Some("stream n=1"), "just by the margin");
    assert_eq!(chosen(&[Some(10.0), Some(9.0), Some(8.0), Some(8.5)]).as_deref(), Some("stream n=2"));
    assert_eq!(chosen(&[Some(10.0), None]).as_deref(), Some("stream n=0"));
    assert_eq!(chosen(&[None, Some(50.0)]).as_deref(), Some("stream n=1"), "the default does not run");
    assert_eq!(chosen(&[]), None);
    let mut unknown = trials(&[Some(10.0), Some(1.0)]);
    unknown[0].time = None;
    assert_eq!(first(&unknown).as_deref(), Some("stream n=0"));
}

fn tuning() -> Tuning {
    Tuning::of(&compiled(Tactics::default()).file.manifest, Allowed::default())
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
            assert_eq!(lock.problems.contains_key(key), trials.list.len() <= round.nth + 1, "{key} after {round:?}");
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

#[test]
fn what_whole_graphs_choose_goes_before_single_times() {
    let mut tuning = tuning();
    for round in tuning.rounds() {
        tuning.record(round, &times(&tuning, round, |at| 100.0 - at as f64)).expect("times of all steps");
    }
    let bucket = tuning.buckets.iter().position(|bucket| bucket.phase == Phase::Decode).expect("there is one");
    let entries = tuning.entries(bucket);
    let steps: usize = entries.iter().map(|entry| entry.steps).sum();
    assert_eq!(steps, tuning.buckets[bucket].keys.len());
    let entry = entries.iter().find(|entry| entry.candidates.len() > 1).expect("there is a choice");
    let (default, fastest) = (&entry.candidates[0].0, &entry.candidates[entry.candidates.len() - 1].0);
    let lock = tuning.lock("a GPU", (13, 0));
    assert_eq!(lock.problems[&entry.key].chosen, *fastest);
    let chosen = BTreeMap::from([(entry.key.clone(), default.clone())]);
    tuning.refine(bucket, Refined { chosen, default_us: 70.04, us: 65.0, timed: 9 });
    let lock = tuning.lock("a GPU", (13, 0));
    assert_eq!(lock.problems[&entry.key].chosen, *default);
    assert_eq!(lock.graphs[&tuning.buckets[bucket].name], GraphTime { default_us: 70.0, us: 65.0, timed: 9 });
    let again = tuning.entries(bucket).into_iter().find(|other| other.key == entry.key).expect("still there");
    assert_eq!(again.fixed.as_ref(), Some(default));
}

#[test]
fn what_is_better_apart_is_in_the_lock() {
    let mut tuning = tuning();
    let bucket = tuning.buckets.iter().position(|bucket| bucket.phase == Phase::Decode).expect("there is one");
    let key = tuning.buckets[bucket].keys[0].clone();
    let found = |chosen: &[(&str, &str)], us| {
        let chosen = chosen.iter().map(|(key, name)| ((*key).to_owned(), (*name).to_owned())).collect();
        Refined { chosen, default_us: 100.0, us, timed: 3 }
    };
    tuning.refine(bucket, found(&[], 90.0));
    tuning.take_apart(bucket, found(&[(&key, APART), ("inner 01", APART), ("other 02", "together")], 80.0));
    let lock = tuning.lock("a GPU", (13, 0));
    let chosen = |key: &str| lock.problems.get(key).map(|measured| measured.chosen.as_str());
    assert_eq!((chosen(&key), chosen("inner 01"), chosen("other 02")), (Some(APART), Some(APART), None));
    let time = lock.graphs[&tuning.buckets[bucket].name];
    assert_eq!((time.us, time.timed), (80.0, 6));
}

#[test]
fn what_another_has_measured_is_not_measured_again() {
    let mut known = tuning();
    for round in known.rounds() {
        let times = times(&known, round, |at| 10.0 + at as f64);
        known.record(round, &times).expect("times of all steps");
    }
    let mut again = tuning();
    again.learn(&known);
    assert!(again.rounds().into_iter().all(|round| again.measured(round).is_empty()));
    let before = known.problems.len();
    known.absorb(again);
    assert_eq!(known.problems.len(), before, "they are the same");
}

#[test]
fn a_library_that_is_clearly_faster_goes_before_the_best_kernel() {
    let trial =
        |name: &str, library, us: f64| Trial { name: name.into(), packed: false, library, time: Some(Time::Us(us)) };
    let lock = |library_us: f64| {
        let list = vec![trial("a", false, 10.0), trial("b", false, 8.0), trial("cublaslt", true, library_us)];
        let problems = BTreeMap::from([("product".to_owned(), Trials { phase: Phase::Prefill, list })]);
        Tuning { problems, ..Tuning::default() }
            .lock("a GPU", (13, 0))
            .problems
            .remove("product")
            .expect("it is measured")
    };
    let faster = lock(7.5);
    assert_eq!((&*faster.chosen, faster.library.as_deref()), ("b", Some("cublaslt")));
    // Faster than the default, and than the best kernel by what may be noise.
    let alike = lock(7.9);
    assert_eq!((&*alike.chosen, alike.library.as_deref()), ("b", None));
    assert_eq!(alike.candidates["cublaslt"], Time::Us(7.9));
    let tactics =
        Lock { problems: BTreeMap::from([("product".into(), faster)]), ..Tuning::default().lock("a GPU", (13, 0)) };
    assert_eq!(tactics.tactics().library["product"], "cublaslt");
}

/// The same model with its eight experts spread over ranks.
fn spread(ranks: u64, replicas: Option<(&std::path::Path, u64)>, tactics: Tactics) -> Compiled {
    compiled_with(&CompileOptions {
        decode: Some(vec![8]),
        expert_ranks: ranks,
        expert_counts: replicas.map(|(counts, _)| counts.to_owned()),
        expert_replicas: replicas.map_or(0, |(_, count)| count),
        ..options(tactics)
    })
}

/// The problems of a rank's steps, without what ranks do together.
fn keys(program: &Program) -> Vec<String> {
    let steps = step_problems(program).filter(|(_, problem)| Collective::of(problem.semantic).is_none());
    steps.map(|(_, problem)| problem_key(&problem)).collect()
}

#[test]
fn what_ranks_do_together_is_timed_but_no_choice() {
    let manifest = spread(2, None, Tactics::default()).file.manifest;
    let mut tuning = Tuning::of(&manifest, Allowed::default());
    assert!(!tuning.problems().any(|(key, names)| key.starts_with("all_") || names.is_empty()));
    for (bucket, steps) in manifest.ranks[0].buckets.iter().zip(&tuning.buckets) {
        assert_eq!((steps.name.clone(), steps.keys.len()), (format!("{} of 2 ranks", bucket.name), bucket.steps.len()));
    }
    let round = Round { phase: Phase::Decode, nth: 0 };
    let [bucket] = tuning.measured(round)[..] else { panic!("one bucket of decode") };
    let steps = &manifest.ranks[0].buckets[bucket].steps;
    // Steps that are exchanges take 1000 us, the others their number.
    let us = |(i, step): (usize, &crate::plan::Step)| if step.collective.is_some() { 1e3 } else { i as f64 };
    tuning.record(round, &[(bucket, steps.iter().enumerate().map(us).collect())]).expect("times of all steps");
    let times = tuning.problems.values().flat_map(|trials| trials.list.iter().filter_map(Trial::us));
    assert!(times.fold(0.0, f64::max) < 1e3);
    let exchange = steps.iter().position(|step| step.collective.is_some()).expect("it has exchanges");
    let error = tuning.fail(round, &[(bucket, exchange, "no link".into())]).expect_err("it is no choice");
    assert!(error.to_string().contains("expected an exchange") && error.to_string().contains("no link"), "{error}");
}

#[test]
fn what_is_measured_on_one_rank_goes_for_all() {
    for ranks in [2, 4] {
        let compiled = spread(ranks, None, Tactics::default());
        let [first, others @ ..] = &compiled.file.manifest.ranks[..] else { panic!("{ranks} ranks") };
        assert!(others.iter().all(|other| keys(other) == keys(first)), "{ranks}");
        // The last candidate of each problem that the first rank has, on all ranks.
        let tuning = Tuning::of(&compiled.file.manifest, Allowed::default());
        let last = |(key, names): (&str, Vec<&str>)| Some((key.to_owned(), (*names.last()?).to_owned()));
        let tactics = Tactics { chosen: tuning.problems().filter_map(last).collect(), ..Tactics::default() };
        let chosen = spread(ranks, None, tactics);
        assert_eq!((chosen.known.chosen, chosen.known.problems), (tuning.problems.len(), tuning.problems.len()));
        let runners = |program: &Program| {
            let steps = program.buckets.iter().flat_map(|bucket| &bucket.steps);
            steps.map(|step| chosen.file.manifest.runner(step)).collect::<Vec<_>>()
        };
        let all: Vec<_> = chosen.file.manifest.ranks.iter().map(runners).collect();
        assert!(all.iter().all(|runners| *runners == all[0]), "{ranks}");
    }
}

#[test]
fn which_experts_have_replicas_makes_no_problem_of_its_own() {
    let counts = tempfile::NamedTempFile::new().expect("a file can be made");
    let sorts = |hot: u64| {
        let mut counted = ExpertCounts::new(&spread(1, None, Tactics::default()).file.manifest.model.config_hash);
        let layer = |layer: u64| (format!("layers.{layer}.ffn"), vec![hot, 1 + layer, 9, 1, 7, 2, 3, 100 - hot]);
        counted.layers.extend((2..6).map(layer));
        std::fs::write(counts.path(), serde_json::to_string(&counted).expect("numbers")).expect("it can be written");
        let plan = spread(2, Some((counts.path(), 1)), Tactics::default()).file.manifest;
        let of_rank = |program| keys(program).into_iter().filter(|key| key.starts_with("local+group")).collect();
        plan.ranks.iter().map(of_rank).collect::<Vec<BTreeSet<String>>>()
    };
    let (some, others) = (sorts(90), sorts(80));
    // Though each layer's turns are its own; decode of so few rows sorts nothing.
    assert!(some.iter().all(|keys| keys.len() == 1), "{some:?}");
    assert_eq!(some, others);
}

#[test]
fn a_share_of_another_size_goes_by_what_is_known_of_the_first() {
    // Of eight experts, ranks have two, three and three.
    let manifest = spread(3, None, Tactics::default()).file.manifest;
    let tuning = Tuning::of(&manifest, Allowed::default());
    let products = tuning.problems().filter(|(key, names)| key.starts_with("expert+swiglu") && names.len() > 2);
    let chosen: BTreeMap<String, String> = products.map(|(key, names)| (key.to_owned(), names[2].to_owned())).collect();
    let plan = spread(3, None, Tactics { chosen: chosen.clone(), ..Tactics::default() }).file.manifest;
    let products = |program: &Program| {
        let steps = program.buckets.iter().flat_map(|bucket| &bucket.steps);
        let products = steps.filter(|step| step.name.ends_with("expert+swiglu"));
        products.filter_map(|step| plan.runner(step)).collect::<Vec<_>>()
    };
    let first = products(&plan.ranks[0]);
    assert!(first.iter().any(|runner| chosen.values().any(|name| name == runner)), "{first:?} {chosen:?}");
    assert!(plan.ranks.iter().all(|program| products(program) == first));
}
