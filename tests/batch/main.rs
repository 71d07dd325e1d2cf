//! Batch files, the evaluation form, completions and manual pages, through the built binary.

mod common;
mod manual;
mod samples;
mod text;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use common::{command, done, fails, folder_with_plan, lfm2c, objects, project, read, write};

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
        "line 6, column 31: invalid type: string \"many\", expected u32",
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
    // The plan has 16 slots. The first sequence is the longest, so that some hundred others end before it.
    let line = |i: usize| {
        format!("{{\"tokens\": [{i}], \"max_new_tokens\": {}, \"ignore_eos\": true}}\n", if i == 0 { 8 } else { 2 })
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
    let wrong: [(&[&str], &[&str]); 20] = [
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
        (&samples, &["--output", "./in.bin"]),
        (&samples, &["--validate", "in.jsonl", "--output", "in.jsonl"]),
        (&["samples", "demo.plan"], &["-o", "x.bin", "--count", "0"]),
        (&["samples", "demo.plan"], &["-o", "x.bin", "--answers", "x.bin"]),
    ];
    let before = [read(at, "in.jsonl"), read(at, "in.bin")];
    for (start, more) in wrong {
        fails(at, 2, &[start, more].concat());
    }
    assert_eq!([read(at, "in.jsonl"), read(at, "in.bin")], before, "what is read is not written");
    assert!(fails(at, 1, &["run", "demo.plan", "--input", "no.jsonl"]).contains("no.jsonl"));
    assert!(fails(at, 1, &["run", "demo.plan", "--input", "no.bin"]).contains("no.bin"));
}
