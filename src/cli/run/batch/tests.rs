use super::*;
use crate::plan::Phase;
use crate::runtime::mock::{Mock, bucket, manifest};

/// Sequences of different lengths in three slots, with lines of every kind.
const INPUT: &str = r#"{"tokens": [1, 2], "max_new_tokens": 9, "id": "first"}
{"tokens": [3], "max_new_tokens": 1}

{"tokens": [4, 5, 6], "temperature": 0.7, "max_new_tokens": 3, "id": null}
nonsense
{"tokens": [7], "max_new_tokens": 0}
{"tokens": [99], "id": 12345678901234567890123}
{"tokens": [8, 9], "temperature": 0.7, "seed": 5}"#;

fn mock() -> Mock {
    let buckets = vec![bucket(Phase::Prefill, 4, 2, 2), bucket(Phase::Decode, 1, 1, 1), bucket(Phase::Decode, 2, 2, 2)];
    Mock::new(manifest(3, 32, 96, 8, buckets))
}

fn reader(seed: u64) -> Reader<'static> {
    let sampling = SamplingParams { seed, ..SamplingParams::default() };
    let defaults = Defaults { max_new_tokens: 2, sampling, ..Defaults::default() };
    Reader { defaults, eos: vec![], text: Err("no tokenizer".into()) }
}

/// Runs a batch; how many lines were done and how many of them could not run.
fn run(input: &str, results: Results, retry: bool, seed: u64) -> Result<(usize, usize)> {
    let mut lines = Lines::new(input.as_bytes(), "in.jsonl", None);
    let mut batch = Batch::new("plan".into(), reader(seed), &mut lines, results);
    batch.retry = retry;
    batch.report = |_| ();
    batch.first = batch.read()?;
    let mut executor = mock();
    if batch.first.is_some() {
        Generator::new(&mut executor, crate::runtime::Options::default())?.run(&mut batch)?;
    }
    batch.results.finish()?;
    Ok((batch.done, batch.failed))
}

fn whole(folder: &Path, input: &str) -> Result<Vec<u8>> {
    let path = folder.join("whole.jsonl");
    let _ = std::fs::remove_file(&path);
    run(input, Results::create(&path)?, false, 0)?;
    Ok(std::fs::read(&path)?)
}

