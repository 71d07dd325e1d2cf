//! The command line as a contract: arguments, files, outputs and exit codes of the built binary.

#[path = "common/command.rs"]
mod command;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use command::{done, lfm2c, project};

/// Standard error of a command that must fail with an exit code.
fn fails(folder: &Path, code: i32, arguments: &[&str]) -> String {
    let output = lfm2c(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
    assert!(!errors.contains("panicked"), "{arguments:?}: {errors}");
    errors
}

fn folder_with_plan() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let demo = project("plans/synthetic.ron");
    done(folder.path(), &["compile", demo.to_str().expect("UTF-8"), "--target", "cpu", "-o", "demo.plan"]);
    folder
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Shape and numbers of an NPY file.
fn npy(path: &Path) -> (Vec<u64>, Vec<f32>) {
    let bytes = std::fs::read(path).expect("the file was written");
    let file = npyz::NpyFile::new(&bytes[..]).expect("it is NPY");
    (file.shape().to_vec(), file.into_vec::<f32>().expect("it holds float32"))
}

#[test]
fn compile_prints_what_the_passes_did() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let recipe = project("plans/lfm2-8b-a1b.ron");
    let recipe = recipe.to_str().expect("UTF-8");
    // As the passes make it; measured choices may take apart what is faster so.
    let compile = ["compile", recipe, "--target", "sm_90a", "--without-cubins", "--decode", "1,64", "-o", "big.plan"];
    let text = done(folder.path(), &[&compile[..], &["--no-lock"]].concat());
    assert!(text.contains("rewrites") && text.contains("fuse-shortconv"), "{text}");
    let manifest = json(&done(folder.path(), &["inspect", "big.plan", "--format", "json"]));
    let buckets = manifest["ranks"][0]["buckets"].as_array().expect("buckets");
    for bucket in buckets.iter().filter(|bucket| bucket["phase"] == "Decode") {
        let steps = bucket["steps"].as_array().expect("steps").len();
        assert!(steps <= 150, "{}: {steps} steps", bucket["name"]);
    }
    for bucket in buckets {
        let number = |name: &str| bucket[name].as_u64().expect("a number");
        let (arena, bound) = (number("arena_bytes"), number("arena_lower_bound"));
        assert!(arena <= bound + (bound / 20).max(64 << 10), "{}: {arena} for {bound}", bucket["name"]);
    }
}

#[test]
fn compiling_twice_gives_the_same_bytes() {
    let folder = folder_with_plan();
    let demo = project("plans/synthetic.ron");
    done(folder.path(), &["compile", demo.to_str().expect("UTF-8"), "--target", "cpu", "-o", "again.plan"]);
    let read = |name: &str| std::fs::read(folder.path().join(name)).expect("the plan was written");
    assert!(read("demo.plan") == read("again.plan"));
}

/// `plans/gelu.manifest.ron` is a plan to read; it is what the compiler writes.
#[test]
fn the_plan_to_read_is_the_compilers() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let graph = project("plans/gelu.ir");
    done(folder.path(), &["compile", graph.to_str().expect("UTF-8"), "--target", "cpu", "-o", "gelu.plan"]);
    let written = done(folder.path(), &["inspect", "gelu.plan", "--manifest"]);
    let kept = std::fs::read_to_string(project("plans/gelu.manifest.ron")).expect("it is there");
    assert_eq!(written, kept, "write it again with `lfm2c inspect gelu.plan --manifest`, and read what changed");
}

