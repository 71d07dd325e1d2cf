//! What is measured, chosen and written of libraries.

use super::*;
use crate::codegen::compile::Silent;
use crate::codegen::lock::tests::compiled;
use crate::codegen::select::{Allowed, Libraries};
use crate::codegen::tuning::Tuning;
use crate::codegen::{Recipe, Source, compile};
use crate::passes::Target;

/// Options as measurements have them, for a small model with prompts short enough for kernels that read packed weights.
fn options(tactics: Tactics) -> CompileOptions {
    CompileOptions {
        target: Target::Sm90a,
        dtype: Some(crate::ir::DType::BF16),
        prefill: Some(vec![16, 300]),
        decode: Some(vec![1]),
        without_cubins: true,
        pack: Pack::All,
        libraries: Libraries::All,
        tactics,
        ..CompileOptions::default()
    }
}

fn plan(options: &CompileOptions) -> Manifest {
    let recipe = Recipe::parse(include_str!("../../../../plans/synthetic.ron")).expect("the recipe is valid");
    compile(&Source::Recipe(recipe.into(), None), options, &Silent).expect("it compiles").file.manifest
}

/// For each problem that a library has a call for: its key, its default, and its last kernel that reads packed weights, if one does.
fn problems() -> Vec<(String, String, Option<String>)> {
    let options = options(Tactics::default());
    let manifest = plan(&options);
    let tuning = Tuning::of(&manifest, options.allowed());
    let unpacked = Allowed { pack: Pack::Never, ..options.allowed() };
    let unpacked: BTreeMap<String, Vec<String>> = Tuning::of(&manifest, unpacked)
        .problems()
        .map(|(key, names)| (key.to_owned(), names.into_iter().map(str::to_owned).collect()))
        .collect();
    let with = tuning.problems().filter(|(_, names)| names.contains(&"cublaslt"));
    let packed = |key: &str, names: &[&str]| {
        names.iter().rev().find(|name| !unpacked[key].iter().any(|other| other == *name)).map(|name| (*name).to_owned())
    };
    with.map(|(key, names)| (key.to_owned(), unpacked[key][0].clone(), packed(key, &names))).collect()
}

/// A problem of a bucket, of which both were timed.
fn trial(key: &str, bucket: usize, us: [f64; 2]) -> LibraryTrial {
    LibraryTrial {
        key: key.into(),
        bucket: (bucket, format!("prefill_{bucket}")),
        steps: vec![0],
        kernel: ("wgmma n=1".into(), Some(us[0])),
        plain: "wgmma n=1".into(),
        library: ("cublaslt".into(), Some(us[1])),
        chosen: None,
    }
}

#[test]
fn what_is_measured_is_what_was_asked_for_whatever_a_lock_packs() {
    let mut base = Tactics::default();
    for (key, default, packed) in problems() {
        base.measured.insert(key.clone(), packed.iter().cloned().chain([default.clone()]).collect());
        base.packed.extend(packed.map(|packed| (key.clone(), packed)));
        base.chosen.insert(key, default);
    }
    assert!(!base.packed.is_empty(), "expected problems that both a library and a kernel over packed weights run");
    let manifest = plan(&options(base.clone()));
    let trials = LibraryTrials::of(&manifest, &options(base.clone())).expect("every step has a kernel");
    for (at, bucket) in manifest.ranks[0].buckets.iter().enumerate() {
        for libraries in [false, true] {
            let found = plan(&options(trials.tactics(at, &base, libraries)));
            trials.check(at, &found, at, libraries).expect("all of it is run by what was asked for");
            let calls = found.ranks[0].buckets[at].steps.iter().filter(|step| step.library.is_some()).count();
            let steps: usize = trials.of_bucket(at).map(|trial| trial.steps.len()).sum();
            assert_eq!(calls, if libraries { steps } else { 0 }, "{}", bucket.name);
            if let Some(trial) = trials.of_bucket(at).next() {
                let error = trials.check(at, &found, at, !libraries).expect_err("the other variant").to_string();
                let (kernel, library) = (&*trial.kernel.0, &*trial.library.0);
                let (expected, found) = if libraries { (kernel, library) } else { (library, kernel) };
                let told = format!("problem {}: expected {expected} to measure, found {found};", trial.key);
                assert!(error.contains(&told), "{error}");
            }
        }
    }
}

#[test]
fn what_a_problem_has_without_a_lock_stays_beside_the_library() {
    let (key, default, packed) = problems().into_iter().find(|(.., packed)| packed.is_some()).expect("one is packed");
    let packed = packed.expect("it is");
    // Of what the program does not bring: what the plan has, with packed weights and without.
    let base = Tactics {
        chosen: BTreeMap::from([(key.clone(), default.clone())]),
        packed: BTreeMap::from([(key.clone(), packed.clone())]),
        ..Tactics::default()
    };
    let options = options(base.clone());
    let mut trials = LibraryTrials::of(&plan(&options), &options).expect("every step has a kernel");
    trials.list.retain(|trial| trial.key == key);
    for trial in &mut trials.list {
        assert_eq!((&trial.kernel.0, &trial.plain), (&packed, &default));
        (trial.kernel.1, trial.library.1, trial.chosen) = (Some(2.0), Some(1.0), Some(true));
    }
    let empty = Tuning::default().lock("a GPU", (13, 0));
    let mut lock = empty.clone();
    trials.write(&mut lock, None);
    let mut tactics = base.clone();
    tactics.overlay(lock.tactics());
    assert_eq!((&tactics.chosen, &tactics.packed), (&base.chosen, &base.packed));
    assert_eq!(tactics.library[&key], "cublaslt");

    // Of what it brings: all that it knows.
    let shipped = Lock::shipped().expect("it is a lock");
    let (key, known) = shipped.problems.iter().find(|(_, measured)| measured.packed.is_some()).expect("one is packed");
    let trials = LibraryTrials { list: vec![LibraryTrial { chosen: Some(true), ..trial(key, 0, [2.0, 1.0]) }] };
    let mut lock = empty;
    trials.write(&mut lock, Some(&shipped));
    let found = &lock.problems[key];
    assert_eq!((&found.chosen, &found.packed), (&known.chosen, &known.packed));
    assert_eq!((found.library.as_deref(), &found.candidates["cublaslt"]), (Some("cublaslt"), &Time::Us(1.0)));
    assert!(known.candidates.iter().all(|(name, time)| name == "cublaslt" || found.candidates[name] == *time));
    let (before, mut after) = (shipped.tactics(), shipped.tactics());
    after.overlay(lock.tactics());
    assert_eq!((&after.chosen, &after.packed), (&before.chosen, &before.packed));
    assert!(before.measured[key].iter().all(|name| after.measured[key].contains(name)));
}

