//! Choices among kernels: which commands take them, and lock files that make them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::command::{done, lfm2c, project};
use crate::{fails, folder_with_plan, json};

/// What chooses among kernels has no effect on a plan that has none, so it is refused.
#[test]
fn choices_of_kernels_are_none_for_the_cpu() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let demo = project("plans/synthetic.ron");
    let demo = demo.to_str().expect("UTF-8");
    for (option, named) in [
        (&["--pack"][..], "--pack"),
        (&["--libraries", "cublaslt"], "--libraries"),
        (&["--f32", "split"], "--f32 split"),
    ] {
        for command in [&["compile", demo, "-o", "x.plan"][..], &["run", demo, "--tokens", "1"]] {
            let errors = fails(folder.path(), 2, &[command, &["--target", "cpu"], option].concat());
            assert!(errors.contains(&format!("{named}: expected a plan for a GPU")), "{errors}");
            assert!(errors.contains("leave it out"), "{errors}");
        }
    }
    assert!(!folder.path().join("x.plan").exists());
}

/// A recipe is measured on a GPU: where there is none, that is told before anything is compiled.
#[test]
fn measuring_needs_a_gpu() {
    if lfm2c::cuda::Device::count() > 0 {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (demo, gelu) = (project("plans/synthetic.ron"), project("plans/gelu.ir"));
    let (demo, gelu) = (demo.to_str().expect("UTF-8"), gelu.to_str().expect("UTF-8"));
    for arguments in [
        &["bench", demo, "--decode", "1"][..],
        &["bench", demo, "--block", "conv,moe", "--format", "json"],
        &["bench", gelu, "--compare-fusion"],
        &["profile", demo, "--trace", "trace.json"],
    ] {
        let errors = fails(folder.path(), 1, arguments);
        assert!(errors.contains("GPU"), "{arguments:?}: {errors}");
    }
    assert!(!folder.path().join("trace.json").exists());
}

#[test]
fn tuning_needs_a_gpu() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    std::fs::copy(project("plans/synthetic.ron"), at.join("demo.ron")).expect("it can be copied");
    let tune = ["compile", "demo.ron", "--tune", "-o", "x.plan"];
    for wrong in [&["--target", "cpu"][..], &["--without-cubins"], &["--forced-routing"]] {
        fails(at, 2, &[&tune[..], wrong].concat());
    }
    // Told before anything else.
    std::fs::write(at.join("demo.lock.ron"), "(version: 2, gpu: 5)").expect("it is written");
    let errors = fails(at, 1, &tune);
    assert!(errors.contains("demo.lock.ron") && errors.contains("line 1, column"), "{errors}");
    std::fs::remove_file(at.join("demo.lock.ron")).expect("it was written");
    if lfm2c::cuda::Device::count() > 0 {
        return;
    }
    for target in [&[][..], &["--target", "sm_90a"]] {
        let errors = fails(at, 1, &[&tune[..], target].concat());
        assert!(errors.contains("--tune measures kernels on a GPU of this machine"), "{errors}");
    }
    assert!(!at.join("demo.lock.ron").exists() && !at.join("x.plan").exists());
}

/// Names of the kernels in a plan, with what they are specialised to.
fn kernels(folder: &Path, plan: &str) -> Vec<String> {
    let manifest = json(&done(folder, &["inspect", plan, "--format", "json"]));
    let text = |kernel: &Value, field: &str| kernel[field].as_str().expect("a text").to_owned();
    let kernels = manifest["kernels"].as_array().expect("kernels");
    kernels
        .iter()
        .map(|kernel| format!("{} {}", text(kernel, "name"), text(kernel, "config")).trim_end().to_owned())
        .collect()
}

#[test]
fn a_lock_file_beside_a_recipe_chooses_kernels() {
    use lfm2c::codegen::lock::{LOCK_VERSION, Measured};
    use lfm2c::codegen::select::Pack;
    use lfm2c::codegen::{Lock, Tuning};

    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    std::fs::copy(project("plans/synthetic.ron"), at.join("demo.ron")).expect("it can be copied");
    let options = "--target sm_90a --without-cubins --dtype bf16 --prefill 64 --decode 1 --max-sequences 4";
    let options: Vec<&str> = options.split(' ').collect();
    let compile = |plan, more: &[&str]| done(at, &[&["compile", "demo.ron", "-o", plan], &options[..], more].concat());
    let read = |name: &str| std::fs::read(at.join(name)).expect("the plan was written");
    assert!(!compile("default.plan", &[]).contains("demo.lock.ron"));
    let file = lfm2c::plan::PlanFile::read(&at.join("default.plan")).expect("it is a plan");
    let tuning = Tuning::of(&file.manifest, Pack::default());
    let before = kernels(at, "default.plan");
    let last = |(key, names): (&str, Vec<&str>)| Some((key.to_owned(), (*names.last()?).to_owned()));
    let mut last = tuning.problems().filter_map(last);
    let (key, chosen) = last.find(|(_, chosen)| !before.contains(chosen)).expect("there is a choice");
    let measured = |chosen: &str| {
        let (chosen, candidates) = (chosen.into(), Default::default());
        Measured { chosen, packed: None, library: None, candidates }
    };
    let problems = [(key, measured(&chosen)), ("dream 0123".into(), measured("wish"))];
    let lock = Lock {
        version: LOCK_VERSION,
        compiler: "0.0.1".into(),
        gpu: "NVIDIA H200".into(),
        toolkit: (13, 0),
        graphs: BTreeMap::new(),
        problems: problems.into(),
    };
    lock.write(&at.join("demo.lock.ron")).expect("it can be written");
    let all = tuning.problems().count();
    let expected = format!("demo.lock.ron: chooses the kernels of 1 of {all} problems; {} that it", all - 1);
    let text = compile("tuned.plan", &[]);
    assert!(text.contains(&expected), "{expected} in {text}");
    assert!(kernels(at, "tuned.plan").contains(&chosen), "{chosen}");
    compile("again.plan", &[]);
    compile("ignored.plan", &["--no-lock"]);
    assert!(read("tuned.plan") == read("again.plan") && read("ignored.plan") == read("default.plan"));
    assert!(read("tuned.plan") != read("default.plan"));
    // A run of the recipe compiles with it too, and says so; one for the CPU has no choice.
    let run = |more: &[&str]| {
        let arguments = [&["run", "demo.ron", "--device", "cpu", "--max-new-tokens", "1"], more].concat();
        let output = lfm2c(at, &arguments);
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let errors = run(&options);
    assert!(errors.contains(&expected) && errors.contains("measured by lfm2c 0.0.1"), "{errors}");
    assert!(!run(&["--target", "cpu"]).contains("demo.lock.ron"));
    std::fs::write(at.join("demo.lock.ron"), "(\n  version: 2,\n  speed: 11,\n)").expect("it is written");
    let errors = fails(at, 1, &[&["run", "demo.ron"], &options[..]].concat());
    assert!(errors.contains("demo.lock.ron") && errors.contains("line 3, column"), "{errors}");
    compile("ignored.plan", &["--no-lock"]);
}

#[test]
fn every_pass_of_the_design_can_be_left_out() {
    let folder = folder_with_plan();
    let demo = project("plans/synthetic.ron");
    let expected = done(folder.path(), &["run", "demo.plan"]);
    for pass in lfm2c::passes::names() {
        let run = ["run", demo.to_str().expect("UTF-8"), "--max-sequences", "3", "--disable-pass", pass];
        assert_eq!(done(folder.path(), &run), expected, "without {pass}");
    }
}
