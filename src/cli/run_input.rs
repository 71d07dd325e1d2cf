//! What a run is given: `--tokens`, `--input FILE.jsonl`, or the recipe's own prompt.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::cli::usage;
use crate::plan::Manifest;

/// A prompt, or why a line of the input file is none.
pub type Prompt = std::result::Result<Vec<u32>, String>;

/// One line of an input file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    tokens: Vec<u32>,
}

/// The prompts of a run, in order.
pub fn prompts(tokens: &[String], input: Option<&Path>, manifest: &Manifest) -> Result<Vec<Prompt>> {
    if let Some(path) = input {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        return Ok(lines.map(|(i, line)| parse_line(i + 1, line)).collect());
    }
    if !tokens.is_empty() {
        return tokens.iter().map(|text| Ok(Ok(parse_tokens(text)?))).collect();
    }
    if manifest.model.prompt.is_empty() {
        return usage(
            "nothing to run: expected --tokens 5,17,3 or --input FILE.jsonl, because the recipe has no prompt",
        );
    }
    Ok(vec![Ok(manifest.model.prompt.clone())])
}

fn parse_line(number: usize, line: &str) -> Prompt {
    let parsed: std::result::Result<Line, _> = serde_json::from_str(line);
    parsed.map(|line| line.tokens).map_err(|e| format!("line {number}: expected {{\"tokens\": [5, 17, 3]}}: {e}"))
}

fn parse_tokens(text: &str) -> Result<Vec<u32>> {
    let mut tokens = vec![];
    for part in text.split(',') {
        match part.trim().parse() {
            Ok(token) => tokens.push(token),
            Err(_) => return usage(format!("--tokens: expected token ids such as 5,17,3, found `{part}`")),
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_numbers_between_commas() {
        assert_eq!(parse_tokens("5, 17,3").unwrap(), [5, 17, 3]);
        for bad in ["", "5,", "5,x", "-1", "4294967296"] {
            assert!(parse_tokens(bad).unwrap_err().to_string().contains("expected token ids"), "{bad}");
        }
    }

    #[test]
    fn a_bad_line_names_its_number() {
        assert_eq!(parse_line(1, r#"{"tokens": [1, 2]}"#), Ok(vec![1, 2]));
        assert!(parse_line(7, r#"{"tokens": "1"}"#).unwrap_err().starts_with("line 7: "));
        assert!(parse_line(8, r#"{"token": [1]}"#).unwrap_err().starts_with("line 8: "));
    }
}
