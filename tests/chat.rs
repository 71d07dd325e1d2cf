//! `lfm2c chat` as a program: turns through a pipe, what its log says that ran, Ctrl-C.
#![cfg(unix)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Ids of the model's vocabulary of 96 that are no characters. Only the last is left out of text, so that text says what the
/// tokens are.
const SPECIAL: [(&str, u32); 4] = [("<pad>", 0), ("<s>", 1), ("<|im_start|>", 6), ("<|im_end|>", 7)];
const TEMPLATE: &str = "<s>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The character that each id but the special ones stands for.
fn letters() -> Vec<(char, u32)> {
    let ids = (0..96).filter(|id| SPECIAL.iter().all(|(_, special)| special != id));
    std::iter::once('\n').chain(' '..='z').zip(ids).collect()
}

/// Tokens of a rendered conversation: one a character.
fn encode(text: &str) -> Vec<u32> {
    let (mut tokens, mut rest) = (vec![], text);
    'text: while let Some(letter) = rest.chars().next() {
        for (special, id) in SPECIAL {
            if let Some(after) = rest.strip_prefix(special) {
                tokens.push(id);
                rest = after;
                continue 'text;
            }
        }
        let found = letters().into_iter().find(|(other, _)| *other == letter);
        tokens.push(found.unwrap_or_else(|| panic!("{letter:?} is in the vocabulary")).1);
        rest = &rest[letter.len_utf8()..];
    }
    tokens
}

/// A golden model with a tokenizer of one token a character, and its plan.
fn model(stops: &[u32], limits: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/moe-base");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), folder.path().join(name)).expect("the model can be copied");
    }
    let special = |(content, id): &(&str, u32)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": *id == 7})
    };
    let letters = letters().into_iter().map(|(letter, id)| (letter.to_string(), id));
    let vocab = letters.chain(SPECIAL.map(|(text, id)| (text.to_owned(), id)));
    let vocab: serde_json::Map<String, Value> = vocab.map(|(text, id)| (text, id.into())).collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": SPECIAL.iter().map(special).collect::<Value>(),
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let write = |name: &str, value: Value| {
        std::fs::write(folder.path().join(name), value.to_string()).expect("a file can be written");
    };
    write("tokenizer.json", tokenizer);
    write("tokenizer_config.json", json!({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}));
    write("generation_config.json", json!({"eos_token_id": stops}));
    let compile =
        ["compile", "--model", ".", "--target", "cpu", "--dtype", "f32", "--prefill", "16,64", "--decode", "1"];
    let limits = if limits.is_empty() { &["--max-context", "2048", "--kv-tokens", "2048"] } else { limits };
    done(folder.path(), &[&compile, limits, &["--max-sequences", "2", "-o", "model.plan"]].concat());
    folder
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfm2c"));
    command.current_dir(folder).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn done(folder: &Path, arguments: &[&str]) -> String {
    let output = command(folder, arguments).output().expect("the binary starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the output is UTF-8")
}

const CHAT: [&str; 6] = ["chat", "model.plan", "--model", ".", "--log", "log.jsonl"];

/// What lines give: standard output, standard error, the log.
fn chat(folder: &Path, options: &[&str], lines: &[u8]) -> (String, String, Vec<Value>) {
    let mut child = command(folder, &[&CHAT, options].concat()).spawn().expect("the binary starts");
    child.stdin.take().expect("a pipe").write_all(lines).expect("lines can be written");
    let output = child.wait_with_output().expect("it ends");
    let errors = String::from_utf8(output.stderr).expect("errors are UTF-8");
    assert!(output.status.success(), "{errors}");
    (String::from_utf8(output.stdout).expect("answers are UTF-8"), errors, log(folder))
}

fn log(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("log.jsonl")).expect("there is a log");
    text.lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect()
}

fn number(turn: &Value, name: &str) -> usize {
    turn[name].as_u64().unwrap_or_else(|| panic!("{name} in {turn}")) as usize
}

fn text(turn: &Value, name: &str) -> String {
    turn[name].as_str().unwrap_or_else(|| panic!("{name} in {turn}")).to_owned()
}

/// The prompt of the turn after some, as the template writes it.
fn rendered(system: Option<&str>, before: &[Value], user: &str) -> String {
    let message = |role: &str, content: &str| format!("<|im_start|>{role}\n{content}<|im_end|>\n");
    let said = |turn: &Value| message("user", &text(turn, "user")) + &message("assistant", &text(turn, "text"));
    let system = system.map_or(String::new(), |system| message("system", system));
    let before: String = before.iter().map(said).collect();
    format!("<s>{system}{before}{}<|im_start|>assistant\n", message("user", user))
}

