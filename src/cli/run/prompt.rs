//! What a run without `--input` is given: `--tokens`, `--prompt`, or the recipe's own prompt.

use std::path::Path;

use anyhow::Result;

use crate::cli::text::{self, Wording};
use crate::cli::usage;
use crate::codegen::{Prompt, Recipe};
use crate::plan::PlanFile;
use crate::text::Text;

/// Options for prompts that are text.
#[derive(clap::Args, Debug)]
pub struct PromptArguments {
    /// Text of a prompt, or - for standard input, which is taken whole, its last newline too; repeat it for a batch
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["tokens", "input"], allow_hyphen_values = true)]
    prompt: Vec<String>,
    #[command(flatten)]
    pub wording: Wording,
    /// Ends a sequence where its text has TEXT, which is not printed; may be repeated. Needs a tokenizer
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}

/// The prompts of a run, in order.
pub struct Prompts {
    /// Token ids of each.
    pub tokens: Vec<Vec<u32>>,
    /// True if they were text, and so is what is printed.
    pub text: bool,
    /// The rules of text, where the model has some.
    pub rules: Option<Text>,
}

impl PromptArguments {
    /// Refuses options that no plan could follow.
    pub fn check(&self) -> Result<()> {
        if self.stop.iter().any(String::is_empty) {
            return usage("--stop: expected a text, found none");
        }
        if self.prompt.iter().filter(|prompt| *prompt == "-").count() > 1 {
            return usage("--prompt -: expected once, because standard input is read to its end");
        }
        Ok(())
    }

    /// The first of the options for text that is given, by name.
    pub fn given(&self) -> Option<&'static str> {
        self.wording.given().or((!self.stop.is_empty()).then_some("--stop"))
    }

    /// The prompts: those given as token ids or as text, else the recipe's own.
    pub fn prompts(&self, tokens: &[String], file: &PlanFile, model: Option<&Path>) -> Result<Prompts> {
        if !tokens.is_empty() {
            let tokens = tokens.iter().map(|text| parse_tokens(text)).collect::<Result<_>>()?;
            return self.of_tokens(tokens, file, model);
        }
        if !self.prompt.is_empty() {
            return self.of_texts(&self.prompt, true, file, model);
        }
        match Recipe::parse(&file.recipe).map(|recipe| recipe.prompt).unwrap_or_default() {
            Prompt::Text(text) if !text.is_empty() => self.of_texts(&[text], false, file, model),
            _ if file.manifest.model.prompt.is_empty() => usage(
                "nothing to run: expected --prompt TEXT, --tokens 5,17,3 or --input FILE.jsonl, because the recipe has no \
                 prompt",
            ),
            _ => self.of_tokens(vec![file.manifest.model.prompt.clone()], file, model),
        }
    }

    fn of_tokens(&self, tokens: Vec<Vec<u32>>, file: &PlanFile, model: Option<&Path>) -> Result<Prompts> {
        if let Some(option) = self.wording.given() {
            return usage(format!("{option}: expected a prompt as text, found token ids"));
        }
        let rules = if self.stop.is_empty() { text::find(file, model) } else { Some(text::open(file, model)?) };
        Ok(Prompts { tokens, text: false, rules })
    }

    fn of_texts(&self, texts: &[String], stdin: bool, file: &PlanFile, model: Option<&Path>) -> Result<Prompts> {
        let rules = text::open(file, model)?;
        let encode = |prompt: &String| {
            if stdin && prompt == "-" {
                return self.wording.encode(&rules, &text::read(Path::new("-"))?);
            }
            self.wording.encode(&rules, prompt)
        };
        let tokens = texts.iter().map(encode).collect::<Result<_>>()?;
        Ok(Prompts { tokens, text: true, rules: Some(rules) })
    }
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
