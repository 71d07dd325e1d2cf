//! Batch files, the evaluation form, completions and manual pages, through the built binary.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn project(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).to_str().expect("UTF-8").to_owned()
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfm2c"));
    command.current_dir(folder).args(arguments);
    command
}

fn lfm2c(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().expect("the binary starts")
}

/// Standard output of a command that must succeed.
fn done(folder: &Path, arguments: &[&str]) -> String {
    let output = lfm2c(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the output is UTF-8")
}

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
    done(folder.path(), &["compile", &project("plans/synthetic.ron"), "--target", "cpu", "-o", "demo.plan"]);
    folder
}

fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) {
    fs::write(folder.join(name), text).expect("the file is written");
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).expect("the file was written")
}

fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

const RUN: [&str; 4] = ["run", "demo.plan", "--input", "in.jsonl"];

#[test]
fn a_bad_line_is_told_by_number_and_stops_no_other() {
    let folder = folder_with_plan();
    let at = folder.path();
    let lines: [&[u8]; 8] = [
        br#"{"tokens": [1, 2], "max_new_tokens": 2, "id": "a"}"#,
        b"",
        b"{\"tokens\": [1\xff]}",
        br#"{"tokens": [512]}"#,
        br#"{"tokens": [1], "max_new_tokens": 512}"#,
        br#"{"tokens": [1], "top_k": "many", "id": "b"}"#,
        br#"{"prompt": "hello"}"#,
        br#"{"tokens": [3], "max_new_tokens": 1}"#,
    ];
    write(at, "in.jsonl", lines.join(&b"\r\n"[..]));
    let output = lfm2c(at, &RUN);
    assert_eq!(output.status.code(), Some(1));
    let results = objects(&String::from_utf8(output.stdout).expect("UTF-8"));
    let (first, last) = (&results[0], &results[6]);
    assert_eq!((&first["id"], &first["line"], &first["prompt_tokens"]), (&json!("a"), &json!(1), &json!(2)));
    assert_eq!((&first["finish_reason"], &first["text"]), (&json!("length"), &Value::Null));
    assert_eq!((first["tokens"].as_array().map(Vec::len), &last["line"]), (Some(2), &json!(8)));
    let errors = String::from_utf8_lossy(&output.stderr);
    let expected = [
        "line 3, byte 14: expected UTF-8, found 0xff",
        "line 4: prompt token 0: expected an id below the vocabulary size 512, found 512",
        "line 5: prompt and new tokens: expected at most max-context = 512, found 1 + 512",
        "line 6, column 32: invalid type: string \"many\", expected u32",
        "line 7: prompt: no tokenizer",
    ];
    for (result, expected) in results[1..6].iter().zip(expected) {
        let error = result["error"].as_str().unwrap_or_else(|| panic!("{result}"));
        assert!(error.starts_with(expected), "{error}");
        assert!(errors.contains(&format!("lfm2c: {error}\n")), "{error} is on standard error too");
    }
    assert_eq!(results[4]["id"], "b");
    assert!(errors.ends_with("lfm2c: 5 of 7 sequences could not run\n"), "{errors}");
}

#[test]
fn lines_equal_the_same_options() {
    let folder = folder_with_plan();
    let at = folder.path();
    let (tokens, settings) = ("5,17,3", "--max-new-tokens 12 --temperature 0.8 --top-k 40 --top-p 0.95 --min-p 0.01");
    let object = r#""max_new_tokens": 12, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01"#;
    let options: Vec<&str> = settings.split(' ').collect();
    let alone = |seed: &str| {
        let arguments = ["run", "demo.plan", "--tokens", tokens, "--format", "json", "--ignore-eos", "--seed", seed];
        let text = done(at, &[&arguments[..], &options].concat());
        objects(&text)[0]["sequences"][0]["tokens"].clone()
    };
    let line = |more: &str| format!("{{\"tokens\": [{tokens}], {object}, \"ignore_eos\": true{more}}}\n");
    write(at, "in.jsonl", [line(""), line(", \"seed\": 9"), line("")].concat());
    let results = objects(&done(at, &[&RUN[..], &["--seed", "4"]].concat()));
    let found: Vec<&Value> = results.iter().map(|result| &result["tokens"]).collect();
    assert_eq!(found, [&alone("4"), &alone("9"), &alone("6")], "without a seed, the place is added to --seed");
    write(at, "in.jsonl", format!("{{\"tokens\": [{tokens}], \"seed\": 9}}"));
    let by_options = done(at, &[&RUN[..], &options, &["--ignore-eos"]].concat());
    assert_eq!(objects(&by_options)[0]["tokens"], alone("9"));
    let text = done(at, &[&RUN[..], &options, &["--ignore-eos", "--format", "text"]].concat());
    assert_eq!(format!("[{}]", text.trim_end()), alone("9").to_string());
}

