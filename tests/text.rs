//! The rules of text against what `transformers` makes of the same files (`oracle/make_text_goldens.py`).

use std::path::{Path, PathBuf};

use lfm2c::text::Text;
use serde_json::{Value, json};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

/// Calls with each item of a list of each golden file, and the rules that it is about.
fn goldens(list: &str, check: impl Fn(&Text, &Value)) {
    for case in ["bytes", "fallback"] {
        let folder = project("tests/data/text").join(case);
        let text = Text::open(&folder).expect("the rules can be read");
        let golden = std::fs::read_to_string(folder.join("golden.json")).expect("the golden can be read");
        let golden: Value = serde_json::from_str(&golden).expect("the golden is JSON");
        let items = golden[list].as_array().expect("a list");
        assert!(items.len() >= 9, "{case}: {} items", items.len());
        items.iter().for_each(|item| check(&text, item));
    }
}

#[test]
fn texts_become_the_tokens_of_transformers() {
    goldens("encode", |text, item| {
        let given = item["text"].as_str().expect("a text");
        assert_eq!(text.encode(given).expect("tokens"), ids(&item["ids"]), "{given:?}");
        assert_eq!(text.encode_plain(given).expect("tokens"), ids(&item["plain"]), "{given:?}");
    });
}

#[test]
fn tokens_become_the_texts_of_transformers_at_once_and_one_by_one() {
    goldens("decode", |text, item| {
        let (tokens, expected) = (ids(&item["ids"]), item["text"].as_str().expect("a text"));
        assert_eq!(text.decode(&tokens).expect("a text"), expected, "{tokens:?}");
        let mut stream = text.stream(&[]);
        let mut pieces = String::new();
        for &token in &tokens {
            pieces += &stream.push(token).expect("a piece").text;
        }
        pieces += &stream.finish().expect("a piece");
        assert_eq!(pieces, stream.text());
        // Where bytes are shown one by one, those that are no character make those before them none too; the stream has
        // given them out by then.
        if !expected.contains('\u{FFFD}') || text.directory().ends_with("bytes") {
            assert_eq!(pieces, expected, "{tokens:?}");
        }
    });
}

#[test]
fn conversations_become_the_texts_and_tokens_of_transformers() {
    goldens("render", |text, item| {
        let variables = item["variables"].as_object().expect("an object").clone();
        let rendered = text.render_with(item["messages"].clone(), variables).expect("a text");
        assert_eq!(rendered, item["text"].as_str().expect("a text"));
        assert_eq!(text.encode_plain(&rendered).expect("tokens"), ids(&item["ids"]), "{rendered:?}");
        assert_eq!(text.encode(&rendered).expect("tokens")[..ids(&item["ids"]).len()], ids(&item["ids"]), "BOS once");
    });
}

#[test]
fn a_refusal_of_the_template_is_told() {
    let text = Text::open(&project("tests/data/text/fallback")).expect("the rules can be read");
    let error =
        text.render_with(json!([{"role": "assistant", "content": "x"}]), Default::default()).expect_err("refused");
    let error = format!("{error:#}");
    assert!(error.contains("tokenizer_config.json") && error.contains("take turns, found assistant"), "{error}");
}