/// What the model says to a prompt in a run of its own: as many tokens as a turn of the log has.
fn fresh(folder: &Path, prompt: &[u32], options: &[&str], turn: &Value) -> Vec<u32> {
    let ids: Vec<String> = prompt.iter().map(ToString::to_string).collect();
    let new = number(turn, "new_tokens").to_string();
    let run =
        ["run", "model.plan", "--model", ".", "--tokens", &ids.join(","), "--max-new-tokens", &new, "--ignore-eos"];
    let found = done(folder, &[&run, options].concat());
    found.trim().split(',').map(|id| id.parse().expect("an id")).collect()
}

fn shown(tokens: &[u32]) -> String {
    let letters = letters().into_iter().map(|(letter, id)| (letter.to_string(), id));
    let all: Vec<(String, u32)> = letters.chain(SPECIAL.map(|(text, id)| (text.to_owned(), id))).collect();
    let seen = tokens.iter().filter(|&&token| token != 7);
    seen.filter_map(|token| all.iter().find(|(_, id)| id == token)).map(|(text, _)| text.as_str()).collect()
}

/// Checks each turn of a log against a run over the conversation as it was shown.
fn check(folder: &Path, system: Option<&str>, options: &[&str], turns: &[Value]) {
    for (at, turn) in turns.iter().enumerate() {
        let prompt = encode(&rendered(system, &turns[..at], &text(turn, "user")));
        assert_eq!(number(turn, "history_tokens"), prompt.len(), "{turn}");
        assert_eq!(number(turn, "prompt_rows") + number(turn, "kept_rows"), prompt.len(), "{turn}");
        let said = text(turn, "text");
        let mut tokens = fresh(folder, &prompt, options, turn);
        if turn["finish_reason"] == "eos" {
            tokens.pop();
        }
        let expected = shown(&tokens);
        assert!(expected.starts_with(&said), "turn {at}: expected {expected:?}, found {said:?}");
        let whole = ["eos", "length"].contains(&&*text(turn, "finish_reason"));
        assert!(!whole || expected == said, "turn {at}: expected {expected:?}, found {said:?}");
    }
}

#[test]
fn turns_run_only_what_is_new() {
    let folder = model(&[7, 40], &[]);
    for options in [&[][..], &["--temperature", "0.9", "--seed", "5"]] {
        let chat_options = [options, &["--system", "Be brief.", "--max-new-tokens", "25"]].concat();
        let (out, errors, turns) =
            chat(folder.path(), &chat_options, b"Hello there\n\nWhat now?\n/help\nAnd then?\r\nOne more\n");
        assert_eq!(turns.len(), 4, "{errors}");
        check(folder.path(), Some("Be brief."), options, &turns);
        assert_eq!(out, turns.iter().map(|turn| text(turn, "text") + "\n").collect::<String>());
        assert!(errors.contains("/clear"), "/help");
        for (at, pair) in turns.windows(2).enumerate() {
            // All but the token chosen last, if the text has all of the tokens.
            let [before, turn] = pair else { unreachable!() };
            let (new, said) = (number(before, "new_tokens"), encode(&text(before, "text")).len());
            let ended = usize::from(before["finish_reason"] == "eos");
            if new == said + ended {
                assert_eq!(number(turn, "kept_rows"), number(before, "history_tokens") + new - 1, "turn {at}");
                let rest =
                    format!("<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", text(turn, "user"));
                assert_eq!(number(turn, "prompt_rows"), encode(&rest).len() + 1 - ended, "turn {at}");
            }
            assert!(number(turn, "turn") == at + 2 && turn["tokens_per_second"].is_number());
        }
    }
}

#[test]
fn a_stop_string_is_not_part_of_the_history() {
    let folder = model(&[7], &[]);
    let (_, _, plain) = chat(folder.path(), &["--max-new-tokens", "20"], b"Hello there\n");
    let said = text(&plain[0], "text");
    let (near, far) = (&said[said.len() - 5..said.len() - 2], &said[2..said.len() - 5]);
    for stop in [near, far] {
        let at = said.find(stop).expect("it is there");
        let (out, _, turns) =
            chat(folder.path(), &["--max-new-tokens", "20", "--stop", stop], b"Hello there\nAnd now?\n");
        assert_eq!(turns[0]["finish_reason"], "stop");
        assert_eq!(text(&turns[0], "text"), said[..at]);
        assert!(out.starts_with(&format!("{}\n", &said[..at])), "{out:?}");
        check(folder.path(), None, &[], &turns);
        // Where the stop string is short, the state is there still; else all runs again, and the log says so.
        let history = number(&turns[0], "history_tokens") + at;
        let (kept, again) = (number(&turns[1], "kept_rows"), number(&turns[1], "recomputed_rows"));
        assert_eq!((kept, again), if stop.len() <= 6 { (history, 0) } else { (0, history) }, "{stop:?} in {said:?}");
    }
}

/// Reads so many bytes of the answers.
fn read(child: &mut Child, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut bytes).expect("an answer comes");
    bytes
}

fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill is there");
    assert!(status.success());
}

