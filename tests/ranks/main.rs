//! `lfm2c run` and `bench --requests` on the ranks of `mpirun`, through the built binary: the results of one rank, and what happens when a rank is no more.
//!
//!     cargo test --features mpi --test ranks

mod failures;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

const LFM2C: &str = env!("CARGO_BIN_EXE_lfm2c");

fn project(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).to_str().expect("UTF-8").to_owned()
}

/// One thread a rank: there are more ranks than cores.
fn command(folder: &Path, program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).args(arguments).env("RAYON_NUM_THREADS", "1");
    command
}

fn lfm2c(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, LFM2C, arguments).output().expect("the binary starts")
}

fn mpirun(folder: &Path, arguments: &[&str]) -> Command {
    let start = ["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"];
    command(folder, "mpirun", &[&start, arguments].concat())
}

/// On so many ranks.
fn on_ranks(folder: &Path, ranks: &str, arguments: &[&str]) -> Output {
    mpirun(folder, &[&["-n", ranks, LFM2C], arguments].concat()).output().expect("mpirun starts")
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeeded(output: &Output) -> &[u8] {
    assert!(output.status.success(), "{}", errors(output));
    &output.stdout
}

fn compile(folder: &Path, recipe: &str, name: &str, more: &[&str]) {
    let recipe = project(recipe);
    succeeded(&lfm2c(folder, &[&["compile", &recipe, "--target", "cpu", "-o", name], more].concat()));
}

/// Lines of all kinds: token ids and texts, long and short, with stop texts, by chance, and some that cannot run.
fn lines() -> String {
    let line = |i: usize| match i % 12 {
        0 => r#"{"prompt": "What is gold?", "stop": " metallic"}"#.to_owned(),
        1 => r#"{"prompt": "What is a dog?", "temperature": 0.7, "top_k": 20}"#.to_owned(),
        2 => r#"{"messages": [{"role": "user", "content": "Hello!"}], "stop": ["a", " word"]}"#.to_owned(),
        3 if i < 12 => "nonsense".to_owned(),
        4 if i < 24 => r#"{"tokens": [1, 99999999], "id": "beyond"}"#.to_owned(),
        5 => String::new(),
        _ => {
            let prompt: Vec<usize> = (0..1 + i * 7 % 60).map(|at| 5 + (at * 31 + i) % 400).collect();
            let new = [0, 1, 3, 12, 40][i % 5];
            format!(
                r#"{{"tokens": {prompt:?}, "max_new_tokens": {new}, "ignore_eos": true, "temperature": {}}}"#,
                i % 2
            )
        }
    };
    (0..90).map(|i| line(i) + "\n").collect()
}

#[test]
fn results_are_those_of_one_rank() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    compile(at, "plans/demo.ron", "demo.plan", &["--dtype", "f32", "--max-sequences", "4"]);
    fs::write(at.join("in.jsonl"), lines()).expect("it is written");
    let model = project("models/demo");
    let run = ["run", "demo.plan", "--model", &model, "--chat", "--input", "in.jsonl", "--output"];
    let told = |output: &Output| {
        assert_eq!(output.status.code(), Some(1), "some lines cannot run: {}", errors(output));
        let lines = errors(output).lines().filter(|line| line.starts_with("lfm2c: ")).map(str::to_owned).collect();
        let mut lines: Vec<String> = lines;
        lines.sort();
        lines
    };
    let alone = told(&lfm2c(at, &[&run[..], &["1.jsonl"]].concat()));
    let whole = fs::read(at.join("1.jsonl")).expect("it was written");
    assert!(String::from_utf8_lossy(&whole).contains(r#""finish_reason":"stop""#), "a stop text stops something");
    for ranks in ["2", "4"] {
        let name = format!("{ranks}.jsonl");
        let output = on_ranks(at, ranks, &[&run[..], &[&name]].concat());
        assert_eq!(told(&output), alone, "{ranks} ranks say the same");
        assert!(fs::read(at.join(&name)).expect("it was written") == whole, "{ranks} ranks: another result");
        let table = errors(&output);
        assert!(table.contains(&format!("{ranks} ranks: ")) && table.contains("sequences"), "{table}");
        // Interrupted somewhere, by any number of ranks; the second time nothing is left to do.
        fs::write(at.join(&name), &whole[..whole.len() * 2 / 3]).expect("it is written");
        for _ in 0..2 {
            told(&on_ranks(at, ranks, &[&run[..], &[&name, "--resume"]].concat()));
            assert!(fs::read(at.join(&name)).expect("it was written") == whole, "{ranks} ranks: another result");
        }
        // What could not run cannot run now.
        told(&on_ranks(at, ranks, &[&run[..], &[&name, "--resume", "--retry-errors"]].concat()));
        assert!(fs::read(at.join(&name)).expect("it was written") == whole, "{ranks} ranks: another result");
    }
}

#[test]
fn prompts_of_the_command_line_and_their_logits() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    compile(at, "plans/synthetic.ron", "demo.plan", &[]);
    let tokens = ["--tokens", "5,17,3", "--tokens", "9", "--tokens", "8,8", "--tokens", "1,2,3,4", "--tokens", "600"];
    let run = |name| [&["run", "demo.plan", "--max-new-tokens", "9", "--logits", name], &tokens[..]].concat();
    let one = lfm2c(at, &run("1.npy"));
    let three = on_ranks(at, "3", &run("3.npy"));
    assert!(one.stdout == three.stdout && !one.stdout.is_empty(), "{}", errors(&three));
    assert!(errors(&three).contains("lfm2c: 1 of 5 sequences could not run"), "{}", errors(&three));
    assert!(fs::read(at.join("1.npy")).expect("written") == fs::read(at.join("3.npy")).expect("written"));
}

/// Compiles `one.plan`, and a plan for each of these `--ranks`, and runs it on as many ranks: the results must be those of one rank.
fn results_are_those_of_one(at: &Path, plans: &[(&str, &[&str], &[&str])]) {
    compile(at, "plans/synthetic.ron", "one.plan", &["--max-sequences", "4"]);
    let line = |i: usize| {
        let prompt: Vec<usize> = (0..1 + i * 7 % 60).map(|at| 5 + (at * 31 + i) % 400).collect();
        let new = [0, 1, 3, 12, 25][i % 5];
        format!(r#"{{"tokens": {prompt:?}, "max_new_tokens": {new}, "ignore_eos": true}}"#) + "\n"
    };
    fs::write(at.join("in.jsonl"), (0..40).map(line).collect::<String>()).expect("it is written");
    fn run<'a>(plan: &'a str, name: &'a str) -> [&'a str; 8] {
        ["run", plan, "--chunk", "23", "--input", "in.jsonl", "--output", name]
    }
    succeeded(&lfm2c(at, &run("one.plan", "1.jsonl")));
    // A request's name is a hash of the plan too.
    let results = |name: &str| -> Vec<String> {
        let text = fs::read_to_string(at.join(name)).expect("it was written");
        text.lines().map(|line| line.split(r#""prompt_tokens""#).nth(1).expect("a result").to_owned()).collect()
    };
    let expected = results("1.jsonl");
    assert_eq!(expected.len(), 40);
    for (plan, options, ranks) in plans {
        compile(at, "plans/synthetic.ron", plan, &[&["--max-sequences", "4", "--ranks"], *options].concat());
        for ranks in *ranks {
            let name = format!("{plan}-{ranks}.jsonl");
            let output = on_ranks(at, ranks, &run(plan, &name));
            succeeded(&output);
            assert_eq!(results(&name), expected, "{plan} on {ranks} ranks");
            assert!(errors(&output).contains(&format!("{ranks} ranks: ")), "{}", errors(&output));
        }
    }
}

/// Experts spread over ranks: tokens are the same as long as sums differ in their order alone.
#[test]
fn ranks_with_experts_of_their_own_give_the_results_of_one() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    results_are_those_of_one(at, &[("two.plan", &["expert=2"], &["2", "4"]), ("four.plan", &["expert=4"], &["4"])]);
    // One prompt, of which the other ranks have nothing; and all ranks in one process.
    let prompt = ["--tokens", "5,17,3", "--max-new-tokens", "9"];
    let alone = lfm2c(at, &[&["run", "one.plan"], &prompt[..]].concat());
    for output in [
        on_ranks(at, "2", &[&["run", "two.plan"], &prompt[..]].concat()),
        lfm2c(at, &[&["run", "two.plan"], &prompt[..]].concat()),
    ] {
        assert!(succeeded(&output) == succeeded(&alone), "{}", errors(&output));
    }
    let output = on_ranks(at, "3", &["run", "two.plan"]);
    let text = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("ranks: plan `lfm2-synthetic` has programs for 2: expected a multiple of 2, found 3"),
        "{text}"
    );
    let shown = lfm2c(at, &["inspect", "two.plan", "--bucket", "decode_4"]);
    let text = String::from_utf8(succeeded(&shown).to_vec()).expect("UTF-8");
    for words in ["2 rank(s)", "0 1 2 3", "4 5 6 7", "sent by each rank", "ffn.all_to_all", " to other ranks"] {
        assert!(text.contains(words), "expected `{words}`: {text}");
    }
}

/// Layers spread over ranks: logits are the same, too.
#[test]
fn ranks_with_layers_of_their_own_give_the_results_of_one() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    results_are_those_of_one(at, &[("two.plan", &["pipeline=2"], &["2", "4"]), ("four.plan", &["pipeline=4"], &["4"])]);
    let tokens = ["--tokens", "5,17,3", "--tokens", "9", "--tokens", "8,8", "--max-new-tokens", "9", "--logits"];
    let logits = |plan, ranks, name| {
        let words = [&["run", plan], &tokens[..], &[name]].concat();
        let output = if ranks == "1" { lfm2c(at, &words) } else { on_ranks(at, ranks, &words) };
        (succeeded(&output).to_vec(), fs::read(at.join(name)).expect("it was written"))
    };
    let alone = logits("one.plan", "1", "1.npy");
    for (plan, ranks) in [("two.plan", "1"), ("two.plan", "2"), ("four.plan", "4")] {
        assert!(logits(plan, ranks, "other.npy") == alone, "{plan} on {ranks} ranks: other logits");
    }
}