#[test]
fn run_gives_json_and_logits() {
    let folder = folder_with_plan();
    let arguments =
        ["run", "demo.plan", "--tokens", "5,17,3", "--tokens", "9", "--max-new-tokens", "4", "--ignore-eos"];
    let object = json(&done(folder.path(), &[&arguments[..], &["--format", "json", "--logits", "l.npy"]].concat()));
    let sequences = object["sequences"].as_array().expect("sequences");
    assert_eq!(sequences.len(), 2);
    assert_eq!(sequences[0]["prompt_tokens"], 3);
    assert_eq!(sequences[1]["prompt_tokens"], 1);
    assert!(object["timing"].is_object());
    let (shape, logits) = npy(&folder.path().join("l.npy"));
    assert_eq!(shape, [2, 4, 512]);
    for (sequence, rows) in sequences.iter().zip(logits.chunks(4 * 512)) {
        assert_eq!(sequence["finish_reason"], "length");
        let tokens = sequence["tokens"].as_array().expect("tokens");
        for (token, row) in tokens.iter().zip(rows.chunks(512)) {
            let best = (0..512).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("a row has entries");
            assert_eq!(token.as_u64(), Some(best as u64), "greedy takes the largest logit");
        }
    }
    let text = done(folder.path(), &arguments);
    let lines: Vec<String> = sequences.iter().map(|s| s["tokens"].to_string().replace(['[', ']'], "")).collect();
    assert_eq!(text.lines().collect::<Vec<_>>(), lines, "text output holds the same tokens");
}

#[test]
fn prompt_logits_cover_every_position() {
    let folder = folder_with_plan();
    let prompt: Vec<String> = (0..40).map(|i| (i * 7 % 512).to_string()).collect();
    let whole = ["run", "demo.plan", "--tokens", &prompt.join(","), "--max-new-tokens", "1", "--prompt-logits"];
    done(folder.path(), &[&whole[..], &["a.npy"]].concat());
    done(folder.path(), &[&whole[..], &["b.npy", "--chunk", "3"]].concat());
    let (a, b) = (npy(&folder.path().join("a.npy")), npy(&folder.path().join("b.npy")));
    assert_eq!(a.0, [40, 512]);
    assert_eq!(a, b, "chunks change nothing");
}

#[test]
fn a_recipe_runs_with_its_own_prompt() {
    let demo = project("plans/synthetic.ron");
    let demo = demo.to_str().expect("UTF-8");
    let folder = folder_with_plan();
    let from_recipe = done(folder.path(), &["run", demo]);
    assert_eq!(from_recipe, done(folder.path(), &["run", "demo.plan"]));
    assert!(!from_recipe.trim().is_empty());
}

#[test]
fn jsonl_in_and_out_with_a_bad_line() {
    let folder = folder_with_plan();
    let input = "{\"tokens\": [1, 2]}\n{\"tokens\": []}\nnonsense\n{\"tokens\": [3]}\n";
    std::fs::write(folder.path().join("in.jsonl"), input).expect("the file is written");
    let arguments = ["run", "demo.plan", "--input", "in.jsonl", "--max-new-tokens", "2", "--format", "json"];
    let output = lfm2c(folder.path(), &arguments);
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<Value> = String::from_utf8_lossy(&output.stdout).lines().map(json).collect();
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[0]["prompt_tokens"], 2);
    assert!(lines[1]["error"].as_str().expect("an error").contains("expected at least 1 token"));
    assert!(lines[2]["error"].as_str().expect("an error").contains("line 3"));
    assert_eq!(lines[3]["prompt_tokens"], 1);
}

#[test]
fn an_end_of_sequence_token_ends_it() {
    let folder = folder_with_plan();
    let arguments = ["run", "demo.plan", "--tokens", "5,17,3", "--max-new-tokens", "400", "--format", "json"];
    let object = json(&done(folder.path(), &[&arguments[..], &["--temperature", "3", "--seed", "4"]].concat()));
    let sequence = &object["sequences"][0];
    let tokens = sequence["tokens"].as_array().expect("tokens");
    assert_eq!(sequence["finish_reason"], "eos", "400 tokens at a high temperature meet token 7");
    assert_eq!(tokens.last(), Some(&Value::from(7)));
    assert!(tokens[..tokens.len() - 1].iter().all(|token| *token != 7));
}

