//! A line of a batch file: what it may say, and the request that it makes.

use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::runtime::{Request, SamplingParams};

/// What a line may leave out: the command line's settings.
#[derive(Clone, PartialEq, Debug)]
pub struct Defaults {
    /// New tokens at the most.
    pub max_new_tokens: usize,
    /// How tokens are chosen; a line's seed is this one and the line's place.
    pub sampling: SamplingParams,
    /// Whether end-of-sequence tokens end nothing.
    pub ignore_eos: bool,
}

/// What a line asks for. Its id is the line's place among those that are not blank.
#[derive(PartialEq, Debug)]
pub struct Asked {
    /// The line's own name for it, any JSON.
    pub id: Option<Value>,
    /// The request, whose id is 0.
    pub request: Request,
}

/// Why a line cannot run.
#[derive(PartialEq, Debug)]
pub struct Fault {
    /// The line's own name for it, where that can be read.
    pub id: Option<Value>,
    /// What is wrong, with the number of the line.
    pub what: String,
}

/// Makes requests of lines.
pub struct Reader {
    /// What lines may leave out.
    pub defaults: Defaults,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default, deserialize_with = "present")]
    id: Option<Value>,
    tokens: Option<Vec<u32>>,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    seed: Option<u64>,
    ignore_eos: Option<bool>,
}

/// A value that is there, be it `null`.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl Reader {
    /// What a line asks for. `number` counts all lines of the file from 1, `place` those that are not blank from 0.
    ///
    /// # Errors
    /// It is no such line.
    pub fn read(&self, number: usize, place: usize, bytes: &[u8]) -> Result<Asked, Fault> {
        let line = parse(bytes).map_err(|fault| {
            let id = serde_json::from_slice::<Value>(bytes).ok().and_then(|value| value.get("id").cloned());
            Fault { id, what: format!("line {number}{fault}") }
        })?;
        match self.request(&line, place) {
            Ok(request) => Ok(Asked { id: line.id, request }),
            Err(what) => Err(Fault { id: line.id, what: format!("line {number}: {what}") }),
        }
    }

    fn request(&self, line: &Line, place: usize) -> Result<Request, String> {
        let default = &self.defaults.sampling;
        let sampling = SamplingParams {
            temperature: line.temperature.unwrap_or(default.temperature),
            top_k: line.top_k.unwrap_or(default.top_k),
            top_p: line.top_p.unwrap_or(default.top_p),
            min_p: line.min_p.unwrap_or(default.min_p),
            seed: line.seed.unwrap_or(default.seed.wrapping_add(place as u64)),
        };
        check_sampling(&sampling)?;
        let prompt = match &line.tokens {
            Some(tokens) => tokens.clone(),
            None => return Err("expected `tokens`, found nothing to run".to_owned()),
        };
        let ignore_eos = line.ignore_eos.unwrap_or(self.defaults.ignore_eos);
        Ok(Request {
            id: 0,
            prompt,
            max_new_tokens: line.max_new_tokens.unwrap_or(self.defaults.max_new_tokens),
            eos: if ignore_eos { vec![] } else { self.eos.clone() },
            sampling,
            session: None,
        })
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

fn check_sampling(sampling: &SamplingParams) -> Result<(), String> {
    let &SamplingParams { temperature, top_p, min_p, .. } = sampling;
    if !(temperature.is_finite() && temperature >= 0.0) {
        return Err(format!("temperature: expected a number of at least 0, found {temperature}"));
    }
    for (name, found) in [("top_p", top_p), ("min_p", min_p)] {
        if !(0.0..=1.0).contains(&found) {
            return Err(format!("{name}: expected a number from 0 to 1, found {found}"));
        }
    }
    Ok(())
}

/// Names of requests: equal for the same line at the same place, with the same settings and plan, and else different.
pub struct Keys(blake3::Hasher);

impl Keys {
    /// For a plan, and the settings that lines may leave out.
    pub fn new(plan: &str, defaults: &Defaults) -> Keys {
        let Defaults { max_new_tokens, sampling, ignore_eos } = defaults;
        let settings = json!({
            "plan": plan,
            "max_new_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": sampling.seed,
            "ignore_eos": ignore_eos,
        });
        Keys(blake3::Hasher::new().update(settings.to_string().as_bytes()).update(&[0]).clone())
    }

    /// The name of a line's request: 16 hexadecimal digits.
    pub fn key(&self, place: usize, line: &[u8]) -> String {
        let mut hasher = self.0.clone();
        hasher.update(&(place as u64).to_le_bytes()).update(line);
        hasher.finalize().as_bytes()[..8].iter().fold(String::new(), |mut key, byte| {
            let _ = write!(key, "{byte:02x}");
            key
        })
    }
}

#[cfg(test)]
mod tests;
