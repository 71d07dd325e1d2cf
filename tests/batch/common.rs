//! What the tests of batches share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

pub fn project(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).to_str().expect("UTF-8").to_owned()
}

pub fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfm2c"));
    command.current_dir(folder).args(arguments);
    command
}

pub fn lfm2c(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().expect("the binary starts")
}

/// Standard output of a command that must succeed.
pub fn done(folder: &Path, arguments: &[&str]) -> String {
    let output = lfm2c(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the output is UTF-8")
}

/// Standard error of a command that must fail with an exit code.
pub fn fails(folder: &Path, code: i32, arguments: &[&str]) -> String {
    let output = lfm2c(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
    assert!(!errors.contains("panicked"), "{arguments:?}: {errors}");
    errors
}

pub fn folder_with_plan() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder can be made");
    done(folder.path(), &["compile", &project("plans/synthetic.ron"), "--target", "cpu", "-o", "demo.plan"]);
    folder
}

pub fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) {
    fs::write(folder.join(name), text).expect("the file is written");
}

pub fn read(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).expect("the file was written")
}

pub fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// A model directory whose tokenizer has a token for each character of a small alphabet.
pub fn model_with_tokenizer(folder: &Path) -> PathBuf {
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
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
    write(&model, "tokenizer.json", tokenizer.to_string());
    write(&model, "tokenizer_config.json", r#"{"bos_token": "<s>", "eos_token": "</s>"}"#);
    write(&model, "chat_template.jinja", template);
    write(&model, "generation_config.json", r#"{"eos_token_id": [7, 2]}"#);
    model
}