#[test]
fn drawings_are_written() {
    let folder = folder_with_plan();
    let stages: [&[&str]; 4] = [&[], &["--after", "build"], &["--after", "fuse-swiglu"], &["--layers", "2..3"]];
    for stage in stages {
        let dot = done(folder.path(), &[&["dot", "demo.plan"], stage].concat());
        assert!(dot.starts_with("digraph"), "{stage:?}: {}", &dot[..40]);
        done(folder.path(), &[&["dot", "demo.plan", "-o", "graph.svg"], stage].concat());
        let svg = std::fs::read_to_string(folder.path().join("graph.svg")).expect("it was written");
        assert!(svg.contains("<svg"), "{stage:?}");
    }
    done(folder.path(), &["inspect", "demo.plan", "--memory", "memory.svg"]);
    assert!(std::fs::read_to_string(folder.path().join("memory.svg")).expect("it was written").contains("<svg"));
}

#[test]
fn wrong_usage_has_exit_code_2() {
    let folder = folder_with_plan();
    let demo = project("plans/synthetic.ron");
    let demo = demo.to_str().expect("UTF-8");
    for arguments in [
        &["compile", "-o", "x.plan"][..],
        &["compile", demo, "--disable-pass", "no-such-pass", "-o", "x.plan"],
        &["compile", demo, "--prefill", "0", "-o", "x.plan"],
        &["compile", demo, "--decode", "17", "-o", "x.plan"],
        &["compile", demo, "--kv-tokens", "0", "-o", "x.plan"],
        &["run", "demo.plan", "--dtype", "bf16"],
        &["run", "demo.plan", "--disable-pass", "cse"],
        &["run", "demo.plan", "--chunk", "0"],
        &["run", "demo.plan", "--temperature", "nan"],
        &["run", "demo.plan", "--top-p", "1.5"],
        &["bench", "demo.plan", "--compare-fusion"],
        &["bench", "demo.plan", "--steps", "0"],
        &["bench", "demo.plan", "--prompt", "0"],
        &["bench", "demo.plan", "--dtype", "bf16"],
        &["bench", demo, "--compare-fusion", "--block", "moe"],
        &["bench", "demo.plan", "--peak-tflops", "0"],
        &["profile", "demo.plan", "--temperature", "nan"],
        &["dot", "demo.plan", "--layers", "6..9"],
        &["dot", "demo.plan", "--model", "."],
        &["run", "demo.plan", "--tokens", "five"],
        &["run", "demo.plan", "--no-such-option"],
        &["dot", "demo.plan", "--after", "no-such-pass"],
        &["dot", "demo.plan", "--bucket", "decode_3"],
        &["dot", "demo.plan", "-o", "graph.txt"],
        &["run", "demo.plan", "--tokens", "1", "--tokens", "2", "--prompt-logits", "x.npy"],
    ] {
        assert!(!fails(folder.path(), 2, arguments).is_empty());
    }
}

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