/// Layers in stages, and experts over the ranks of each, as they are and as counts place them.
#[test]
fn stages_with_experts_over_their_ranks_give_the_results_of_one() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    compile(at, "plans/synthetic.ron", "counted.plan", &[]);
    let count = ["run", "counted.plan", "--tokens", "5,17,3,80,41,7", "--max-new-tokens", "40", "--count-experts"];
    succeeded(&lfm2c(at, &[&count[..], &["counts.json"]].concat()));
    let hot = ["expert=2,pipeline=2", "--expert-counts", "counts.json", "--expert-replicas", "1"];
    let plans: [(&str, &[&str], &[&str]); 3] = [
        ("four.plan", &["expert=2,pipeline=2"], &["4", "8"]),
        ("hot.plan", &hot, &["4"]),
        ("six.plan", &["expert=2,pipeline=3"], &["6"]),
    ];
    results_are_those_of_one(at, &plans);
    // A text, of which the other ranks have nothing.
    compile(at, "plans/demo.ron", "alone.plan", &["--dtype", "f32"]);
    compile(at, "plans/demo.ron", "text.plan", &["--dtype", "f32", "--ranks", "expert=2,pipeline=2"]);
    let model = project("models/demo");
    let run = |plan| ["run", plan, "--model", &model, "--chat", "--prompt", "What is a cat?", "--prompt", "Hello!"];
    let alone = lfm2c(at, &run("alone.plan"));
    for output in [on_ranks(at, "4", &run("text.plan")), lfm2c(at, &run("text.plan"))] {
        assert!(succeeded(&output) == succeeded(&alone), "another text: {}", errors(&output));
    }
    let output = on_ranks(at, "6", &["run", "four.plan"]);
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    assert!(errors(&output).contains("has programs for 4: expected a multiple of 4, found 6"), "{}", errors(&output));
}

