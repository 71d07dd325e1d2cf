//! Text in, text out: `lfm2c run --prompt`, as the built binary does it.

use std::fs;
use std::path::Path;
use std::process::Output;

use lfm2c::text::{Message, Text};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "common/text.rs"]
mod common;

use common::{call, done, folder, project, recipe};

fn run(folder: &Path, input: &[u8], arguments: &[&str]) -> Output {
    call(folder, input, &[&["run", "tiny.ron", "--target", "cpu"], arguments].concat())
}

#[track_caller]
fn text(folder: &TempDir, arguments: &[&str]) -> String {
    done(&run(folder.path(), b"", arguments))
}

/// The only sequence of a run's JSON.
#[track_caller]
fn sequence(folder: &TempDir, arguments: &[&str]) -> Value {
    let printed = text(folder, &[arguments, &["--format", "json"]].concat());
    let object: Value = serde_json::from_str(&printed).expect("JSON");
    let sequences = object["sequences"].as_array().expect("sequences");
    assert_eq!(sequences.len(), 1);
    sequences[0].clone()
}

/// Standard error of a run that fails with an exit code.
#[track_caller]
fn fails(folder: &TempDir, code: i32, arguments: &[&str]) -> String {
    let output = run(folder.path(), b"", arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    errors
}

fn rules(folder: &TempDir) -> Text {
    Text::open(&folder.path().join("model")).expect("the rules can be read")
}

fn tokens(sequence: &Value) -> Vec<u32> {
    serde_json::from_value(sequence["tokens"].clone()).expect("token ids")
}

fn commas(tokens: &[u32]) -> String {
    tokens.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn a_prompt_is_answered_in_text() {
    let folder = folder();
    let found = sequence(&folder, &["--prompt", "Hello, 世界"]);
    let decoded = rules(&folder).decode(&tokens(&found)).expect("text");
    assert_eq!(found["text"], decoded);
    assert_eq!(text(&folder, &["--prompt", "Hello, 世界"]).trim_end_matches('\n'), decoded.trim_end_matches('\n'));
    // Its tokens are those of the same run with token ids, which has a text too where there is a tokenizer.
    let prompt = rules(&folder).encode("Hello, 世界").expect("tokens");
    assert_eq!(found["prompt_tokens"], prompt.len());
    assert_eq!(sequence(&folder, &["--tokens", &commas(&prompt)]), found);
    assert_eq!(text(&folder, &["--tokens", &commas(&prompt)]), commas(&tokens(&found)) + "\n");
}

#[test]
fn a_prompt_comes_from_standard_input_or_the_recipe() {
    let folder = folder();
    let given = done(&run(folder.path(), "Zwölf\n".as_bytes(), &["--prompt", "-"]));
    assert_eq!(given, text(&folder, &["--prompt", "Zwölf\n"]));
    assert_ne!(given, text(&folder, &["--prompt", "Zwölf"]), "the last newline counts");
    assert_eq!(text(&folder, &[]), text(&folder, &["--prompt", "The plan says"]));
    assert_eq!(text(&folder, &["--chat"]), text(&folder, &["--chat", "--prompt", "The plan says"]));
    // A plan file has its recipe, and with that the prompt and the directory.
    done(&call(folder.path(), b"", &["compile", "tiny.ron", "--target", "cpu", "-o", "tiny.plan"]));
    assert_eq!(done(&call(folder.path(), b"", &["run", "tiny.plan"])), text(&folder, &[]));
}

#[test]
fn several_prompts_are_a_batch() {
    let folder = folder();
    let both = text(&folder, &["--prompt", "one", "--prompt", "two"]);
    let (one, two) = (text(&folder, &["--prompt", "one"]), text(&folder, &["--prompt", "two"]));
    assert_eq!(both, format!("{one}\n{two}"));
}

#[test]
fn the_first_token_comes_once_and_not_at_all_with_raw() {
    let folder = folder();
    let count = |arguments: &[&str]| {
        sequence(&folder, &[arguments, &["--max-new-tokens", "0"]].concat())["prompt_tokens"]
            .as_u64()
            .expect("a number")
    };
    let plain = count(&["--prompt", "hello"]);
    assert_eq!(count(&["--prompt", "<|startoftext|>hello"]), plain);
    assert_eq!(count(&["--prompt", "hello", "--raw"]), plain - 1);
    let rules = rules(&folder);
    let (system, user) = (Message::new("system", "Be brief."), Message::new("user", "hello"));
    let chat = rules.chat(std::slice::from_ref(&user)).expect("tokens");
    assert_eq!(chat.iter().filter(|&&token| token == 1).count(), 1);
    assert_eq!(count(&["--prompt", "hello", "--chat"]), chat.len() as u64);
    let chat = rules.chat(&[system, user]).expect("tokens");
    assert_eq!(count(&["--prompt", "hello", "--system", "Be brief."]), chat.len() as u64, "it implies --chat");
}

#[test]
fn a_stop_text_ends_a_sequence_wherever_it_lies() {
    let folder = folder();
    let rules = rules(&folder);
    let whole = sequence(&folder, &["--prompt", "hello", "--temperature", "1", "--seed", "5"]);
    let (all, full) = (tokens(&whole), whole["text"].as_str().expect("text").to_owned());
    // From within one token's text into the next's.
    let (at, stop) = (4..all.len() - 1)
        .find_map(|at| {
            let (a, b) = (rules.decode(&all[at..at + 1]).ok()?, rules.decode(&all[at + 1..at + 2]).ok()?);
            let plain = |text: &str| text.is_ascii() && text.len() > 1;
            (plain(&a) && plain(&b)).then(|| (at, format!("{}{}", &a[1..], &b[..1])))
        })
        .expect("two words in a row");
    let position = full.find(&stop).expect("it is there");
    for given in [&["--prompt", "hello"][..], &["--tokens", &commas(&rules.encode("hello").expect("tokens"))]] {
        let sampled = ["--temperature", "1", "--seed", "5", "--stop", "never", "--stop", &stop];
        let found = sequence(&folder, &[given, &sampled].concat());
        assert_eq!(found["text"], full[..position], "stop {stop:?}");
        assert_eq!(found["finish_reason"], "stop");
        assert!(tokens(&found).len() <= at + 2 && all.starts_with(&tokens(&found)));
        assert!(rules.decode(&tokens(&found)).expect("text").contains(&stop), "with the token that completed it");
    }
    let printed = text(&folder, &["--prompt", "hello", "--temperature", "1", "--seed", "5", "--stop", &stop]);
    assert_eq!(printed, format!("{}\n", &full[..position]));
}

#[test]
fn stop_tokens_are_those_of_the_generation_config() {
    let folder = folder();
    let all = tokens(&sequence(&folder, &["--prompt", "hello"]));
    let stop = all[3];
    let end = all.iter().position(|&token| token == stop).expect("it is there") + 1;
    let config = folder.path().join("model/generation_config.json");
    fs::write(&config, json!({"eos_token_id": [511, stop]}).to_string()).expect("written");
    let found = sequence(&folder, &["--prompt", "hello"]);
    assert_eq!((found["finish_reason"].as_str(), tokens(&found)), (Some("eos"), all[..end].to_vec()));
    assert_eq!(tokens(&sequence(&folder, &["--prompt", "hello", "--ignore-eos"])), all);
    fs::remove_file(config).expect("removed");
    assert_eq!(tokens(&sequence(&folder, &["--prompt", "hello"])), all, "the plan's own is 7");
}

#[test]
fn nothing_in_or_out_is_defined() {
    let folder = folder();
    let found = sequence(&folder, &["--prompt", "hello", "--max-new-tokens", "0"]);
    assert_eq!((&found["text"], &found["finish_reason"], &found["tokens"]), (&json!(""), &json!("length"), &json!([])));
    assert_eq!(text(&folder, &["--prompt", "hello", "--max-new-tokens", "0"]), "\n");
    let found = sequence(&folder, &["--prompt", "", "--max-new-tokens", "2"]);
    assert_eq!(found["prompt_tokens"], 1, "the first token alone");
    let errors = fails(&folder, 1, &["--prompt", "", "--raw"]);
    assert!(errors.contains("expected at least 1 token, found 0"), "{errors}");
}

#[test]
fn what_does_not_fit_the_context_is_refused_and_the_rest_runs() {
    let folder = folder();
    let long = "word ".repeat(100);
    let errors = fails(&folder, 1, &["--prompt", &long]);
    assert!(errors.contains("max-context = 128, found "), "{errors}");
    let prompt = rules(&folder).encode("hello").expect("tokens").len();
    let fill = |new: usize| ["--prompt".into(), "hello".into(), "--max-new-tokens".into(), new.to_string()];
    let arguments = fill(128 - prompt + 1);
    fails(&folder, 1, &arguments.each_ref().map(String::as_str));
    let arguments = fill(128 - prompt);
    let found = sequence(&folder, &[&arguments.each_ref().map(String::as_str)[..], &["--ignore-eos"]].concat());
    assert_eq!((tokens(&found).len(), &found["finish_reason"]), (128 - prompt, &json!("length")));
    let output = run(folder.path(), b"", &["--prompt", &long, "--prompt", "hello"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout), text(&folder, &["--prompt", "hello"]));
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    let folder = folder();
    let output = run(folder.path(), b"ab\xe4\xbdc", &["--prompt", "-"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains("standard input: expected UTF-8, found 0xe4 at byte 3"), "{errors}");
}

#[test]
fn calls_that_make_no_sense_are_usage_errors() {
    let folder = folder();
    for arguments in [
        &["--prompt", "x", "--tokens", "1"][..],
        &["--prompt", "x", "--input", "x.jsonl"],
        &["--prompt", "-", "--prompt", "-"],
        &["--prompt", "x", "--stop", ""],
        &["--prompt", "x", "--raw", "--chat"],
        &["--prompt", "x", "--raw", "--system", "y"],
        &["--tokens", "1", "--chat"],
        &["--input", "x.bin", "--stop", "x"],
    ] {
        fails(&folder, 2, arguments);
    }
}

#[test]
fn a_missing_tokenizer_or_template_is_named_and_tokens_still_run() {
    let folder = folder();
    let model = folder.path().join("model");
    fs::remove_file(model.join("chat_template.jinja")).expect("removed");
    fs::write(model.join("tokenizer_config.json"), "{}").expect("written");
    let errors = fails(&folder, 1, &["--prompt", "x", "--chat"]);
    assert!(errors.contains("chat_template.jinja") && errors.contains("as token ids"), "{errors}");
    fs::remove_file(model.join("tokenizer.json")).expect("removed");
    let errors = fails(&folder, 1, &["--prompt", "x"]);
    assert!(errors.contains("model/tokenizer.json") && errors.contains("token ids"), "{errors}");
    let errors = fails(&folder, 1, &["--tokens", "5,17", "--stop", "x"]);
    assert!(errors.contains("tokenizer.json"), "{errors}");
    assert_eq!(sequence(&folder, &["--tokens", "5,17"])["text"], Value::Null);
    fs::write(model.join("tokenizer.json"), "{").expect("written");
    let output = run(folder.path(), b"", &["--tokens", "5,17"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("not a tokenizer") && output.status.success());
    // Without a directory there is no place to look.
    let graph = project("plans/gelu.ir");
    let output = call(folder.path(), b"", &["run", graph.to_str().expect("UTF-8"), "--prompt", "x"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--model DIR"));
}

#[test]
fn a_recipe_s_directory_has_weights_and_tokenizer() {
    let folder = folder();
    let model = folder.path().join("model");
    let golden = project("tests/goldens/moe-base");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(name), model.join(name)).expect("copied");
    }
    let letters: Vec<char> = (' '..='~').filter(char::is_ascii_graphic).filter(|c| !c.is_ascii_uppercase()).collect();
    let vocab: serde_json::Map<String, Value> =
        letters.iter().map(char::to_string).zip((0..).map(Value::from)).collect();
    let tokenizer =
        json!({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}, "decoder": {"type": "Fuse"}});
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).expect("written");
    recipe(folder.path(), "tiny.ron", "Directory(\"model\")", "weights: Checkpoint, prompt: \"abc\",");
    let own = sequence(&folder, &[]);
    assert_eq!(
        own["text"].as_str().expect("text").len(),
        tokens(&own).iter().filter(|&&t| (t as usize) < letters.len()).count()
    );
    assert_eq!(sequence(&folder, &["--model", "model", "--prompt", "abc"]), own);
    let ids: Vec<u32> = "abc".chars().map(|c| letters.iter().position(|&l| l == c).expect("a letter") as u32).collect();
    assert_eq!(tokens(&sequence(&folder, &["--tokens", &commas(&ids)])), tokens(&own));
}

#[test]
fn lines_of_a_batch_take_the_options_for_text() {
    let folder = folder();
    fs::write(folder.path().join("in.jsonl"), "{\"prompt\": \"hello\"}\n").expect("written");
    let line = |more: &[&str]| -> Value {
        let printed = text(&folder, &[&["--input", "in.jsonl"], more].concat());
        serde_json::from_str(&printed).expect("JSON")
    };
    for more in [&[][..], &["--raw"], &["--system", "Be brief."], &["--stop", "e"]] {
        let (found, expected) = (line(more), sequence(&folder, &[&["--prompt", "hello"], more].concat()));
        for field in ["prompt_tokens", "tokens", "text", "finish_reason"] {
            assert_eq!(found[field], expected[field], "{more:?}: {field}");
        }
    }
    fs::remove_file(folder.path().join("model/tokenizer.json")).expect("removed");
    let errors = fails(&folder, 2, &["--input", "in.jsonl", "--stop", "x"]);
    assert!(errors.contains("tokenizer.json"), "{errors}");
}
