//! Plans of several ranks in one process, through the built binary: what each command makes of them. `tests/ranks` runs them under `mpirun`.

#[path = "common/command.rs"]
mod command;

use std::path::Path;

use command::{done, lfm2c};

fn fails(folder: &Path, code: i32, arguments: &[&str], said: &str) {
    let output = lfm2c(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
    assert!(errors.contains(said), "expected `{said}`: {errors}");
}

fn project(path: &str) -> String {
    command::project(path).to_str().expect("UTF-8").to_owned()
}

/// A plan in f32 of a small model.
fn compile(folder: &Path, model: &str, name: &str, more: &[&str]) -> String {
    let compile = ["compile", "--model", model, "--target", "cpu", "--dtype", "f32", "--max-context", "256"];
    done(folder, &[&compile[..], &["--prefill", "16,64", "--decode", "1,4", "-o", name], more].concat())
}

/// What a plan of the checkpoint at `model` prints for these prompts.
fn run(at: &Path, model: &str, plan: &str, prompts: &[&str]) -> String {
    done(at, &[&["run", plan, "--model", model], prompts].concat())
}

/// Expects of a plan of several ranks what `one.plan` beside it, of one rank, prints and counts, and the logits of transformers.
fn acts_as_one_rank(at: &Path, model: &str, plan: &str, prompts: &[&str]) {
    assert_eq!(run(at, model, plan, prompts), run(at, model, "one.plan", prompts));
    let golden = project("tests/goldens/moe-base/golden.safetensors");
    assert!(done(at, &["verify", plan, "--model", model, "--golden", &golden]).contains("16 of 16 prompts hold"));
    // Each rank counts what its own layers choose.
    let count = |plan| {
        run(at, model, plan, &[prompts, &["--count-experts", "counts.json"]].concat());
        std::fs::read_to_string(at.join("counts.json")).expect("it was written")
    };
    assert_eq!(count(plan), count("one.plan"));
}

#[test]
fn commands_take_plans_of_several_ranks() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let model = project("tests/goldens/moe-base");
    let compile = |name: &str, more: &[&str]| compile(at, &model, name, more);
    compile("one.plan", &[]);
    let report = compile("two.plan", &["--ranks", "expert=2"]);
    assert!(report.contains("expert-parallel") && report.contains("sent by each rank"), "{report}");
    let shown = done(at, &["inspect", "two.plan", "--bucket", "decode_4"]);
    for words in ["2 rank(s)", "their weights", "ffn.all_gather", " to other ranks"] {
        assert!(shown.contains(words), "expected `{words}`: {shown}");
    }
    assert!(done(at, &["dot", "two.plan", "--bucket", "decode_4"]).contains("all_to_all"));
    let run = |plan| done(at, &["run", plan, "--model", &model, "--tokens", "5,17,3", "--tokens", "9", "--ignore-eos"]);
    assert_eq!(run("two.plan"), run("one.plan"));
    let golden = project("tests/goldens/moe-base/golden.safetensors");
    let verify = ["--model", &model, "--golden", &golden];
    assert!(done(at, &[&["verify", "two.plan"], &verify[..]].concat()).contains("16 of 16 prompts hold"));
    compile("forced.plan", &["--ranks", "expert=3", "--forced-routing"]);
    assert!(done(at, &[&["verify", "forced.plan"], &verify[..]].concat()).contains("16 of 16 prompts hold"));
    fails(
        at,
        1,
        &["run", "two.plan", "--model", &model, "--tokens", "5", "--device", "cuda"],
        "the plan is for the CPU",
    );
    fails(at, 1, &["diff", "two.plan", "--model", &model], "expected a program for one rank, found programs for 2");
    fails(at, 1, &["bench", "two.plan", "--model", &model], "expected a program for one rank, found programs for 2");
}

