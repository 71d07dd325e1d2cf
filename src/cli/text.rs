//! The text rules of a plan's model: where they are, and how options of a command apply them.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cli::output::{describe, note};
use crate::cli::usage;
use crate::codegen::Recipe;
use crate::plan::PlanFile;
use crate::text::{Message, Text};

/// How a prompt becomes tokens.
#[derive(clap::Args, Clone, Default, PartialEq, Debug)]
pub struct Wording {
    /// Puts a prompt into the model's chat template, as the user's words
    #[arg(long, conflicts_with = "tokens")]
    pub chat: bool,
    /// What the system says before the user does; implies --chat
    #[arg(long, value_name = "TEXT", conflicts_with = "tokens", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Takes a prompt as it is: no token before or after it, and no template
    #[arg(long, conflicts_with_all = ["chat", "system", "tokens"])]
    pub raw: bool,
}

impl Wording {
    /// The tokens of a prompt.
    pub fn encode(&self, rules: &Text, prompt: &str) -> Result<Vec<u32>> {
        if self.raw {
            return rules.encode_plain(prompt);
        }
        if !self.chat && self.system.is_none() {
            return rules.encode(prompt);
        }
        let system = self.system.iter().map(|system| Message::new("system", system));
        rules.chat(&system.chain([Message::new("user", prompt)]).collect::<Vec<_>>())
    }

    /// The first of these options that is given, by name.
    pub fn given(&self) -> Option<&'static str> {
        let options = [("--chat", self.chat), ("--system", self.system.is_some()), ("--raw", self.raw)];
        options.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

/// Where a plan's rules are: the directory that is named, else that of its recipe.
pub fn directory(file: &PlanFile, model: Option<&Path>) -> Option<PathBuf> {
    let of_recipe = || Recipe::parse(&file.recipe).ok()?.directory().map(Path::to_owned);
    model.map(Path::to_owned).or_else(of_recipe)
}

/// The rules for a command that cannot do without.
pub fn open(file: &PlanFile, model: Option<&Path>) -> Result<Text> {
    match directory(file, model) {
        Some(directory) => Text::open(&directory),
        None => usage(
            "text needs a tokenizer: expected the model's directory, found none; name it with --model DIR, or, where the command has it, give \
             the prompt as token ids with --tokens",
        ),
    }
}

/// The rules if there are any. Whoever has token ids can do without, so that a fault in them is only told.
pub fn find(file: &PlanFile, model: Option<&Path>) -> Option<Text> {
    let found = Text::find(&directory(file, model)?);
    found.unwrap_or_else(|error| {
        note(format_args!("lfm2c: no text, only tokens: {}", describe(&error)));
        None
    })
}

/// The tokens that end a sequence: those of `generation_config.json`, else the plan's.
pub fn stop_tokens(file: &PlanFile, rules: Option<&Text>) -> Vec<u32> {
    match rules.map(Text::stop_tokens) {
        Some(stops) if !stops.is_empty() => stops.to_vec(),
        _ => file.manifest.model.eos_tokens.clone(),
    }
}

/// The text of a file, or of standard input for `-`, exactly as it is.
pub fn read(path: &Path) -> Result<String> {
    let (name, bytes) = if path == Path::new("-") {
        let mut bytes = vec![];
        std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read standard input")?;
        ("standard input".to_owned(), bytes)
    } else {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        (path.display().to_string(), bytes)
    };
    utf8(&name, bytes)
}

/// Bytes as text.
fn utf8(name: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).or_else(|error| {
        let at = error.utf8_error().valid_up_to();
        bail!("{name}: expected UTF-8, found 0x{:02x} at byte {}", error.as_bytes()[at], at + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_is_no_text_is_named() {
        assert_eq!(utf8("x", "é\r\n".into()).expect("text"), "é\r\n");
        for (bytes, message) in [
            (&b"ab\xffc"[..], "x: expected UTF-8, found 0xff at byte 3"),
            (b"\xe4\xbd", "x: expected UTF-8, found 0xe4 at byte 1"),
        ] {
            assert_eq!(utf8("x", bytes.to_vec()).expect_err("no text").to_string(), message);
        }
    }
}
