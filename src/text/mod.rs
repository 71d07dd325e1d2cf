//! Text to tokens and back, by the rules in a model's directory: `tokenizer.json`, the chat template, and the tokens that
//! these and `generation_config.json` name. What comes out is what `transformers` makes of the same files, with one
//! difference: tokens that the tokenizer puts before a text are never doubled.

mod conversation;
mod files;
mod json;
mod python;
mod stream;
mod template;
mod time;

#[cfg(test)]
mod fixture;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

pub use self::conversation::Conversation;
use self::files::Files;
pub use self::stream::{Piece, TextStream};
use self::template::Template;

/// One turn of a conversation.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A model directory's own rules from text to tokens and back.
pub struct Text {
    directory: PathBuf,
    tokenizer: Tokenizer,
    template: Option<Template>,
    /// The tokens named in the configuration, such as `bos_token`, as templates see them.
    names: Map<String, Value>,
    /// Tokens put before a text.
    before: Vec<u32>,
    /// Tokens put after it.
    after: Vec<u32>,
    /// Tokens that are no text.
    special: HashSet<u32>,
    /// Tokens of a byte each, such as `<0xE4>`, where the decoder puts them together.
    bytes: HashSet<u32>,
    stop_tokens: Vec<u32>,
}

impl Text {
    /// Reads a model directory's files; all but `tokenizer.json` may be missing.
    ///
    /// # Errors
    /// There is no tokenizer, or a file cannot be understood; the file is named.
    pub fn open(directory: &Path) -> Result<Text> {
        match Text::find(directory)? {
            Some(text) => Ok(text),
            None => bail!(
                "no tokenizer: expected the file {}; take a directory that has one, or, where the command has it, give prompts as token ids with --tokens",
                directory.join(files::TOKENIZER).display()
            ),
        }
    }

    /// Like [`Text::open`], but none where the directory has no tokenizer.
    ///
    /// # Errors
    /// A file cannot be read or understood; it is named.
    pub fn find(directory: &Path) -> Result<Option<Text>> {
        let Some(files) = Files::read(directory)? else { return Ok(None) };
        let path = directory.join(files::TOKENIZER);
        let tokenizer = || -> tokenizers::Result<Tokenizer> {
            let mut tokenizer = Tokenizer::from_bytes(&files.tokenizer)?;
            // Limits for training batches, which would silently cut a prompt short.
            tokenizer.with_truncation(None)?;
            tokenizer.with_padding(None);
            Ok(tokenizer)
        };
        let mut tokenizer = tokenizer().map_err(|e| anyhow!("{}: not a tokenizer: {e}", path.display()))?;
        let names = files.token_names();
        let (described, further) = files.added_tokens()?;
        let cannot =
            |e| anyhow!("{}: cannot add its special tokens: {e}", directory.join(files::TOKENIZER_CONFIG).display());
        tokenizer.add_tokens(described).map_err(cannot)?;
        let known = tokenizer.get_added_tokens_decoder();
        let special = |token: &String| known.values().any(|added| added.special && added.content == *token);
        let named = names.values().filter_map(|name| name.as_str().map(str::to_owned)).chain(further);
        let named: Vec<AddedToken> = named
            .filter(|token| tokenizer.token_to_id(token).is_some() && !special(token))
            .map(|token| AddedToken::from(token, true))
            .collect();
        tokenizer.add_special_tokens(named).map_err(cannot)?;
        let decoder = tokenizer.get_added_tokens_decoder();
        let mut text = Text {
            directory: directory.to_owned(),
            template: Template::find(directory, &files)?,
            before: vec![],
            after: vec![],
            special: decoder.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect(),
            stop_tokens: files.stop_tokens()?,
            bytes: bytes(&tokenizer),
            tokenizer,
            names,
        };
        (text.before, text.after) = text.added()?;
        Ok(Some(text))
    }

    /// The tokens before and after a text: those of the tokenizer's post-processor. What `tokenizer_config.json` says about
    /// them does not count, as in `transformers` 5.
    fn added(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let (bare, full) = (self.ids("a", false)?, self.ids("a", true)?);
        let start = full.windows(bare.len().max(1)).position(|window| window == bare).unwrap_or(0);
        let end = (start + bare.len()).min(full.len());
        Ok((full[..start].to_vec(), full[end..].to_vec()))
    }

