//! Tokenizers for tests: one token a byte, in the two ways in which tokenizers hold bytes.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::Text;

/// Writes a file of a folder.
pub fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).expect("the file is written");
}

/// A folder with a byte-level tokenizer, and the files given.
pub fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), "tokenizer.json", &byte_level().to_string());
    for (name, text) in files {
        write(folder.path(), name, text);
    }
    folder
}

/// The rules of such a folder.
pub fn open(files: &[(&str, &str)]) -> (TempDir, Text) {
    let folder = folder(files);
    let text = Text::open(folder.path()).expect("it is a tokenizer");
    (folder, text)
}

/// Its tokens of a text.
pub fn bpe(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| 3 + u32::from(byte)).collect()
}

/// `<unk>`, `<s>`, `</s>`, then the bytes; `<s>` goes before a text.
fn byte_level() -> Value {
    let special = ["<unk>", "<s>", "</s>"];
    let letters = (0..256u32).map(letter).map(String::from);
    let vocab: serde_json::Map<String, Value> =
        special.map(str::to_owned).into_iter().chain(letters).zip(0u32..).map(|(t, i)| (t, i.into())).collect();
    json!({
        "version": "1.0",
        "added_tokens": added(&special),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// The letter that a byte-level vocabulary writes a byte with.
fn letter(byte: u32) -> char {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = if printable(byte) { byte } else { 256 + (0..byte).filter(|&b| !printable(b)).count() as u32 };
    char::from_u32(code).expect("a letter")
}

fn added(tokens: &[&str]) -> Value {
    let token = |(id, content): (usize, &&str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    tokens.iter().enumerate().map(token).collect()
}

/// The rules of a tokenizer in which `▁` is a space, and bytes are tokens such as `<0xE4>`.
pub fn byte_fallback() -> (TempDir, Text) {
    let special = ["<unk>", "<s>", "</s>"];
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let words = ["▁", "h", "i", "▁h", "▁hi"].map(str::to_owned);
    let vocab: serde_json::Map<String, Value> = special
        .map(str::to_owned)
        .into_iter()
        .chain(bytes)
        .chain(words)
        .zip(0u32..)
        .map(|(token, id)| (token, id.into()))
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added(&special),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "h"], ["▁h", "i"]], "byte_fallback": true,
                  "fuse_unk": true, "unk_token": "<unk>"},
    });
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), "tokenizer.json", &tokenizer.to_string());
    let text = Text::open(folder.path()).expect("it is a tokenizer");
    (folder, text)
}