#[test]
fn the_first_bucket_decides_for_those_after_it() {
    let mut trials = LibraryTrials { list: vec![trial("matmul 1", 0, [9.0, 8.0]), trial("matmul 1", 1, [90.0, 99.0])] };
    assert!(trials.entries(0).iter().chain(&trials.entries(1)).all(|entry| entry.fixed.is_none()));
    let refined = |chosen: &str| Refined {
        chosen: BTreeMap::from([("matmul 1".to_owned(), chosen.to_owned())]),
        default_us: 100.0,
        us: 90.0,
        timed: 2,
    };
    let mut lock = Tuning::default().lock("a GPU", (13, 0));
    trials.write(&mut lock, None);
    assert!(lock.problems.is_empty(), "no graph was timed yet");
    trials.refine(0, &refined("cublaslt"));
    trials.write(&mut lock, None);
    let first = lock.clone();
    assert_eq!(first.problems["matmul 1"].library.as_deref(), Some("cublaslt"));
    let entries = trials.entries(1);
    assert_eq!(entries[0].fixed.as_deref(), Some("cublaslt"));
    let text = graph_text("prefill_1", &refined("cublaslt"), &entries);
    assert!(text.ends_with("2 graphs timed; 1 of its problems as chosen in another bucket"), "{text}");
    // Even where the search were to find otherwise.
    trials.refine(1, &refined("wgmma n=1"));
    trials.write(&mut lock, None);
    assert_eq!(lock, first);
    trials.list[0].chosen = Some(false);
    assert_eq!(trials.entries(1)[0].fixed.as_deref(), Some("wgmma n=1"));
}

#[test]
fn kernels_that_are_gone_leave_no_library_to_be_measured_against() {
    let mut tactics = Tactics::default();
    for (i, (key, default, packed)) in problems().into_iter().enumerate() {
        let chosen = ["gone kernel=1", "cublaslt"][i % 2];
        let last = packed.unwrap_or(default);
        tactics.chosen.insert(key.clone(), chosen.to_owned());
        tactics.library.insert(key.clone(), "cublaslt".into());
        tactics.measured.insert(key, vec!["cublaslt".into(), last]);
    }
    let named = options(Tactics { library: BTreeMap::new(), ..tactics.clone() });
    let manifest = plan(&named);
    let error = LibraryTrials::of(&manifest, &named).expect_err("libraries are no kernels").to_string();
    assert!(
        error.contains("bucket prefill_16, step ") && error.contains("expected a kernel, found cublaslt;"),
        "{error}"
    );
    assert!(error.contains("--tune"), "{error}");
    let kernels = options(without_libraries(&tactics, &manifest));
    let trials = LibraryTrials::of(&plan(&kernels), &kernels).expect("every step has a kernel");
    assert!(trials.list.len() > 2);
    for trial in &trials.list {
        assert_eq!(trial.kernel.0, tactics.measured[&trial.key][1], "the fastest kernel that there is");
    }
}

#[test]
fn what_graphs_choose_is_written_beside_what_a_lock_knows() {
    let manifest = compiled(Tactics::default()).file.manifest;
    let mut trials = LibraryTrials::of(&manifest, &CompileOptions::default()).expect("every step has a kernel");
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
        graph_text("prefill_64", &found, &entries),
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
    trials.write(&mut lock, None);
    assert_eq!(lock.problems.len(), 2, "what the search did not see is not written");
    let (first, second) = (&lock.problems[&keys[0]], &lock.problems[&keys[1]]);
    assert_eq!((first.library.as_deref(), &*first.chosen), (Some("cublaslt"), "stream a=1"));
    assert_eq!((second.library.as_deref(), second.candidates.len()), (None, 2));
    assert_eq!(first.candidates["cublaslt"], Time::Us(8.0));

    trials.leave_out(prefill, &trials.list[1].steps.clone()).expect("one is left out");
    assert_eq!(trials.list.len(), keys.len() - 1);
    assert!(trials.leave_out(prefill, &[]).is_err());
}

#[test]
fn steps_are_found_behind_what_ranks_do_together() {
    let options = CompileOptions { expert_ranks: 2, pack: Pack::Never, ..options(Tactics::default()) };
    let manifest = plan(&options);
    let trials = LibraryTrials::of(&manifest, &options).expect("kernels run all");
    let program = &manifest.ranks[0];
    assert!(trials.list.iter().any(|trial| trial.steps.iter().any(|&step| step > 20)), "{trials:?}");
    for trial in &trials.list {
        let bucket = &program.buckets[trial.bucket.0];
        for &step in &trial.steps {
            let semantic = &program.semantics[bucket.steps[step].op as usize];
            assert_eq!(problem_key(&crate::codegen::kernels::Problem { semantic, phase: bucket.phase }), trial.key);
        }
    }
}