#[test]
fn commands_take_plans_of_several_stages() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let model = project("tests/goldens/moe-base");
    let compile = |name: &str, more: &[&str]| compile(at, &model, name, more);
    compile("one.plan", &[]);
    let report = compile("two.plan", &["--ranks", "pipeline=2"]);
    assert!(report.contains("pipeline-parallel") && report.contains("sent by the rank"), "{report}");
    let shown = done(at, &["inspect", "two.plan", "--bucket", "decode_4"]);
    for words in ["2 rank(s)", "layers", "0 to ", "rank0.send", "rank1.receive", " to other ranks"] {
        assert!(shown.contains(words), "expected `{words}`: {shown}");
    }
    assert!(done(at, &["dot", "two.plan", "--bucket", "decode_4"]).contains("send"));
    let prompts = ["--tokens", "5,17,3", "--tokens", "9", "--max-new-tokens", "6", "--ignore-eos"];
    acts_as_one_rank(at, &model, "two.plan", &prompts);
    fails(at, 1, &["diff", "two.plan", "--model", &model], "expected a program for one rank, found programs for 2");
    fails(at, 1, &["bench", "two.plan", "--model", &model], "expected a program for one rank, found programs for 2");
}

#[test]
fn commands_take_plans_of_stages_of_several_ranks() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let model = project("tests/goldens/moe-base");
    let compile = |name: &str, more: &[&str]| compile(at, &model, name, more);
    compile("one.plan", &[]);
    let report = compile("four.plan", &["--ranks", "expert=2,pipeline=2"]);
    for words in ["expert-parallel", "pipeline-parallel", "sent by the rank", "within the stage"] {
        assert!(report.contains(words), "expected `{words}`: {report}");
    }
    let shown = done(at, &["inspect", "four.plan", "--bucket", "decode_4"]);
    for words in ["4 rank(s)", "layers", "0 to ", "experts", "4 5 6 7", "rank0.send", "rank2.receive", "ffn.all_gather"]
    {
        assert!(shown.contains(words), "expected `{words}`: {shown}");
    }
    let drawn = done(at, &["dot", "four.plan", "--bucket", "decode_4"]);
    assert!(drawn.contains("all_to_all") && drawn.contains("send"));
    let prompts = ["--tokens", "5,17,3,80,41,7", "--tokens", "9,2", "--max-new-tokens", "6", "--ignore-eos"];
    acts_as_one_rank(at, &model, "four.plan", &prompts);
    let hot = ["--ranks", "pipeline=2,expert=2", "--expert-counts", "counts.json", "--expert-replicas", "1"];
    let report = compile("hot.plan", &hot);
    for words in ["rows of the busiest rank, layer by layer, as counted: ", " with replicas", "of several ranks"] {
        assert!(report.contains(words), "expected `{words}`: {report}");
    }
    let run = |plan| run(at, &model, plan, &prompts);
    assert_eq!(run("hot.plan"), run("one.plan"));
    fails(at, 1, &["bench", "four.plan", "--model", &model], "expected a program for one rank, found programs for 4");
}

/// A plan for GPUs means the same on the CPU.
#[test]
fn plans_for_gpus_run_on_the_cpu() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let recipe = project("plans/synthetic.ron");
    let sizes = ["--dtype", "f32", "--prefill", "16,64", "--decode", "1,4"];
    let compile = |name: &str, more: &[&str]| done(at, &[&["compile", &recipe, "-o", name], &sizes[..], more].concat());
    compile("one.plan", &["--target", "cpu"]);
    let run = |plan| {
        done(at, &["run", plan, "--device", "cpu", "--tokens", "5,17,3", "--tokens", "9", "--max-new-tokens", "6"])
    };
    let expected = run("one.plan");
    for ranks in ["expert=2", "expert=3"] {
        compile("gpu.plan", &["--target", "sm_90a", "--without-cubins", "--ranks", ranks]);
        assert_eq!(run("gpu.plan"), expected, "{ranks}");
        let shown = done(at, &["inspect", "gpu.plan", "--bucket", "decode_4"]);
        assert!(
            shown.contains("exchange") && shown.contains("local_experts") && shown.contains("block_sum"),
            "{shown}"
        );
    }
    for ranks in ["pipeline=2", "pipeline=4", "expert=2,pipeline=2"] {
        compile("gpu.plan", &["--target", "sm_90a", "--without-cubins", "--ranks", ranks]);
        assert_eq!(run("gpu.plan"), expected, "{ranks}");
        let shown = done(at, &["inspect", "gpu.plan", "--bucket", "decode_4"]);
        assert!(shown.contains("exchange") && shown.contains("rank0.receive"), "{shown}");
    }
    compile("gpu.plan", &["--target", "sm_90a", "--without-cubins", "--ranks", "expert=3"]);
    fails(at, 1, &["run", "gpu.plan", "--device", "cuda"], "the plan has no machine code");
    for of_one in [&["profile", "gpu.plan"][..], &["bench", "gpu.plan", "--block", "moe"]] {
        fails(at, 1, of_one, "the plan has no machine code");
    }
    fails(at, 1, &["bench", "gpu.plan"], "expected a program for one rank, found programs for 3");
    compile("gpu.plan", &["--target", "sm_90a", "--without-cubins", "--ranks", "pipeline=2"]);
    fails(at, 1, &["profile", "gpu.plan"], "expected all layers on each rank, found them in 2 stages");
    fails(
        at,
        2,
        &["compile", &recipe, "--target", "sm_90a", "--tune", "--ranks", "expert=2,pipeline=2", "-o", "x.plan"],
        "--tune: expected all layers on each rank, found --ranks pipeline=2",
    );
}