/// The reader sees results while the writer still has lines to send, so nothing waits for the end of the input.
#[test]
fn results_stream_in_order() {
    let folder = folder_with_plan();
    let mut child = command(folder.path(), &["run", "demo.plan", "--input", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut results = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    // The plan has 16 slots. The first sequence is the longest, so that others end before it.
    let line = |i: usize| {
        format!("{{\"tokens\": [{i}], \"max_new_tokens\": {}, \"ignore_eos\": true}}\n", if i == 0 { 30 } else { 2 })
    };
    let first: String = (0..400).map(line).collect();
    stdin.write_all(first.as_bytes()).expect("it reads");
    let mut next = || -> Value {
        let line = results.next().expect("a result").expect("UTF-8");
        serde_json::from_str(&line).expect("JSON")
    };
    for number in 1..=100 {
        assert_eq!(next()["line"], number);
    }
    stdin.write_all(line(400).as_bytes()).expect("it still reads");
    drop(stdin);
    for number in 101..=401 {
        assert_eq!(next()["line"], number);
    }
    assert!(results.next().is_none());
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let folder = folder_with_plan();
    let at = folder.path();
    let lines = (0..30).map(|i| format!("{{\"tokens\": [{i}, 7], \"temperature\": 1, \"max_new_tokens\": 20}}\n"));
    write(at, "in.jsonl", lines.collect::<String>());
    let run = |output, more: &[&str]| done(at, &[&RUN[..], &["--output", output], more].concat());
    assert_eq!(run("whole.jsonl", &[]), "", "results go to the file alone");
    let whole = read(at, "whole.jsonl");
    let arguments = [&RUN[..], &["--output", "killed.jsonl"]].concat();
    let mut child = command(at, &arguments).stderr(Stdio::null()).spawn().expect("it starts");
    // Wait for the first result, however long that takes, unless all are there by then.
    while !read_or_empty(at, "killed.jsonl").contains(&b'\n') && child.try_wait().expect("a child").is_none() {
        std::thread::yield_now();
    }
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    assert!(whole.starts_with(&read(at, "killed.jsonl")), "what is there is what would have been");
    run("killed.jsonl", &["--resume"]);
    assert!(read(at, "killed.jsonl") == whole);
    // Nothing is left to do: no weights are loaded.
    let output = lfm2c(at, &[&arguments[..], &["--resume"]].concat());
    assert!(output.status.success() && !String::from_utf8_lossy(&output.stderr).contains("ready in"));
    for cut in [0, 1, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
        write(at, "cut.jsonl", &whole[..cut]);
        run("cut.jsonl", &["--resume"]);
        assert!(read(at, "cut.jsonl") == whole, "cut at {cut}");
    }
    // The first run was by this command: without --resume its results are safe, and so they are from another input.
    assert!(fails(at, 2, &arguments).contains("--resume"));
    let errors = fails(at, 1, &[&arguments[..], &["--resume", "--seed", "1"]].concat());
    assert!(errors.contains("expected that of line 1 of in.jsonl") && errors.contains("another --output"), "{errors}");
    done(at, &["compile", &project("plans/synthetic.ron"), "--target", "cpu", "--dtype", "bf16", "-o", "demo.plan"]);
    fails(at, 1, &[&arguments[..], &["--resume"]].concat());
    assert!(read(at, "killed.jsonl") == whole);
}

fn read_or_empty(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).unwrap_or_default()
}

#[test]
fn files_without_lines_and_the_first_lines_alone() {
    let folder = folder_with_plan();
    let at = folder.path();
    for text in ["", "\n \n\r\n", "\u{feff}"] {
        write(at, "in.jsonl", text);
        assert_eq!(done(at, &RUN), "");
    }
    write(at, "in.jsonl", "\u{feff}{\"tokens\": [1]}\n\nnonsense\n");
    let results = objects(&done(at, &[&RUN[..], &["-n", "1", "--max-new-tokens", "0"]].concat()));
    assert_eq!((results.len(), &results[0]["tokens"]), (1, &json!([])));
    done(
        at,
        &[&RUN[..], &["-n", "1", "--max-new-tokens", "2", "--logits", "l.npy", "--prompt-logits", "p.npy"]].concat(),
    );
    let shape = |name| npyz::NpyFile::new(&read(at, name)[..]).expect("it is NPY").shape().to_vec();
    assert_eq!((shape("l.npy"), shape("p.npy")), (vec![1, 2, 512], vec![1, 512]));
}

#[test]
fn wrong_usage_of_batches() {
    let folder = folder_with_plan();
    let at = folder.path();
    write(at, "in.jsonl", "{\"tokens\": [1]}\n{\"tokens\": [2]}\n");
    done(at, &["samples", "demo.plan", "--count", "3", "--length", "4", "-o", "in.bin"]);
    let samples = ["run", "demo.plan", "--input", "in.bin"];
    let wrong: [(&[&str], &[&str]); 17] = [
        (&RUN, &["--tokens", "1"]),
        (&RUN, &["--resume"]),
        (&RUN, &["--output", "o.jsonl", "--retry-errors"]),
        (&RUN, &["--output", "o.jsonl", "--format", "text"]),
        (&RUN, &["--output", "o.jsonl", "--resume", "--logits", "l.npy"]),
        (&RUN, &["--validate", "a.bin"]),
        (&RUN, &["--compare", "demo.plan"]),
        (&RUN, &["--prompt-logits", "l.npy"]),
        (&RUN, &["-n", "0"]),
        (&["run", "demo.plan"], &["-n", "1"]),
        (&samples, &["-n", "0"]),
        (&samples, &["-n", "4"]),
        (&samples, &["--tolerance", "1"]),
        (&samples, &["--validate", "in.bin", "--tolerance=-1"]),
        (&samples, &["--output", "a.bin", "--resume"]),
        (&samples, &["--logits", "l.npy"]),
        (&["samples", "demo.plan"], &["-o", "x.bin", "--count", "0"]),
    ];
    for (start, more) in wrong {
        fails(at, 2, &[start, more].concat());
    }
    assert!(fails(at, 1, &["run", "demo.plan", "--input", "no.jsonl"]).contains("no.jsonl"));
    assert!(fails(at, 1, &["run", "demo.plan", "--input", "no.bin"]).contains("no.bin"));
}

/// A model directory whose tokenizer has a token for each character of a small alphabet.
fn model_with_tokenizer(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    fs::create_dir(&model).expect("a folder can be made");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(project(&format!("tests/goldens/moe-no-dense/{name}")), model.join(name)).expect("it can be copied");
    }
    let special = ["<pad>", "<s>", "<2>", "<3>", "<4>", "<5>", "<6>", "</s>"].map(str::to_owned);
    let letters =
        (0..88u32).map(|i| char::from_u32(if i < 26 { 'a' as u32 + i } else { 'À' as u32 + i }).expect("a letter"));
    let vocab: serde_json::Map<String, Value> =
        special.iter().cloned().chain(letters.map(String::from)).zip(0u32..).map(|(t, i)| (t, i.into())).collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
    write(&model, "tokenizer.json", tokenizer.to_string());
    write(&model, "tokenizer_config.json", r#"{"add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"}"#);
    write(&model, "chat_template.jinja", template);
    write(&model, "generation_config.json", r#"{"eos_token_id": [7, 2]}"#);
    model
}

#[test]
fn prompts_messages_and_stop_strings() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    model_with_tokenizer(at);
    let compile = ["compile", "--model", "model", "--dtype", "f32", "--prefill", "16", "--decode", "1,4"];
    done(at, &[&compile[..], &["--max-context", "64", "--max-sequences", "4", "-o", "m.plan"]].concat());
    let run = ["run", "m.plan", "--model", "model", "--input", "in.jsonl", "--max-new-tokens", "20"];
    let same = [
        r#"{"tokens": [1, 15, 8], "ignore_eos": true}"#,
        r#"{"prompt": "ha", "ignore_eos": true}"#,
        r#"{"prompt": "<s>ha", "ignore_eos": true}"#,
        r#"{"messages": [{"role": "user", "content": "h"}, {"role": "user", "content": "a"}], "ignore_eos": true}"#,
    ];
    write(at, "in.jsonl", same.join("\n"));
    let results = objects(&done(at, &run));
    let text = results[0]["text"].as_str().expect("a text").to_owned();
    for result in &results {
        assert_eq!((&result["prompt_tokens"], &result["text"]), (&json!(3), &json!(text)), "{result}");
        assert_eq!((&result["tokens"], &result["finish_reason"]), (&results[0]["tokens"], &json!("length")));
    }
    let letters: Vec<char> = text.chars().collect();
    assert!(letters.len() > 6, "most of 20 tokens are letters: {text:?}");
    // A stop text, in the middle of what comes without it, ends the text where it first begins.
    let stop: String = letters[4..6].iter().collect();
    let expected = &text[..text.find(&stop).expect("it is there")];
    let stopped = |stop: Value| json!({"prompt": "ha", "ignore_eos": true, "stop": stop}).to_string();
    let lines = [
        stopped(json!(stop)),
        stopped(json!(["never \u{1f642}", stop])),
        stopped(json!("\u{1f642}")),
        stopped(json!([])),
    ];
    write(at, "in.jsonl", lines.join("\n"));
    let results = objects(&done(at, &run));
    for result in &results[..2] {
        assert_eq!((&result["text"], &result["finish_reason"]), (&json!(expected), &json!("stop")), "{result}");
        assert!(result["tokens"].as_array().is_some_and(|tokens| tokens.len() < 20));
    }
    assert!(results[2..].iter().all(|result| result["text"] == json!(text)));
    // The tokens that end an answer are those of generation_config.json.
    let tokens: Vec<u64> = (0..60).collect();
    let line = |seed: u64| json!({"tokens": [1], "temperature": 3, "max_new_tokens": 60, "seed": seed}).to_string();
    write(at, "in.jsonl", tokens.iter().map(|&seed| line(seed)).collect::<Vec<_>>().join("\n"));
    let results = objects(&done(at, &run));
    let ends = |result: &Value| result["tokens"].as_array().and_then(|tokens| tokens.last()?.as_u64());
    let ended: Vec<Option<u64>> = results.iter().filter(|result| result["finish_reason"] == "eos").map(ends).collect();
    assert!(ended.contains(&Some(7)) && ended.contains(&Some(2)), "{ended:?}");
    fs::remove_file(at.join("model/tokenizer.json")).expect("it is there");
    write(at, "in.jsonl", same[..2].join("\n"));
    let output = lfm2c(at, &run);
    let results = objects(&String::from_utf8(output.stdout).expect("UTF-8"));
    assert_eq!((output.status.code(), &results[0]["text"]), (Some(1), &Value::Null), "token input still works");
    assert!(results[1]["error"].as_str().is_some_and(|error| error.contains("tokenizer.json")), "{}", results[1]);
}

/// Samples and answers of what `transformers` computed: the first tokens of each golden prompt, and the logits behind them.
fn golden_samples(folder: &Path, golden: &str, length: usize) -> usize {
    let bytes = fs::read(project(golden)).expect("the golden file is there");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("it is a safetensors file");
    let (mut inputs, mut answers, mut count) = (vec![], vec![], 0i32);
    for number in 0.. {
        let Ok(ids) = tensors.tensor(&format!("ids.{number}")) else { break };
        if ids.shape()[0] < length {
            continue;
        }
        let logits = tensors.tensor(&format!("logits.{number}")).expect("logits");
        let row = logits.shape()[1] * 4;
        inputs.extend_from_slice(&ids.data()[..length * 4]);
        answers.extend_from_slice(&logits.data()[(length - 1) * row..length * row]);
        count += 1;
    }
    write(folder, "inputs.bin", [&count.to_le_bytes()[..], &(length as i32).to_le_bytes(), &inputs].concat());
    write(folder, "answers.bin", answers);
    count as usize
}

const VALIDATE: [&str; 8] =
    ["run", "f32.plan", "--device", "cpu", "--input", "inputs.bin", "--validate", "answers.bin"];

#[test]
fn samples_are_valid_up_to_the_tolerance() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let model = project("tests/goldens/moe-no-dense");
    let compile = |dtype, plan| {
        let compile = [
            "compile",
            "--model",
            &model,
            "--target",
            "cpu",
            "--max-context",
            "64",
            "--prefill",
            "32",
            "--decode",
            "1",
        ];
        done(at, &[&compile[..], &["--dtype", dtype, "-o", plan]].concat());
    };
    compile("f32", "f32.plan");
    compile("f16", "f16.plan");
    let count = golden_samples(at, "tests/goldens/moe-no-dense/golden.safetensors", 8);
    assert!(count >= 3);
    let text = done(at, &[&VALIDATE[..], &["--tolerance", "1e-4"]].concat());
    assert!(
        text.contains(&format!("{count} samples of 8 tokens")) && text.contains("VALID: largest difference"),
        "{text}"
    );
    assert!(text.contains("tokens/s") && !text.contains("INVALID"), "{text}");
    // f16 against the same answers, and how the times compare.
    let both = [&VALIDATE[..], &["--compare", "f16.plan", "--tolerance", "0.5", "--format", "json"]].concat();
    let report = &objects(&done(at, &both))[0];
    assert_eq!((&report["samples"], &report["length"]), (&json!(count), &json!(8)));
    let [single, half] = &report["plans"].as_array().expect("plans")[..] else { panic!("two plans") };
    let largest = |plan: &Value| plan["largest_difference"].as_f64().expect("a number");
    assert!(largest(single) < 1e-4 && largest(half) > largest(single), "{report}");
    assert_eq!((&single["dtype"], &half["dtype"]), (&json!("f32"), &json!("f16")));
    assert!(report["times_as_fast"].as_f64().is_some_and(|times| times > 0.0));
    let strict = [&VALIDATE[..], &["--compare", "f16.plan", "--tolerance", "1e-4"]].concat();
    assert!(fails(at, 1, &strict).contains("f16.plan"));
    // One logit of sample 2 is wrong.
    let mut answers = read(at, "answers.bin");
    let row = answers.len() / count;
    let wrong = 2 * row + 5 * 4;
    let right = f32::from_le_bytes(answers[wrong..wrong + 4].try_into().expect("four bytes"));
    answers[wrong..wrong + 4].copy_from_slice(&(right + 0.01).to_le_bytes());
    write(at, "answers.bin", &answers);
    let output = lfm2c(at, &VALIDATE);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1));
    let expected =
        format!("INVALID: 1 of {count} samples beyond the tolerance 1e-3; the first is sample 2, at token 5: expected");
    assert!(text.contains(&expected), "{text}");
    done(at, &[&VALIDATE[..], &["-n", "2"]].concat());
    done(at, &[&VALIDATE[..], &["--tolerance", "0.02"]].concat());
    // Truncated files, and files that are not of this model or these inputs.
    write(at, "answers.bin", &answers[..answers.len() - 1]);
    let errors = fails(at, 1, &VALIDATE);
    let sizes = [format!("expected {} bytes", answers.len()), format!("found {}", answers.len() - 1)];
    assert!(sizes.iter().all(|size| errors.contains(size)), "{errors}");
    write(at, "answers.bin", &answers);
    let inputs = read(at, "inputs.bin");
    for length in [0, 7, 8, inputs.len() - 1] {
        write(at, "inputs.bin", &inputs[..length]);
        assert!(fails(at, 1, &VALIDATE).contains(&format!("found {length}")));
    }
    write(at, "inputs.bin", [&inputs[..12], &96i32.to_le_bytes(), &inputs[16..]].concat());
    let errors = fails(at, 1, &VALIDATE);
    assert!(errors.contains("sample 0, token 1: expected an id from 0 to 95, found 96"), "{errors}");
}

