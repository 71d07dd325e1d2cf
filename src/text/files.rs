//! The files of a model directory that are about text.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

/// The tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// Names of special tokens, and maybe a template.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// A template, which goes before the one in the configuration.
pub const TEMPLATE: &str = "chat_template.jinja";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const GENERATION: &str = "generation_config.json";

/// What the files say; those that are missing say nothing.
pub struct Files {
    directory: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`.
    pub config: Map<String, Value>,
    special_tokens: Map<String, Value>,
    generation: Map<String, Value>,
}

/// A token as `tokenizer_config.json` describes it.
#[derive(Deserialize)]
struct Described {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Described {
    fn token(&self) -> AddedToken {
        AddedToken::from(&self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

impl Files {
    /// Reads them; none where there is no tokenizer.
    pub fn read(directory: &Path) -> Result<Option<Files>> {
        let Some(tokenizer) = read(&directory.join(TOKENIZER))? else { return Ok(None) };
        Ok(Some(Files {
            directory: directory.to_owned(),
            tokenizer,
            config: object(&directory.join(TOKENIZER_CONFIG))?,
            special_tokens: object(&directory.join(SPECIAL_TOKENS))?,
            generation: object(&directory.join(GENERATION))?,
        }))
    }

    /// `bos_token` and all others that are named, as text. A token is a string or an object with its `content`.
    pub fn token_names(&self) -> Map<String, Value> {
        let both = self.special_tokens.iter().chain(&self.config);
        let named = both.filter(|(key, _)| key.ends_with("_token"));
        let text = named.filter_map(|(key, value)| {
            let content = value.get("content").unwrap_or(value).as_str()?;
            Some((key.clone(), Value::from(content)))
        });
        text.collect()
    }

    /// Tokens that `tokenizer_config.json` adds to those of the tokenizer, or describes differently: `added_tokens_decoder` in
    /// the order of ids. And the texts that it says are special tokens besides those with a name of their own.
    pub fn added_tokens(&self) -> Result<(Vec<AddedToken>, Vec<String>)> {
        let mut described = vec![];
        let decoder = self.config.get("added_tokens_decoder").and_then(Value::as_object);
        for (id, token) in decoder.into_iter().flatten() {
            let place = || format!("{}: added_tokens_decoder: {id}", self.directory.join(TOKENIZER_CONFIG).display());
            let number: u32 = id.parse().with_context(place)?;
            described.push((number, Described::deserialize(token).with_context(place)?.token()));
        }
        described.sort_by_key(|(id, _)| *id);
        let further = ["extra_special_tokens", "additional_special_tokens"];
        let further = further.iter().filter_map(|key| self.config.get(*key)).flat_map(|tokens| match tokens {
            Value::Array(tokens) => tokens.iter().collect(),
            Value::Object(tokens) => tokens.values().collect(),
            _ => vec![],
        });
        let text = |token: &Value| Some(token.get("content").unwrap_or(token).as_str()?.to_owned());
        Ok((described.into_iter().map(|(_, token)| token).collect(), further.filter_map(text).collect()))
    }

    /// `eos_token_id` of `generation_config.json`: a number, or a list of them.
    pub fn stop_tokens(&self) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let found = match self.generation.get("eos_token_id") {
            None | Some(Value::Null) => return Ok(vec![]),
            Some(found) => found,
        };
        let ids = match found {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        match ids {
            Some(ids) => Ok(ids),
            None => bail!(
                "{}: eos_token_id: expected a token id or a list of them, found {found}",
                self.directory.join(GENERATION).display()
            ),
        }
    }
}

/// A file's bytes; none if there is no such file.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn object(path: &Path) -> Result<Map<String, Value>> {
    let Some(bytes) = read(path)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes).with_context(|| format!("{}: expected a JSON object", path.display()))
}