    fn ids(&self, text: &str, added: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, added);
        let encoding = encoding
            .map_err(|e| anyhow!("{}: cannot encode the text: {e}", self.directory.join(files::TOKENIZER).display()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The directory it was read from.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Tokens of a text, with those that the tokenizer puts before and after it. Where the text itself begins with the
    /// former, spelled out, they are not doubled.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let plain = self.encode_plain(text)?;
        let before = if plain.starts_with(&self.before) { &[][..] } else { &self.before };
        Ok([before, &plain, &self.after].concat())
    }

    /// Tokens of a text alone. A special token that is spelled out in the text is that token all the same.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    /// The tokens that [`Text::encode`] puts before a text: the beginning-of-sequence token, or none.
    pub fn before(&self) -> &[u32] {
        &self.before
    }

    /// Tokens of a conversation, up to where the assistant's answer begins. They are those of the rendered template and no
    /// others: a template writes the beginning-of-sequence token itself where the model wants one.
    ///
    /// # Errors
    /// Those of [`Text::render`].
    pub fn chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode_plain(&self.render(messages, true)?)
    }

    /// A conversation as the template writes it.
    ///
    /// # Errors
    /// The directory has no template, or it is faulty or refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages = serde_json::to_value(messages).context("messages")?;
        self.render_with(messages, Map::from_iter([("add_generation_prompt".to_owned(), json!(add_generation_prompt))]))
    }

    /// A conversation of messages of any form, and what else the template may ask for, such as `tools`.
    ///
    /// # Errors
    /// Those of [`Text::render`].
    pub fn render_with(&self, messages: Value, variables: Map<String, Value>) -> Result<String> {
        let Some(template) = &self.template else {
            bail!(
                "no chat template: expected {} or `chat_template` in {}; without one, prompts can be given as plain text \
                 or as token ids",
                self.directory.join(files::TEMPLATE).display(),
                self.directory.join(files::TOKENIZER_CONFIG).display()
            );
        };
        let mut all = self.names.clone();
        // `transformers` defines these in any case, and templates compare them with none.
        all.extend([("tools".to_owned(), Value::Null), ("documents".to_owned(), Value::Null)]);
        all.insert("messages".to_owned(), messages);
        all.extend(variables);
        template.render(&all)
    }

    /// True if [`Text::chat`] has a template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Text of tokens, special tokens left out. Bytes that are no character become U+FFFD.
    ///
    /// # Errors
    /// The tokenizer's decoder failed.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        // Some decoders expect a token.
        if tokens.iter().all(|&token| self.is_special(token)) {
            return Ok(String::new());
        }
        let decoded = self.tokenizer.decode(tokens, true);
        decoded.map_err(|e| anyhow!("{}: cannot decode: {e}", self.directory.join(files::TOKENIZER).display()))
    }

    /// The tokens that end an answer, by `generation_config.json`; empty where it does not say, and a plan's own are used.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Number of ids: the largest, and one. A model's vocabulary may be larger.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// A stream of new tokens to text, which ends at the first of the `stops` that is complete.
    pub fn stream(&self, stops: &[String]) -> TextStream<'_> {
        TextStream::new(self, stops)
    }

    fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// Whether a token stands for a byte, and the text of a run of such tokens is known only at its end: it is no text at all
    /// if any of it is no character.
    fn is_byte(&self, token: u32) -> bool {
        self.bytes.contains(&token)
    }
}

/// Ids of the byte tokens of a tokenizer that falls back on them.
fn bytes(tokenizer: &Tokenizer) -> HashSet<u32> {
    // A decoder may be within others.
    let decoder = tokenizer.get_decoder().and_then(|decoder| serde_json::to_string(decoder).ok());
    if !decoder.is_some_and(|decoder| decoder.contains("\"ByteFallback\"")) {
        return HashSet::new();
    }
    (0..=u8::MAX).filter_map(|byte| tokenizer.token_to_id(&format!("<0x{byte:02X}>"))).collect()
}

#[cfg(test)]
mod tests {
    use super::fixture::{self, bpe, write};
    use super::*;