#[test]
fn what_cannot_run_says_why() {
    let folder = folder_with_plan();
    let at = folder.path();
    let long: Vec<String> = (0..520).map(|_| "1".to_owned()).collect();
    let cases: [(&[&str], &str); 9] = [
        (&["run", "missing.plan"], "missing.plan"),
        (&["run", "demo.plan", "--tokens", "512"], "vocabulary"),
        (&["run", "demo.plan", "--tokens", &long.join(",")], "max-context"),
        (&["run", "demo.plan", "--device", "cuda"], "--device cpu"),
        (&["bench", "demo.plan", "--decode", "1"], "--target sm_90a"),
        (&["profile", "demo.plan"], "--target sm_90a"),
        (&["profile", "missing.plan"], "missing.plan"),
        (&["run", "demo.plan", "--require-graphs"], "graphs"),
        (&["compile", "--model", "nowhere", "-o", "x.plan"], "nowhere"),
    ];
    for (arguments, expected) in cases {
        let errors = fails(at, 1, arguments);
        assert!(errors.contains(expected), "{arguments:?}: {errors}");
    }
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

/// Requests are timed on the CPU too.
#[test]
fn requests_can_be_timed() {
    let folder = folder_with_plan();
    let at = folder.path();
    let bench = ["bench", "demo.plan", "--requests", "7", "--prompt-tokens", "3-30", "--new-tokens", "2-4"];
    let text = done(at, &bench);
    assert!(
        text.contains("on the CPU: 7 requests, prompts of 3 to 30 tokens") && text.contains("least busy"),
        "{text}"
    );
    let found = json(&done(at, &[&bench[..], &["--format", "json"]].concat()));
    let row = &found["rows"][0];
    assert_eq!((&row["ranks"], &row["same"]), (&1.into(), &7.into()), "{found}");
    let rate = |name: &str| row[name].as_f64().expect("a number") * row["seconds"].as_f64().expect("a number");
    assert!((rate("requests_per_second") - 7.0).abs() < 1e-6, "{found}");
    assert!((rate("new_tokens_per_second") - found["new_tokens"].as_f64().expect("a number")).abs() < 1e-6, "{found}");
    let errors = fails(at, 2, &["bench", "demo.plan", "--requests", "7", "--prompt-tokens", "3-30000"]);
    assert!(errors.contains("the plan's --max-context, found 30000 and 1"), "{errors}");
}

/// A recipe whose weights come from a checkpoint can be measured without it.
#[test]
fn drawn_weights_take_the_place_of_a_checkpoint() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let recipe = project("plans/lfm2-8b-a1b.ron");
    let errors = fails(at, 2, &["run", recipe.to_str().expect("UTF-8"), "--tokens", "1", "--target", "cpu"]);
    assert!(errors.contains("--model DIR") && errors.contains("--synthetic SEED"), "{errors}");

    let demo = project("plans/demo.ron");
    let run = ["run", demo.to_str().expect("UTF-8"), "--tokens", "5,6,7", "--max-new-tokens", "8"];
    let tokens = |seed: &str| done(at, &[&run[..], &["--synthetic", seed]].concat());
    assert_eq!(tokens("1"), tokens("1"));
    assert!(tokens("1") != tokens("2") && tokens("1") != done(at, &run));
    done(at, &["compile", demo.to_str().expect("UTF-8"), "--synthetic", "1", "-o", "drawn.plan"]);
    assert_eq!(done(at, &["run", "drawn.plan", "--tokens", "5,6,7", "--max-new-tokens", "8"]), tokens("1"));
    let errors = fails(at, 2, &["run", "drawn.plan", "--synthetic", "2"]);
    assert!(errors.contains("is compiled already: --target, --dtype, --pack, --libraries, --synthetic"), "{errors}");
}

/// `-o` may name a device: renaming a file onto it would take it from the whole machine.
#[test]
#[cfg(unix)]
fn a_plan_goes_through_links_and_pipes() {
    let folder = folder_with_plan();
    let at = folder.path();
    let demo = project("plans/synthetic.ron");
    let compile = |name| done(at, &["compile", demo.to_str().expect("UTF-8"), "-o", name]);
    std::fs::write(at.join("target.plan"), b"old").expect("it is written");
    std::os::unix::fs::symlink("target.plan", at.join("link.plan")).expect("it is linked");
    compile("link.plan");
    let is_link = std::fs::symlink_metadata(at.join("link.plan")).expect("it is there").is_symlink();
    let plan = std::fs::read(at.join("target.plan")).expect("it is there");
    assert!(is_link && plan.starts_with(b"LFM2PLAN"));
    assert!(std::process::Command::new("mkfifo").arg(at.join("pipe")).status().expect("mkfifo runs").success());
    let pipe = at.join("pipe");
    let reader = std::thread::spawn(move || std::fs::read(pipe).expect("it can be read"));
    compile("pipe");
    assert!(reader.join().expect("the reader ends") == plan);
    let pipe = std::fs::symlink_metadata(at.join("pipe")).expect("it is there").file_type();
    assert!(std::os::unix::fs::FileTypeExt::is_fifo(&pipe));
}