/// Texts in, texts out: those of one process, be they printed as they are made or at the end.
#[test]
fn texts_are_those_of_one_rank() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    compile(at, "plans/demo.ron", "demo.plan", &["--dtype", "f32"]);
    let model = project("models/demo");
    let run = ["run", "demo.plan", "--model", &model, "--chat"];
    let cases: [&[&str]; 3] = [
        &["--prompt", "What is a cat?"],
        &["--prompt", "What is a cat?", "--prompt", "What is a dog?", "--prompt", "Hello!", "--stop", " domest"],
        &["--prompt", "What is gold?", "--temperature", "0.9", "--seed", "7"],
    ];
    for case in cases {
        let alone = lfm2c(at, &[&run[..], case].concat());
        for ranks in ["2", "4"] {
            let output = on_ranks(at, ranks, &[&run[..], case].concat());
            assert!(succeeded(&output) == succeeded(&alone), "{ranks} ranks, {case:?}: another text");
        }
    }
}

#[test]
fn samples_are_valid_to_the_bit() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    compile(at, "plans/synthetic.ron", "demo.plan", &[]);
    compile(at, "plans/synthetic.ron", "f16.plan", &["--dtype", "f16"]);
    let samples =
        ["samples", "demo.plan", "--count", "64", "--length", "32", "-o", "in.bin", "--answers", "answers.bin"];
    succeeded(&lfm2c(at, &samples));
    let run = ["run", "demo.plan", "--input", "in.bin"];
    let validate = ["-n", "50", "--validate", "answers.bin", "--tolerance", "0"];
    let text =
        String::from_utf8(succeeded(&on_ranks(at, "4", &[&run[..], &validate].concat())).to_vec()).expect("UTF-8");
    assert!(text.contains("4 ranks)") && text.contains("VALID: largest difference 0.000e0"), "{text}");
    let compare = ["--compare", "f16.plan", "--validate", "answers.bin", "--tolerance", "100"];
    let text =
        String::from_utf8(succeeded(&on_ranks(at, "2", &[&run[..], &compare].concat())).to_vec()).expect("UTF-8");
    assert!(text.contains("times as fast as demo.plan"), "{text}");
    succeeded(&on_ranks(at, "3", &[&run[..], &["--output", "again.bin"]].concat()));
    assert!(fs::read(at.join("again.bin")).expect("written") == fs::read(at.join("answers.bin")).expect("written"));
}