#[test]
fn experts_are_placed_by_counts() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let model = project("tests/goldens/moe-base");
    let compile = |name: &str, more: &[&str]| compile(at, &model, name, more);
    compile("one.plan", &[]);
    compile("two.plan", &["--ranks", "expert=2"]);
    let prompts = ["--tokens", "5,17,3,80,41,7", "--tokens", "9,2", "--max-new-tokens", "6", "--ignore-eos"];
    let run = |plan| done(at, &[&["run", plan, "--model", &model], &prompts[..]].concat());
    let count = |plan: &str, more: &[&str]| {
        let counting = ["run", plan, "--model", &model, "--count-experts", "counts.json"];
        done(at, &[&counting[..], more].concat());
        std::fs::read_to_string(at.join("counts.json")).expect("it was written")
    };
    // A plan of two ranks counts what one of one rank does; so does a batch of the same prompts.
    let text = count("one.plan", &prompts);
    assert_eq!(count("two.plan", &prompts), text);
    let line = |tokens: &str| format!("{{\"tokens\": [{tokens}], \"max_new_tokens\": 6, \"ignore_eos\": true}}\n");
    std::fs::write(at.join("in.jsonl"), line("5,17,3,80,41,7") + &line("9,2")).expect("it is written");
    assert_eq!(count("one.plan", &["--input", "in.jsonl"]), text);
    let counts: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for (layer, counts) in counts["layers"].as_object().expect("layers") {
        let rows: u64 = counts.as_array().expect("counts").iter().map(|count| count.as_u64().expect("a count")).sum();
        // Every row but those of the last tokens, which nothing follows, chose two experts.
        assert_eq!(rows, 2 * (6 + 2 + 2 * 5), "{layer}");
    }
    let report = compile("placed.plan", &["--ranks", "expert=2", "--expert-counts", "counts.json"]);
    fn balance(report: &str) -> &str {
        report.lines().find(|line| line.starts_with("rows of the busiest rank")).expect("it is told")
    }
    let numbers: Vec<f64> = balance(&report).split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert!(numbers[1] < numbers[0] && numbers[1] >= 1.0, "{report}");
    let experts = |plan| done(at, &["inspect", plan]).lines().filter(|line| line.starts_with("1 ")).collect::<String>();
    assert_ne!(experts("placed.plan"), experts("two.plan"));
    assert_eq!(run("placed.plan"), run("one.plan"));
    let replicas = ["--ranks", "expert=2", "--expert-counts", "counts.json", "--expert-replicas", "1"];
    let report = compile("hot.plan", &replicas);
    assert!(balance(&report).ends_with(" as placed, 1.000 with replicas"), "{report}");
    assert!(report.contains("of several ranks"), "{report}");
    assert!(experts("hot.plan").split_whitespace().count() > experts("placed.plan").split_whitespace().count());
    assert_eq!(run("hot.plan"), run("one.plan"));
    fails(at, 2, &["inspect", "hot.plan", "--expert-replicas", "1"], "unexpected argument");

    let placed = |file: &str, code: i32, said: &str| {
        let compile = ["compile", "--model", &model, "--target", "cpu", "--ranks", "expert=2", "-o", "x.plan"];
        fails(at, code, &[&compile[..], &["--expert-counts", file]].concat(), said);
    };
    placed("none.json", 1, "--expert-counts none.json");
    placed("in.jsonl", 1, "expected what `lfm2c run --count-experts` writes");
    std::fs::write(at.join("short.json"), text.replacen("[", "[1,", 1)).expect("it is written");
    placed("short.json", 1, "expected counts of 8 experts, found 9");
    let first = text.find("\"layers.").expect("a layer");
    let next = first + text[first..].find("],").expect("two layers") + 2;
    std::fs::write(at.join("less.json"), text[..first].to_owned() + &text[next..]).expect("it is written");
    placed("less.json", 1, "layers.2.ffn: expected counts, found none; count again");
    let many = |replicas: &str, ranks: &str, said: &str| {
        let compile =
            ["compile", "--model", &model, "--target", "cpu", "--expert-counts", "counts.json", "-o", "x.plan"];
        fails(at, 2, &[&compile[..], &["--ranks", ranks, "--expert-replicas", replicas]].concat(), said);
    };
    many("5", "expert=2", "--expert-replicas 5: expected at most 4, with which a rank has all 8 experts, found 5;");
    many("1", "expert=1", "--expert-replicas 1: expected --ranks expert=M of 2 or more, and --expert-counts FILE");
    let compile = ["compile", "--model", &model, "--target", "cpu", "--ranks", "expert=2", "-o", "x.plan"];
    fails(at, 2, &[&compile[..], &["--expert-replicas", "1"]].concat(), "--expert-counts");

    let other = project("plans/synthetic.ron");
    let compile = ["compile", &other, "--target", "cpu", "-o", "x.plan", "--expert-counts", "counts.json"];
    fails(at, 2, &compile, "--ranks");
    let staged = [&compile[..], &["--ranks", "pipeline=2"]].concat();
    fails(at, 2, &staged, "--expert-counts: expected --ranks expert=M of 2 or more, found 1 rank");
    fails(at, 1, &[&compile[..], &["--ranks", "expert=2"]].concat(), "expected counts of this model");
}

