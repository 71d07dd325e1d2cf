//! `lfm2c eval`, as the built binary does it, against the logits that `lfm2c run` writes.

use std::fs;
use std::path::Path;

use lfm2c::text::Text;
use serde_json::Value;

#[path = "common/text.rs"]
mod common;

use common::{call, done, folder, project, recipe};

fn text() -> String {
    fs::read_to_string(project("ARCHITECTURE.md")).expect("it is there").chars().take(1500).collect()
}

#[track_caller]
fn eval(folder: &Path, arguments: &[&str]) -> Value {
    let common = ["eval", "tiny.ron", "--target", "cpu", "--text", "text.txt", "--format", "json"];
    serde_json::from_str(&done(&call(folder, b"", &[&common[..], arguments].concat()))).expect("JSON")
}

/// -ln p of each token of a chunk but the first, by the logits that a run writes.
fn surprises(folder: &Path, chunk: &[u32]) -> Vec<f64> {
    let prompt = chunk[..chunk.len() - 1].iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let arguments = ["run", "tiny.ron", "--target", "cpu", "--max-new-tokens", "1", "--tokens", &prompt];
    done(&call(folder, b"", &[&arguments[..], &["--prompt-logits", "l.npy"]].concat()));
    let bytes = fs::read(folder.join("l.npy")).expect("it was written");
    let logits = npyz::NpyFile::new(&bytes[..]).expect("NPY").into_vec::<f32>().expect("float32");
    let rows = logits.chunks_exact(512).zip(&chunk[1..]);
    let exp = |row: &[f32]| row.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>();
    rows.map(|(row, &next)| exp(row).ln() - f64::from(row[next as usize])).collect()
}

#[test]
fn perplexity_is_that_of_the_logits() {
    let folder = folder();
    let folder = folder.path();
    fs::write(folder.join("text.txt"), text()).expect("written");
    let tokens = Text::open(&folder.join("model")).expect("rules").encode(&text()).expect("tokens");
    for (context, all, options) in [
        (64, false, &["--context", "64"][..]),
        (64, true, &["--context", "64", "--all"]),
        (31, false, &["--context", "31", "--chunks", "3"]),
        (128, false, &["--chunks", "1"]),
    ] {
        let most = options
            .iter()
            .position(|option| *option == "--chunks")
            .map(|at| options[at + 1].parse().expect("a number"));
        let chunks: Vec<&[u32]> = tokens.chunks_exact(context).take(most.unwrap_or(usize::MAX)).collect();
        let first = if all { 0 } else { context / 2 };
        let scored = chunks.iter().flat_map(|chunk| {
            // Each chunk begins with the first token, in place of its own.
            surprises(folder, &[&[1], &chunk[1..]].concat()).split_off(first)
        });
        let scored: Vec<f64> = scored.collect();
        let count = scored.len() as f64;
        let mean = scored.iter().sum::<f64>() / count;
        let variance = scored.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let found = eval(folder, options);
        assert_eq!(found["chunks"], chunks.len(), "{options:?}");
        assert_eq!(found["scored_tokens"], scored.len(), "{options:?}");
        assert_eq!(found["text_tokens"], tokens.len());
        let near = |name: &str, expected: f64| {
            let found = found[name].as_f64().expect("a number");
            assert!((found / expected - 1.0).abs() < 1e-9, "{options:?}: {name}: expected {expected}, found {found}");
        };
        near("perplexity", mean.exp());
        near("standard_error", mean.exp() * (variance / count).sqrt());
    }
}

#[test]
fn the_number_does_not_depend_on_the_plan_s_sizes() {
    let folder = folder();
    let folder = folder.path();
    fs::write(folder.join("text.txt"), text()).expect("written");
    let found = eval(folder, &["--context", "50"]);
    for sizes in [
        &["--max-sequences", "1"][..],
        &["--prefill", "16"],
        &["--kv-tokens", "128"],
        &["--prefill", "128", "--decode", "1"],
    ] {
        let other = eval(folder, &[&["--context", "50"], sizes].concat());
        assert_eq!(other["perplexity"], found["perplexity"], "{sizes:?}");
    }
    let plain = ["eval", "tiny.ron", "--target", "cpu", "--context", "50", "--text", "-"];
    let printed = done(&call(folder, text().as_bytes(), &plain));
    let number = |name: &str| found[name].as_f64().expect("a number");
    let expected = format!("perplexity {:.4} +/- {:.5}\n", number("perplexity"), number("standard_error"));
    assert_eq!(printed, expected);
}

#[test]
fn faults_are_told() {
    let folder = folder();
    let folder = folder.path();
    let check = |bytes: &[u8], options: &[&str], code: i32, message: &str| {
        fs::write(folder.join("text.txt"), bytes).expect("written");
        let output =
            call(folder, b"", &[&["eval", "tiny.ron", "--target", "cpu", "--text", "text.txt"], options].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{errors}");
        assert!(errors.contains(message), "{errors}");
    };
    check(b"", &[], 1, "expected at least 128 tokens, a chunk, found 1");
    check(b"a few words", &["--context", "64"], 1, "smaller --context");
    // No sequence has more room than all of them.
    check(b"a few words", &["--kv-tokens", "64"], 1, "expected at least 64 tokens, a chunk");
    check(b"ab\xff", &[], 1, "text.txt: expected UTF-8, found 0xff at byte 3");
    check(b"text", &["--context", "129"], 2, "expected 3 to 128, the plan's --max-context or --kv-tokens");
    check(b"text", &["--context", "2"], 2, "expected 3 to");
    check(b"text", &["--chunks", "0"], 2, "--chunks");
    fs::remove_file(folder.join("model/tokenizer.json")).expect("removed");
    check(b"text", &[], 1, "model/tokenizer.json");
    let output = call(folder, b"", &["eval", "tiny.ron", "--text", "none.txt"]);
    assert_eq!(output.status.code(), Some(1));
    recipe(folder, "tiny.ron", "Directory(\"gone\")", "weights: Synthetic(1),");
    assert_eq!(call(folder, b"", &["eval", "tiny.ron", "--text", "text.txt"]).status.code(), Some(1));
}