/// Nobody reads, or nothing can be written: an exit code, no panic.
#[test]
fn lost_output_is_no_panic() {
    let folder = folder_with_plan();
    for arguments in [&["inspect", "demo.plan", "--manifest"][..], &["run", "demo.plan"], &["dot", "demo.plan"]] {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lfm2c"))
            .args(arguments)
            .current_dir(folder.path())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("it starts");
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().expect("it ends").code(), Some(0), "{arguments:?}");
    }
}

#[test]
fn a_changed_model_directory_is_refused() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let source = project("tests/goldens/moe-no-dense");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), folder.path().join(name)).expect("it can be copied");
    }
    done(folder.path(), &["compile", "--model", ".", "--prefill", "16", "--decode", "1", "-o", "x.plan"]);
    done(folder.path(), &["run", "x.plan", "--tokens", "1"]);
    let config = std::fs::read_to_string(source.join("config.json")).expect("it is there");
    let other = config.replace("1000000.0", "10000.0");
    assert_ne!(config, other);
    std::fs::write(folder.path().join("config.json"), other).expect("it is written");
    assert!(fails(folder.path(), 1, &["run", "x.plan", "--tokens", "1"]).contains("another model"));
}

#[test]
fn damaged_and_foreign_plans_are_refused() {
    let folder = folder_with_plan();
    let at = folder.path();
    let plan = std::fs::read(at.join("demo.plan")).expect("the plan was written");
    let write = |name: &str, bytes: &[u8]| std::fs::write(at.join(name), bytes).expect("it is written");
    write("short.plan", &plan[..plan.len() / 2]);
    let mut flipped = plan.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    write("flipped.plan", &flipped);
    let mut version = plan.clone();
    version[8] = version[8].wrapping_add(1);
    write("version.plan", &version);
    write("other.plan", b"not a plan at all");
    write("empty.plan", b"");
    let mut seen = vec![];
    for name in ["short.plan", "flipped.plan", "version.plan", "other.plan", "empty.plan"] {
        let errors = fails(at, 1, &["run", name]);
        assert!(errors.contains("expected") && errors.contains("found"), "{name}: {errors}");
        seen.push(errors.replace(name, ""));
    }
    assert!(seen[0] != seen[1] && seen[1] != seen[2] && seen[2] != seen[3], "{seen:?}");
    let other = project("tests/goldens/moe-base");
    let errors = fails(at, 1, &["run", "demo.plan", "--model", other.to_str().expect("UTF-8")]);
    assert!(errors.contains("another model"), "{errors}");
}

#[test]
fn verify_holds_and_fails() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let model = project("tests/goldens/moe-no-dense");
    let (model, golden) = (model.to_str().expect("UTF-8"), model.join("golden.safetensors"));
    let golden = golden.to_str().expect("UTF-8");
    let compile = ["compile", "--model", model, "--max-context", "256", "--prefill", "64", "--decode", "1"];
    done(folder.path(), &[&compile[..], &["--dtype", "f32", "-o", "f32.plan"]].concat());
    let verify = |plan| ["verify", plan, "--model", model, "--golden", golden];
    assert!(done(folder.path(), &verify("f32.plan")).contains("9 of 9 prompts hold"));
    done(folder.path(), &[&compile[..], &["--dtype", "bf16", "-o", "bf16.plan"]].concat());
    let errors = fails(folder.path(), 1, &[&verify("bf16.plan")[..], &["--tolerance", "1e-5"]].concat());
    assert!(errors.contains("tolerance"), "{errors}");
}

