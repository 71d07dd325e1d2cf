//! Batch files whose prompts are text.

use std::fs;

use serde_json::{Value, json};

use crate::common::{done, fails, lfm2c, model_with_tokenizer, objects, read, write};

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

#[test]
fn samples_of_a_text() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    model_with_tokenizer(at);
    let compile = ["compile", "--model", "model", "--dtype", "f32", "--prefill", "16", "--decode", "1"];
    done(at, &[&compile[..], &["--max-context", "64", "-o", "m.plan"]].concat());
    write(at, "abc.txt", "abcdefgh");
    let make = ["samples", "m.plan", "--model", "model", "--text", "abc.txt", "--length", "3", "-o", "in.bin"];
    done(at, &[&make[..], &["--count", "2", "--answers", "out.bin"]].concat());
    let words: Vec<u8> = [2i32, 3, 8, 9, 10, 11, 12, 13].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(read(at, "in.bin"), words, "a is token 8");
    assert_eq!(read(at, "out.bin").len(), 2 * 96 * 4);
    let errors = fails(at, 1, &[&make[..], &["--count", "3"]].concat());
    assert!(errors.contains("abc.txt: expected a text of at least 3 x 3 tokens, found 8"), "{errors}");
}