/// Only rank 0 has standard input, and results come while it is open.
#[test]
fn standard_input_streams() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    compile(folder.path(), "plans/synthetic.ron", "demo.plan", &["--max-sequences", "2"]);
    let mut child = mpirun(folder.path(), &["-n", "2", LFM2C, "run", "demo.plan", "--input", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("mpirun starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut results = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let line = |i: usize| format!("{{\"tokens\": [{i}], \"max_new_tokens\": {}, \"ignore_eos\": true}}\n", 1 + i % 7);
    let mut expect = |numbers: std::ops::RangeInclusive<usize>| {
        for number in numbers {
            let line = results.next().expect("a result").expect("UTF-8");
            assert!(line.starts_with(&format!("{{\"line\":{number},")), "{line}");
        }
    };
    stdin.write_all((1..=60).map(line).collect::<String>().as_bytes()).expect("it reads");
    expect(1..=40);
    stdin.write_all((61..=70).map(line).collect::<String>().as_bytes()).expect("it still reads");
    drop(stdin);
    expect(41..=70);
    assert!(child.wait().expect("it ends").success());
}

/// Few ranks and many: the same requests, dealt to as many ranks as each line says.
#[test]
fn requests_are_timed_by_ranks() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    compile(at, "plans/synthetic.ron", "one.plan", &["--max-sequences", "4"]);
    compile(at, "plans/synthetic.ron", "two.plan", &["--max-sequences", "4", "--ranks", "expert=2"]);
    let bench = |ranks: &str, plan: &str| {
        let lengths = ["--requests", "30", "--prompt-tokens", "1-40", "--new-tokens", "5", "--format", "json"];
        let output = on_ranks(at, ranks, &[&["bench", plan], &lengths[..]].concat());
        let found: serde_json::Value = serde_json::from_slice(succeeded(&output)).expect("JSON");
        let rows = found["rows"].as_array().expect("rows").clone();
        for row in &rows {
            assert_eq!(row["same"], 30, "{row}");
            assert!(row["seconds"].as_f64().expect("a number") > 0.0, "{row}");
        }
        assert_eq!(found["new_tokens"], 150);
        rows.iter().map(|row| row["ranks"].as_u64().expect("a number")).collect::<Vec<_>>()
    };
    assert_eq!(bench("1", "one.plan"), [1]);
    assert_eq!(bench("3", "one.plan"), [1, 2, 3]);
    assert_eq!(bench("4", "two.plan"), [2, 4]);
    compile(at, "plans/synthetic.ron", "staged.plan", &["--max-sequences", "4", "--ranks", "pipeline=2"]);
    assert_eq!(bench("4", "staged.plan"), [2, 4]);
}

#[test]
fn weights_are_shared_on_gpus_alone() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let recipe = project("plans/synthetic.ron");
    let run = |more: &[&str]| {
        on_ranks(folder.path(), "2", &[&["run", &recipe, "--tokens", "5", "--device", "cpu"], more].concat())
    };
    let expected = succeeded(&run(&[])).to_vec();
    assert_eq!(succeeded(&run(&["--weights", "read", "--ranks-per-gpu", "2"])), expected);
    let refused = run(&["--weights", "share"]);
    let text = errors(&refused);
    assert_eq!(refused.status.code(), Some(2), "{text}");
    assert_eq!(text.matches("lfm2c: ").count(), 1, "{text}");
    assert!(text.contains("--weights share: expected ranks on GPUs, found the CPU"), "{text}");
}

#[test]
fn other_commands_run_in_one_process() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let recipe = project("plans/synthetic.ron");
    let commands: [(&str, &[&str]); 5] = [
        ("profile", &["profile"]),
        ("compile", &["compile", "-o", "demo.plan"]),
        ("chat", &["chat", "--max-new-tokens", "1"]),
        ("eval", &["eval", "--text", "none.txt"]),
        ("run --count-experts", &["run", "--count-experts", "counts.json"]),
    ];
    for (shown, command) in commands {
        let output = on_ranks(folder.path(), "2", &[&[command[0], &recipe], &command[1..]].concat());
        let text = errors(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        let expected = format!("lfm2c {shown}: expected one process, found OMPI_COMM_WORLD_SIZE = 2");
        assert_eq!(text.matches(&expected).count(), 1, "{text}");
        assert_eq!(text.matches("lfm2c: ").count(), 1, "{text}");
    }
    // Buckets are measured where ranks run them together, which they do on GPUs.
    compile(folder.path(), "plans/synthetic.ron", "two.plan", &["--ranks", "expert=2"]);
    for (input, code, expected) in [
        (&recipe[..], 2, "lfm2c: bench: expected a plan that ranks run together"),
        ("two.plan", 1, "the plan is for the CPU: expected one for sm_90a"),
    ] {
        let output = on_ranks(folder.path(), "2", &["bench", input]);
        let text = errors(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert_eq!((text.matches(expected).count(), text.matches("lfm2c: ").count()), (1, 1), "{text}");
    }
    // A world of one is none.
    compile(folder.path(), "plans/synthetic.ron", "demo.plan", &[]);
    let output = on_ranks(folder.path(), "1", &["run", "demo.plan"]);
    succeeded(&output);
    assert!(!errors(&output).contains("ranks"), "{}", errors(&output));
}