#[test]
fn wrong_ranks_are_usage_errors() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let recipe = project("plans/synthetic.ron");
    for (ranks, said) in [
        ("2", "expected expert=N or pipeline=N with a whole number N"),
        ("expert=2,expert=3", "expected `expert` once, found it twice in `expert=2,expert=3`"),
        ("pipeline=two", "expected expert=N or pipeline=N with a whole number N"),
        ("pipeline=0", "--ranks pipeline=0: expected 1 to 6 stages, as many as the model has layers, found 0"),
        ("pipeline=7", "--ranks pipeline=7: expected 1 to 6 stages"),
        ("expert=2,pipeline=7", "--ranks pipeline=7: expected 1 to 6 stages"),
        ("expert=9,pipeline=2", "--ranks expert=9: expected 1 to 8 ranks"),
        ("expert=0", "--ranks expert=0: expected 1 to 8 ranks, as many as the model has experts, found 0"),
        ("expert=9", "--ranks expert=9: expected 1 to 8 ranks"),
    ] {
        fails(at, 2, &["compile", &recipe, "--target", "cpu", "--ranks", ranks, "-o", "x.plan"], said);
    }
    done(at, &["compile", &recipe, "--target", "cpu", "-o", "plain.plan"]);
    for ranks in ["expert=1", "pipeline=1", "expert=1,pipeline=1"] {
        done(at, &["compile", &recipe, "--target", "cpu", "--ranks", ranks, "-o", "one.plan"]);
        let [one, plain] = ["one.plan", "plain.plan"].map(|name| std::fs::read(at.join(name)).expect("it was written"));
        assert!(one == plain, "{ranks}: one rank is no ranks");
    }
}