#[test]
fn checkpoint_faults_are_told_all_at_once() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let source = project("tests/goldens/moe-no-dense");
    let copy = folder.path().join("model");
    std::fs::create_dir(&copy).expect("it can be made");
    for entry in std::fs::read_dir(&source).expect("it can be listed") {
        let entry = entry.expect("it can be listed");
        std::fs::copy(entry.path(), copy.join(entry.file_name())).expect("it can be copied");
    }
    let path = copy.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("the checkpoint is there");
    // Same length, other names: two tensors are then missing and two unexpected.
    let text = replace(&bytes, b"model.embedding_norm.weight", b"model.embedding_norX.weight");
    let text = replace(&text, b"layers.0.operator_norm.weight", b"layers.0.operator_norX.weight");
    std::fs::write(&path, text).expect("it is written");
    let errors = fails(folder.path(), 1, &["run", "model.plan", "--model", "model"]);
    assert!(errors.contains("model.plan"), "{errors}");
    done(
        folder.path(),
        &[
            "compile",
            "--model",
            source.to_str().expect("UTF-8"),
            "--prefill",
            "16",
            "--decode",
            "1",
            "-o",
            "model.plan",
        ],
    );
    let errors = fails(folder.path(), 1, &["run", "model.plan", "--model", "model", "--tokens", "1"]);
    let early = fails(folder.path(), 1, &["compile", "--model", "model", "-o", "early.plan"]);
    assert!(early.contains("2 missing, 2 unexpected"), "{early}");
    for name in ["model.embedding_norm.weight", "operator_norm.weight", "embedding_norX", "operator_norX"] {
        assert!(errors.contains(name), "{name} is not in: {errors}");
    }
}

/// Replaces a byte string by one of the same length.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).expect("the name is in the file");
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

#[test]
fn weights_that_do_not_pack_are_read_as_they_are() {
    const NAME: &str = "model.layers.0.conv.out_proj.weight";
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = |name: &str| folder.path().join(name);
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(project("models/demo").join(name), at(name)).expect("it can be copied");
    }
    let compile = |plan: &str| {
        let arguments =
            ["compile", "--model", ".", "--target", "sm_90a", "--without-cubins", "--pack", "--dtype", "bf16"];
        let sizes = ["--decode", "1", "--prefill", "16", "--max-context", "256", "-o", plan];
        let output = lfm2c(folder.path(), &[&arguments[..], &sizes].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
        let file =
            lfm2c::plan::PlanFile::from_bytes(&std::fs::read(at(plan)).expect("it was written")).expect("a plan");
        let program = &file.manifest.ranks[0];
        let names: Vec<String> =
            program.packed.iter().map(|form| program.weights[form.weight as usize].name.clone()).collect();
        (errors, names)
    };
    let (errors, all) = compile("all.plan");
    assert!(!errors.contains("do not pack") && all.len() > 3, "{errors}{all:?}");

    // A row of numbers from 128 different binades.
    let mut bytes = std::fs::read(at("model.safetensors")).expect("it is there");
    let data = 8 + u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
    let header = json(std::str::from_utf8(&bytes[8..data]).expect("JSON"));
    let begin = data + header[NAME]["data_offsets"][0].as_u64().expect("an offset") as usize;
    for (i, number) in bytes[begin..][..256].as_chunks_mut::<2>().0.iter_mut().enumerate() {
        *number = ((i as u16 + 40) << 7).to_le_bytes();
    }
    std::fs::write(at("model.safetensors"), bytes).expect("it can be written");
    let (errors, some) = compile("some.plan");
    assert!(errors.contains("1 of 128 rows do not pack, so it is read as it is"), "{errors}");
    let left: Vec<&String> = all.iter().filter(|name| !some.contains(name)).collect();
    assert!(left.len() == 1 && errors.contains(left[0].as_str()) && some.len() + 1 == all.len(), "{left:?} {errors}");
    let run = ["--model", ".", "--device", "cpu", "--tokens", "5,6", "--max-new-tokens", "2"];
    let of = |plan| done(folder.path(), &[&["run", plan][..], &run].concat());
    assert_eq!(of("some.plan"), of("all.plan"));
}