#[test]
fn samples_are_made_and_answered() {
    let folder = folder_with_plan();
    let at = folder.path();
    let make = ["samples", "demo.plan", "--count", "37", "--length", "21", "--seed", "3"];
    done(at, &[&make[..], &["-o", "inputs.bin", "--answers", "answers.bin"]].concat());
    let inputs = read(at, "inputs.bin");
    let words: Vec<i32> = inputs.as_chunks::<4>().0.iter().map(|&word| i32::from_le_bytes(word)).collect();
    assert_eq!((words[0], words[1], words.len()), (37, 21, 2 + 37 * 21));
    assert!(words[2..].iter().all(|token| (0..512).contains(token)));
    assert!(words[2..].iter().any(|&token| token < 64) && words[2..].iter().any(|&token| token >= 448));
    assert_eq!(read(at, "answers.bin").len(), 37 * 512 * 4);
    done(at, &[&make[..], &["-o", "again.bin"]].concat());
    assert!(inputs == read(at, "again.bin"));
    // The last row of a prompt's logits, and what a run with chunks and -n writes, are the answers.
    let tokens: Vec<String> = words[2..23].iter().map(ToString::to_string).collect();
    done(at, &["run", "demo.plan", "--tokens", &tokens.join(","), "--max-new-tokens", "0", "--prompt-logits", "p.npy"]);
    let table = npyz::NpyFile::new(&read(at, "p.npy")[..]).expect("it is NPY").into_vec::<f32>().expect("float32");
    let last: Vec<u8> = table[20 * 512..].iter().flat_map(|logit| logit.to_le_bytes()).collect();
    assert!(read(at, "answers.bin")[..2048] == last);
    let run = ["run", "demo.plan", "--input", "inputs.bin", "--output", "part.bin", "-n", "30", "--chunk", "5"];
    let text = done(at, &run);
    assert!(text.starts_with("30 samples of 21 tokens\n") && !text.contains("VALID"), "{text}");
    assert!(read(at, "part.bin") == read(at, "answers.bin")[..30 * 2048]);
    done(at, &["run", "demo.plan", "--input", "inputs.bin", "--validate", "answers.bin", "--tolerance", "0"]);
    let errors = fails(at, 1, &["samples", "demo.plan", "--length", "512", "-o", "x.bin", "--answers", "y.bin"]);
    assert!(errors.contains("sample 0") && errors.contains("max-context = 512"), "{errors}");
}