#[test]
fn results_are_in_the_order_of_the_lines() {
    let folder = tempfile::tempdir().unwrap();
    let output = String::from_utf8(whole(folder.path(), INPUT).unwrap()).unwrap();
    let results: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<u64> = results.iter().map(|result| result["line"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [1, 2, 4, 5, 6, 7, 8], "blank lines count but give nothing");
    let lengths: Vec<Option<usize>> = results.iter().map(|result| Some(result["tokens"].as_array()?.len())).collect();
    assert_eq!(lengths, [Some(9), Some(1), Some(3), None, Some(0), None, Some(2)]);
    assert_eq!(results[0]["id"], Value::from("first"));
    assert!(output.contains("{\"id\":12345678901234567890123,\"line\":7,"), "no digit is lost: {output}");
    assert_eq!(results[2].get("id"), Some(&Value::Null));
    assert_eq!(results[1].get("id"), None);
    for (place, expected) in [(3, "line 5: expected an object"), (5, "line 7: prompt token 0: expected an id below")] {
        assert!(results[place]["error"].as_str().unwrap().starts_with(expected), "{}", results[place]);
    }
}

/// Wherever a run was interrupted, be it in the middle of a character: what it would have written in the end.
#[test]
fn a_resumed_run_is_the_whole_run() {
    let folder = tempfile::tempdir().unwrap();
    let input = INPUT.replace("\"first\"", "\"é\u{1f642}\"");
    let expected = whole(folder.path(), &input).unwrap();
    let path = folder.path().join("out.jsonl");
    for cut in 0..=expected.len() {
        for retry in [false, true] {
            std::fs::write(&path, &expected[..cut]).unwrap();
            let counts = run(&input, Results::resume(&path, retry).unwrap(), retry, 0).unwrap();
            assert_eq!(counts, (7, 2), "lines that were done before count");
            assert!(std::fs::read(&path).unwrap() == expected, "cut at byte {cut}, retry {retry}");
        }
    }
    std::fs::remove_file(&path).unwrap();
    run(&input, Results::resume(&path, false).unwrap(), false, 0).unwrap();
    assert!(std::fs::read(&path).unwrap() == expected, "nothing was there");
}

#[test]
fn results_of_other_lines_options_or_order_are_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let expected = whole(folder.path(), INPUT).unwrap();
    let path = folder.path().join("out.jsonl");
    let torn = [&expected[..], b"{\"line\""].concat();
    for (what, input, seed) in [
        ("another prompt", INPUT.replace("[1, 2]", "[1, 3]"), 0),
        ("another id", INPUT.replace("first", "last"), 0),
        ("a line more at the front", format!("{{\"tokens\": [1]}}\n{INPUT}"), 0),
        ("a blank line more at the front", format!("\n{INPUT}"), 0),
        ("a seed that line 1 takes", INPUT.to_owned(), 1),
        ("a line less at the end", INPUT.rsplit_once('\n').unwrap().0.to_owned(), 0),
    ] {
        std::fs::write(&path, &torn).unwrap();
        let error = run(&input, Results::resume(&path, false).unwrap(), false, seed).unwrap_err().to_string();
        assert!(error.contains("expected") && error.contains("found line") || error.contains("found one"), "{error}");
        assert!(error.contains("resume with the same input"), "{what}: {error}");
        assert!(std::fs::read(&path).unwrap() == torn, "{what}: the file is as it was");
    }
    // Settings that no line takes from the command line change no result.
    let seeded = r#"{"tokens": [1], "seed": 3}"#;
    std::fs::write(&path, whole(folder.path(), seeded).unwrap()).unwrap();
    run(seeded, Results::resume(&path, false).unwrap(), false, 99).unwrap();
}

#[test]
fn corrected_lines_run_when_errors_are_retried() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.jsonl");
    let before = whole(folder.path(), INPUT).unwrap();
    let corrected = INPUT.replace("nonsense", r#"{"tokens": [2], "max_new_tokens": 8}"#).replace("99", "9");
    let expected = whole(folder.path(), &corrected).unwrap();
    std::fs::write(&path, &before).unwrap();
    let error = run(&corrected, Results::resume(&path, false).unwrap(), false, 0).unwrap_err().to_string();
    assert!(error.ends_with("--retry-errors runs lines that were corrected"), "{error}");
    assert_eq!(run(&corrected, Results::resume(&path, true).unwrap(), true, 0).unwrap(), (7, 0));
    assert!(std::fs::read(&path).unwrap() == expected);
    // What ran is not run again.
    std::fs::write(&path, &before).unwrap();
    let changed = corrected.replace("[1, 2]", "[1, 3]");
    assert!(run(&changed, Results::resume(&path, true).unwrap(), true, 0).is_err());
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn a_line_says_the_same_as_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = |input: &str, seed| {
        let path = folder.path().join("one.jsonl");
        let _ = std::fs::remove_file(&path);
        run(input, Results::create(&path).unwrap(), false, seed).unwrap();
        let last: Value =
            serde_json::from_str(std::fs::read_to_string(&path).unwrap().lines().last().unwrap()).unwrap();
        last["tokens"].clone()
    };
    let line = |more: &str| format!("{{\"tokens\": [1], \"temperature\": 0.7, \"max_new_tokens\": 6{more}}}");
    assert_eq!(tokens(&line(", \"seed\": 7"), 0), tokens(&line(""), 7));
    assert_eq!(tokens(&format!("\n{}\n{}", line(""), line("")), 7), tokens(&line(""), 8), "the place is added");
    assert_eq!(tokens(&line(", \"seed\": 7"), 0), tokens(&format!("{}\n{}", line(""), line(", \"seed\": 7")), 3));
}
