//! What a run is given: `--tokens`, or the recipe's own prompt.

use anyhow::Result;

use crate::cli::usage;
use crate::plan::Manifest;

/// The prompts of a run, in order.
pub fn prompts(tokens: &[String], manifest: &Manifest) -> Result<Vec<Vec<u32>>> {
    if !tokens.is_empty() {
        return tokens.iter().map(|text| parse_tokens(text)).collect();
    }
    if manifest.model.prompt.is_empty() {
        return usage(
            "nothing to run: expected --tokens 5,17,3 or --input FILE.jsonl, because the recipe has no prompt",
        );
    }
    Ok(vec![manifest.model.prompt.clone()])
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
}