    #[test]
    fn a_directory_without_a_tokenizer_names_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Text::find(folder.path()).expect("no fault").is_none());
        let error = Text::open(folder.path()).err().expect("no tokenizer").to_string();
        assert!(error.contains("tokenizer.json") && error.contains("token ids"), "{error}");
        write(folder.path(), "tokenizer.json", "{}");
        let error = Text::open(folder.path()).err().expect("no tokenizer").to_string();
        assert!(error.contains("tokenizer.json: not a tokenizer"), "{error}");
    }

    #[test]
    fn the_first_token_is_never_doubled() {
        let (_folder, text) = fixture::open(&[]);
        assert_eq!(text.before(), [1]);
        let hi = text.encode_plain("hi").expect("text");
        assert_eq!(hi, bpe("hi"));
        assert_eq!(text.encode("hi").expect("text"), [&[1], &hi[..]].concat());
        assert_eq!(text.encode("<s>hi").expect("text"), [&[1], &hi[..]].concat());
        assert_eq!(text.encode("<s><s>hi").expect("text"), [&[1, 1], &hi[..]].concat(), "what is written stays");
        assert_eq!(text.encode("").expect("text"), [1]);
        assert_eq!(text.encode_plain("").expect("text"), [0u32; 0]);
    }

    #[test]
    fn special_tokens_are_no_text() {
        let (_folder, text) = fixture::open(&[]);
        let tokens = [&[1][..], &bpe("h"), &[2], &bpe("i")].concat();
        assert_eq!(text.decode(&tokens).expect("text"), "hi");
        assert_eq!(text.decode(&[]).expect("text"), "");
    }

    #[test]
    fn the_configuration_says_which_tokens_are_special_too() {
        let config = r#"{"added_tokens_decoder": {
            "260": {"content": "<two>", "special": false},
            "259": {"content": "<one>", "special": true, "lstrip": true},
            "100": {"content": "a", "special": true}}, "extra_special_tokens": {"image": "b"}, "additional_special_tokens": ["c", 1]}"#;
        let (_folder, text) = fixture::open(&[("tokenizer_config.json", config)]);
        assert_eq!(text.encode_plain("x <one><two>").expect("text"), [&bpe("x")[..], &[259, 260]].concat());
        assert_eq!(text.decode(&[&[259, 260][..], &bpe("abcd")].concat()).expect("text"), "<two>d");
        let bad = [("tokenizer_config.json", r#"{"added_tokens_decoder": {"7": {"special": true}}}"#)];
        let error = format!("{:#}", Text::open(fixture::folder(&bad).path()).err().expect("no content"));
        assert!(error.contains("tokenizer_config.json: added_tokens_decoder: 7: missing field `content`"), "{error}");
    }

    #[test]
    fn no_template_is_an_error_that_names_both_places() {
        let (_folder, text) = fixture::open(&[]);
        assert!(!text.has_chat_template());
        let error = text.chat(&[Message::new("user", "hi")]).expect_err("no template").to_string();
        assert!(error.contains("chat_template.jinja") && error.contains("tokenizer_config.json"), "{error}");
    }

    #[test]
    fn a_template_writes_the_first_token_itself() {
        let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant:{% endif %}";
        let files = [("chat_template.jinja", template), ("special_tokens_map.json", r#"{"bos_token": "<s>"}"#)];
        let (_folder, text) = fixture::open(&files);
        let messages = [Message::new("user", "hi")];
        assert_eq!(text.render(&messages, false).expect("text"), "<s>user:hi\n");
        assert_eq!(text.chat(&messages).expect("text"), [&[1], &bpe("user:hi\nassistant:")[..]].concat());
    }

    #[test]
    fn stop_tokens_are_a_number_or_a_list() {
        for (config, stops) in [
            (r#"{"eos_token_id": 2}"#, &[2][..]),
            (r#"{"eos_token_id": [2, 1]}"#, &[2, 1]),
            (r#"{"eos_token_id": null}"#, &[]),
            ("{}", &[]),
        ] {
            let (_folder, text) = fixture::open(&[("generation_config.json", config)]);
            assert_eq!(text.stop_tokens(), stops, "{config}");
        }
        let folder = fixture::folder(&[("generation_config.json", r#"{"eos_token_id": "two"}"#)]);
        let error = Text::open(folder.path()).err().expect("no number").to_string();
        assert!(error.contains("generation_config.json") && error.contains("eos_token_id"), "{error}");
    }
}
