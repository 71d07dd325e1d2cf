//! A line of a batch file: what it may say, and the request that it makes.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::cli::output::describe;
use crate::cli::text::Wording;
use crate::runtime::{Request, SamplingParams};
use crate::text::{Message, Text};

/// What a line may leave out: the command line's settings.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Defaults {
    /// New tokens at the most.
    pub max_new_tokens: usize,
    /// How tokens are chosen; a line's seed is this one and the line's place.
    pub sampling: SamplingParams,
    /// Whether end-of-sequence tokens end nothing.
    pub ignore_eos: bool,
    /// Texts that end a sequence.
    pub stop: Vec<String>,
    /// How a prompt becomes tokens.
    pub wording: Wording,
}

/// What a line asks for.
#[derive(PartialEq, Debug)]
pub struct Asked {
    /// The line's own name for it, any JSON, as it is written there: no number is rounded.
    pub id: Option<String>,
    /// The request, whose id is 0.
    pub request: Request,
    /// Texts that end it.
    pub stop: Vec<String>,
}

/// Why a line cannot run.
#[derive(PartialEq, Debug)]
pub struct Fault {
    /// The line's own name for it, where that can be read.
    pub id: Option<String>,
    /// What is wrong, with the number of the line.
    pub what: String,
}

/// Makes requests of lines.
pub struct Reader<'t> {
    /// What lines may leave out.
    pub defaults: Defaults,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// The rules from text to tokens, or why there are none.
    pub text: Result<&'t Text, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default, deserialize_with = "present")]
    id: Option<String>,
    tokens: Option<Vec<u32>>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    seed: Option<u64>,
    stop: Option<Value>,
    ignore_eos: Option<bool>,
}

/// What is read of a line that is wrong.
#[derive(Deserialize)]
struct Named {
    #[serde(default, deserialize_with = "present")]
    id: Option<String>,
}

/// The text of a value that is there, be it `null`, in one line for every reader.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(|value| Some(value.get().replace('\r', " ")))
}

impl Reader<'_> {
    /// What a line asks for. `number` counts all lines of the file from 1, `place` those that are not blank from 0.
    ///
    /// # Errors
    /// It is no such line.
    pub fn read(&self, number: usize, place: usize, bytes: &[u8]) -> Result<Asked, Fault> {
        let line = parse(bytes).map_err(|fault| {
            // A list would be taken for a name's fields, by position.
            let named = bytes.starts_with(b"{").then(|| serde_json::from_slice::<Named>(bytes).ok());
            let id = named.flatten().and_then(|named| named.id);
            Fault { id, what: format!("line {number}{fault}") }
        })?;
        match self.ask(&line, place) {
            Ok((request, stop)) => Ok(Asked { id: line.id, request, stop }),
            Err(what) => Err(Fault { id: line.id, what: format!("line {number}: {what}") }),
        }
    }

    fn ask(&self, line: &Line, place: usize) -> Result<(Request, Vec<String>), String> {
        let default = &self.defaults.sampling;
        let sampling = SamplingParams {
            temperature: line.temperature.unwrap_or(default.temperature),
            top_k: line.top_k.unwrap_or(default.top_k),
            top_p: line.top_p.unwrap_or(default.top_p),
            min_p: line.min_p.unwrap_or(default.min_p),
            seed: line.seed.unwrap_or(default.seed.wrapping_add(place as u64)),
        };
        if let Some((name, expected, found)) = sampling.fault() {
            return Err(format!("{}: expected a number {expected}, found {found}", name.replace('-', "_")));
        }
        let prompt = self.prompt(line)?;
        let stop = self.stop(line)?;
        let ignore_eos = line.ignore_eos.unwrap_or(self.defaults.ignore_eos);
        let request = Request {
            id: 0,
            prompt,
            max_new_tokens: line.max_new_tokens.unwrap_or(self.defaults.max_new_tokens),
            eos: if ignore_eos { vec![] } else { self.eos.clone() },
            sampling,
            session: None,
        };
        Ok((request, stop))
    }

    /// The prompt's tokens.
    fn prompt(&self, line: &Line) -> Result<Vec<u32>, String> {
        match (&line.tokens, &line.prompt, &line.messages) {
            (Some(tokens), None, None) => Ok(tokens.clone()),
            (None, Some(prompt), None) => self
                .defaults
                .wording
                .encode(self.text("prompt")?, prompt)
                .map_err(|e| format!("prompt: {}", describe(&e))),
            (None, None, Some(messages)) if messages.is_empty() => {
                Err("messages: expected at least 1 message, found 0".to_owned())
            }
            (None, None, Some(messages)) => {
                self.text("messages")?.chat(messages).map_err(|e| format!("messages: {}", describe(&e)))
            }
            (None, None, None) => Err("expected one of `tokens`, `prompt` and `messages`, found none".to_owned()),
            _ => Err("expected one of `tokens`, `prompt` and `messages`, found more".to_owned()),
        }
    }

    /// The texts that end a line's sequence.
    fn stop(&self, line: &Line) -> Result<Vec<String>, String> {
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let stop = match &line.stop {
            None => return Ok(self.defaults.stop.clone()),
            Some(Value::Array(texts)) => texts.iter().map(text).collect(),
            Some(value) => text(value).map(|text| vec![text]),
        };
        let stop = stop.ok_or_else(|| {
            let found = line.stop.as_ref().map(Value::to_string).unwrap_or_default();
            format!("stop: expected a text or a list of texts, none of them empty, found {found}")
        })?;
        if !stop.is_empty() {
            self.text("stop")?;
        }
        Ok(stop)
    }

    fn text(&self, field: &str) -> Result<&Text, String> {
        self.text.as_ref().copied().map_err(|why| format!("{field}: {why}"))
    }
}

/// A line's fields, or what is wrong, to stand behind the line's number.
fn parse(bytes: &[u8]) -> Result<Line, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        format!(", byte {}: expected UTF-8, found 0x{:02x}", at + 1, bytes[at])
    })?;
    if !text.trim_start().starts_with('{') {
        // What is derived would take a list too, by position.
        let found: String = text.trim().chars().take(20).collect();
        return Err(format!(": expected an object such as {{\"tokens\": [5, 17, 3]}}, found `{found}`"));
    }
    serde_json::from_str(text).map_err(|e| {
        let what = e.to_string();
        let what = what.strip_suffix(&format!(" at line {} column {}", e.line(), e.column())).unwrap_or(&what);
        format!(", column {}: {what}", e.column())
    })
}

/// The name of a request, 16 hexadecimal digits: equal for the same plan, place, line and settings, and else different.
pub fn key(plan: &str, place: usize, line: &[u8], asked: Option<&Asked>) -> String {
    let mut hasher = blake3::Hasher::new();
    // Each part with its length, so that none is taken for another.
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    part(plan.as_bytes());
    part(&(place as u64).to_le_bytes());
    part(line);
    if let Some(Asked { request, stop, .. }) = asked {
        part(bytemuck::cast_slice(&request.prompt));
        part(&(request.max_new_tokens as u64).to_le_bytes());
        part(bytemuck::cast_slice(&request.eos));
        part(bytemuck::cast_slice(&request.sampling.to_row()));
        stop.iter().for_each(|stop| part(stop.as_bytes()));
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests;