/// All long options of a command's help.
fn long_options(help: &str) -> Vec<&str> {
    let starts =
        help.lines().filter_map(|line| line.trim_start().split_once("--").filter(|(before, _)| before.len() <= 4));
    starts.filter_map(|(_, name)| name.split([' ', '=', ',']).next()).filter(|name| !name.is_empty()).collect()
}

#[test]
fn completions_and_manual_pages_know_every_command_and_option() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    done(at, &["man", "-o", "man"]);
    let main = done(at, &["man"]);
    assert_eq!(main.as_bytes(), read(at, "man/lfm2c.1"));
    let help = done(at, &["--help"]);
    let commands = help.split("Commands:\n").nth(1).expect("commands").split("\n\n").next().expect("a list");
    let commands: Vec<&str> = commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.contains(&"run") && commands.contains(&"man"), "{commands:?}");
    let shells =
        ["bash", "zsh", "fish", "elvish", "powershell"].map(|shell| (shell, done(at, &["completions", shell])));
    for command in commands.into_iter().filter(|&command| command != "help") {
        assert!(main.contains(&format!("lfm2c\\-{command}(1)")), "{command}");
        let page = String::from_utf8(read(at, &format!("man/lfm2c-{command}.1"))).expect("UTF-8");
        let help = done(at, &[command, "--help"]);
        let options = long_options(&help);
        assert!(options.contains(&"help"), "{command}: {options:?}");
        for option in options {
            assert!(page.contains(&format!("\\-\\-{}", option.replace('-', "\\-"))), "{command} --{option}");
            for (shell, script) in &shells {
                assert!(script.contains(option), "{shell}: {command} --{option}");
            }
        }
    }
    assert!(fails(at, 2, &["completions", "no-such-shell"]).contains("bash"));
    // A script is read without a fault by the shell that it is for, where there is one.
    for (shell, script) in &shells[..3] {
        let child = Command::new(shell).arg("-n").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let Ok(mut child) = child else { continue };
        child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
    }
}
