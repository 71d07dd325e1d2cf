//! Recipes: what to compile, in RON. `plans/` holds some.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::ir::config::{Config, RawConfig};
use crate::plan::WeightSource;

/// What to compile, with the recipe's own choices; a command line option overrides each.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model's name.
    pub name: String,
    /// Its description.
    pub model: ModelSource,
    /// Its weights.
    pub weights: WeightSource,
    /// Used when a run is given no input.
    #[serde(default, skip_serializing_if = "Prompt::is_empty")]
    pub prompt: Prompt,
    /// Element type of activations: `f32`, `bf16` or `f16`.
    #[serde(default)]
    pub dtype: Option<String>,
    /// Rows of the prefill buckets.
    #[serde(default)]
    pub prefill: Option<Vec<u64>>,
    /// Sequences of the decode buckets.
    #[serde(default)]
    pub decode: Option<Vec<u64>>,
    /// Sequence slots.
    #[serde(default)]
    pub max_sequences: Option<u64>,
    /// Positions of one sequence.
    #[serde(default)]
    pub max_context: Option<u64>,
    /// Positions of all sequences together.
    #[serde(default)]
    pub kv_tokens: Option<u64>,
}

/// A recipe's own prompt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected token ids such as [5, 17, 3], or a text in quotes")]
pub enum Prompt {
    /// Token ids, which any plan can run.
    Tokens(Vec<u32>),
    /// A text: the tokenizer of the model's directory makes tokens of it when it runs.
    Text(String),
}

impl Default for Prompt {
    fn default() -> Self {
        Prompt::Tokens(vec![])
    }
}

impl Prompt {
    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        match self {
            Prompt::Tokens(tokens) => tokens.is_empty(),
            Prompt::Text(text) => text.is_empty(),
        }
    }

    /// The token ids, if it is that.
    pub fn tokens(&self) -> &[u32] {
        match self {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(_) => &[],
        }
    }
}

/// Where the model's description is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ModelSource {
    /// Here, with the field names of `config.json`.
    Config(Box<RawConfig>),
    /// In a Hugging Face directory; a relative path starts at the recipe.
    Directory(PathBuf),
}

impl Recipe {
    /// Reads a recipe's text.
    ///
    /// # Errors
    /// No RON of this form, with line and column; or fields that a recipe does not have. Unlike `config.json`, which carries
    /// much that does not matter here, a recipe is written by hand: what is not known in it is a slip.
    pub fn parse(text: &str) -> Result<Recipe> {
        let options = ron::Options::default()
            .with_default_extension(ron::extensions::Extensions::IMPLICIT_SOME)
            .with_recursion_limit(32);
        let at = |e: ron::error::SpannedError| anyhow::anyhow!("line {}: {}", e.span.start, e.code);
        let mut deserializer = ron::Deserializer::from_str_with_options(text, &options).map_err(at)?;
        let mut unknown = vec![];
        let recipe = serde_ignored::deserialize(&mut deserializer, |path| unknown.push(path.to_string()))
            .and_then(|recipe| deserializer.end().map(|()| recipe))
            .map_err(|e| at(deserializer.span_error(e)))?;
        if !unknown.is_empty() {
            bail!("unknown fields: {}; a model's fields are those of its config.json", unknown.join(", "));
        }
        Ok(recipe)
    }

    /// Reads a recipe file; a relative model directory is resolved against the file's own.
    ///
    /// # Errors
    /// The file cannot be read or is no recipe.
    pub fn read(path: &Path) -> Result<Recipe> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the recipe {}", path.display()))?;
        let mut recipe = Recipe::parse(&text).with_context(|| format!("{} is not a recipe", path.display()))?;
        if let ModelSource::Directory(directory) = &mut recipe.model
            && directory.is_relative()
        {
            *directory = path.parent().unwrap_or(Path::new("")).join(&*directory);
        }
        Ok(recipe)
    }

    /// The recipe that compiling a directory without one stands for.
    pub fn for_directory(directory: &Path) -> Recipe {
        let resolved = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        let name = resolved.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
        Recipe {
            name,
            model: ModelSource::Directory(directory.to_owned()),
            weights: WeightSource::Checkpoint,
            prompt: Prompt::default(),
            dtype: None,
            prefill: None,
            decode: None,
            max_sequences: None,
            max_context: None,
            kv_tokens: None,
        }
    }

    /// The checkpoint directory it names.
    pub fn directory(&self) -> Option<&Path> {
        match &self.model {
            ModelSource::Config(_) => None,
            ModelSource::Directory(directory) => Some(directory),
        }
    }

    /// The model's description.
    ///
    /// # Errors
    /// `config.json` cannot be read, or the description is not usable.
    pub fn config(&self) -> Result<Config> {
        match &self.model {
            ModelSource::Config(raw) => Ok(Config::resolve(raw)?),
            ModelSource::Directory(directory) => read_config(directory),
        }
    }

    /// Its text, as kept in a plan.
    ///
    /// # Errors
    /// None that a recipe which was read can cause.
    pub fn to_text(&self) -> Result<String> {
        Ok(ron::ser::to_string_pretty(self, ron::ser::PrettyConfig::new().depth_limit(3))?)
    }
}

/// Reads `config.json` of a Hugging Face directory.
///
/// # Errors
/// The file is missing or not usable.
pub fn read_config(directory: &Path) -> Result<Config> {
    let path = directory.join("config.json");
    if !directory.is_dir() {
        bail!("{} is not a directory: expected a Hugging Face model directory", directory.display());
    }
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: expected a Hugging Face model directory", path.display()))?;
    Config::from_json(&text).with_context(|| format!("in {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: &str = include_str!("../../plans/synthetic.ron");

    #[test]
    fn a_slip_in_a_field_is_named() {
        assert!(Recipe::parse(DEMO).is_ok());
        let slip = DEMO.replace("norm_topk_prob", "norm_topk_probs");
        let error = Recipe::parse(&slip).expect_err("no such field").to_string();
        assert!(error.contains("norm_topk_probs"), "{error}");
        let error = Recipe::parse(&DEMO.replace("prefill:", "prefills:")).expect_err("no such field").to_string();
        assert!(error.contains("prefills") && error.starts_with("line "), "{error}");
        assert!(Recipe::parse(&format!("{DEMO} rest")).is_err(), "text behind the recipe");
    }

    #[test]
    fn a_prompt_is_token_ids_or_a_text() {
        let of = |prompt: &str| {
            let text = format!("Recipe(name: \"x\", model: Directory(\"x\"), weights: Checkpoint, prompt: {prompt})");
            Recipe::parse(&text).map(|recipe| recipe.prompt)
        };
        assert_eq!(of("[3, 4]").expect("token ids"), Prompt::Tokens(vec![3, 4]));
        assert_eq!(of("\"Once upon\"").expect("a text"), Prompt::Text("Once upon".into()));
        let error = of("5").expect_err("neither").to_string();
        assert!(error.contains("[5, 17, 3], or a text"), "{error}");
        let recipe = Recipe { prompt: Prompt::Text("a \"b\"\n".into()), ..Recipe::for_directory(Path::new("x")) };
        assert_eq!(Recipe::parse(&recipe.to_text().expect("text")).expect("a recipe"), recipe);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let recipe = Recipe::parse(DEMO).expect("the demo is a recipe");
        let text = recipe.to_text().expect("it can be written");
        assert_eq!(Recipe::parse(&text).expect("it can be read"), recipe);
    }
}