/// Says a line, interrupts the answer once so much of it has come, and gives the turn's line of the log.
fn interrupted(folder: &Path, child: &mut Child, line: &str, turn: usize) -> Value {
    child.stdin.as_mut().expect("a pipe").write_all(line.as_bytes()).expect("a line can be written");
    let mut out = read(child, 20);
    interrupt(child);
    // The log has a turn when it is over.
    let started = std::time::Instant::now();
    while log(folder).len() < turn {
        assert!(child.try_wait().expect("a child").is_none(), "the program lives");
        assert!(started.elapsed().as_secs() < 120, "the answer ends");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let found = log(folder).remove(turn - 1);
    let said = text(&found, "text") + "\n";
    out.extend(read(child, said.len() - out.len()));
    assert_eq!(String::from_utf8(out).expect("UTF-8"), said, "what was shown is what the history has");
    assert_eq!(found["finish_reason"], "interrupted", "{found}");
    found
}

#[test]
fn ctrl_c_stops_the_answer_and_the_conversation_goes_on_from_what_was_shown() {
    // An answer of seconds.
    let folder = model(&[7], &["--max-context", "4096", "--kv-tokens", "4096"]);
    let folder = folder.path();
    let options = [&CHAT[..], &["--max-new-tokens", "3900"]].concat();
    let mut child = command(folder, &options).spawn().expect("the binary starts");
    let first = interrupted(folder, &mut child, "Hello there\n", 1);
    let second = interrupted(folder, &mut child, "And now?\n", 2);
    // Between answers it ends the program: asked again until the last one is over.
    let started = std::time::Instant::now();
    let ended = loop {
        interrupt(&child);
        std::thread::sleep(std::time::Duration::from_millis(50));
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        assert!(started.elapsed().as_secs() < 120, "it ends");
    };
    assert_eq!(ended.code(), Some(130));
    let shown = encode(&text(&first, "text")).len();
    assert_eq!(number(&first, "new_tokens"), shown + 1, "the token that came after Ctrl-C");
    assert_eq!(number(&second, "kept_rows"), number(&first, "history_tokens") + shown);
    check(folder, None, &[], &[first, second]);
}

#[test]
fn a_full_conversation_says_so_and_can_be_cleared() {
    let folder = model(&[7], &["--max-context", "128", "--kv-tokens", "128"]);
    let (_, errors, turns) =
        chat(folder.path(), &[], b"Hello there\nAnd now?\n/clear\nHello there\n/system Be brief.\nHello there\n");
    let reasons: Vec<&Value> = turns.iter().map(|turn| &turn["finish_reason"]).collect();
    assert_eq!(reasons, [&json!("length"), &Value::Null, &json!("length"), &json!("length")]);
    assert_eq!(number(&turns[0], "history_tokens") + number(&turns[0], "new_tokens"), 128, "to the last position");
    let error = text(&turns[1], "error");
    assert!(error.contains("the conversation is full") && error.contains("128") && error.contains("/clear"), "{error}");
    assert!(errors.contains(&error));
    assert_eq!((&turns[2]["text"], number(&turns[2], "kept_rows")), (&turns[0]["text"], 0));
    check(folder.path(), Some("Be brief."), &[], &turns[3..]);
}

#[test]
fn lines_that_are_no_turns() {
    let folder = model(&[7], &[]);
    let (_, errors, turns) =
        chat(folder.path(), &["--max-new-tokens", "2"], b"\xff\xfe\n/nothing\n//path\n/exit\nnever\n");
    assert!(errors.contains("line 1 of standard input: expected UTF-8"), "{errors}");
    assert!(errors.contains("/nothing: no such command; /help"), "{errors}");
    assert_eq!(turns.len(), 1);
    assert_eq!(turns[0]["user"], "/path");
}

#[test]
fn without_a_template_raw_text_goes_on() {
    let folder = model(&[7], &[]);
    std::fs::write(folder.path().join("tokenizer_config.json"), "{}").expect("a file");
    let fails = |options: &[&str], code: i32| {
        let output = command(folder.path(), &[&CHAT[..], options].concat()).output().expect("the binary starts");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{errors}");
        errors
    };
    let error = fails(&[], 1);
    assert!(error.contains("no chat template") && error.contains("--raw"), "{error}");
    assert!(fails(&["--max-new-tokens", "0"], 2).contains("--max-new-tokens"));
    assert!(fails(&["--raw", "--system", "x"], 2).contains("--system"));
    assert!(fails(&["--stop", ""], 2).contains("--stop"));
    assert!(fails(&["--temperature=-1"], 2).contains("--temperature"));
    let (_, _, turns) = chat(folder.path(), &["--raw", "--max-new-tokens", "9"], b"Once upon\na time\n");
    let first = text(&turns[0], "text");
    assert_eq!(number(&turns[1], "history_tokens"), format!("Once upon{first}\na time").len());
    std::fs::remove_file(PathBuf::from(folder.path()).join("tokenizer.json")).expect("it was there");
    assert!(fails(&["--raw"], 1).contains("tokenizer.json"));
}
