//! The command line as a contract: arguments, files, outputs and exit codes of the built binary.

#[path = "../common/command.rs"]
mod command;
mod faults;
mod kernel_choices;

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
    assert!(errors.contains("whichever is less, found 30000 and 1"), "{errors}");
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
