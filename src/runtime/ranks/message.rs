//! What ranks say to each other: JSON, and behind it the bytes of logits.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::plan::SAMPLING_COLUMNS;
use crate::runtime::{FinishReason, Finished, Options, Request, SamplingParams, Statistics};

/// One message.
#[derive(Serialize, Deserialize, PartialEq, Debug)]
pub enum Message {
    /// To rank 0, first of all: who sends it and with what.
    Introduction(Introduction),
    /// From rank 0: loads the weights of a plan, by its place among those that were agreed on.
    Load(usize),
    /// To rank 0: they are loaded.
    Ready,
    /// From rank 0: requests follow, to be run like this.
    Round(Wanted),
    /// From rank 0: a request.
    Job(Job),
    /// From rank 0: no more requests in this round.
    Close,
    /// To rank 0: of so many requests received in this round, so many rows are still to be run.
    Report {
        /// Requests received.
        received: u64,
        /// Rows to be run.
        remaining: u64,
    },
    /// To rank 0: the result of a request.
    Ended(Ended),
    /// To rank 0: the round's last result was sent.
    Summary(Summary),
    /// From rank 0: all is done.
    Stop,
}

/// What has to be the same on all ranks.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Debug)]
pub struct Introduction {
    /// Version of lfm2c.
    pub version: String,
    /// Hashes of the plans.
    #[serde(default)]
    pub plans: Vec<String>,
    /// What they run on.
    #[serde(default)]
    pub device: String,
}

/// How the requests of a round run; see [`Options`].
#[derive(Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Debug)]
pub struct Wanted {
    chunk: Option<usize>,
    logits: bool,
    prompt_logits: bool,
}

/// A request on its way.
#[derive(Serialize, Deserialize, PartialEq, Debug)]
pub struct Job {
    /// Its number in the round, from 0.
    pub number: u64,
    id: u64,
    prompt: Vec<u32>,
    max_new_tokens: usize,
    eos: Vec<u32>,
    /// Bits, so that they arrive as they are.
    sampling: [i32; SAMPLING_COLUMNS as usize],
    /// Texts that end it.
    pub stops: Vec<String>,
}

/// A result on its way.
#[derive(Serialize, Deserialize, PartialEq, Debug)]
pub struct Ended {
    /// The request's number in the round.
    pub number: u64,
    id: u64,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    reason: Reason,
    /// How many numbers each of the following has.
    counts: [usize; 2],
    #[serde(skip)]
    logits: Vec<f32>,
    #[serde(skip)]
    prompt_logits: Vec<f32>,
}

#[derive(Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Debug)]
enum Reason {
    Length,
    Eos,
    Stop,
}

/// What a rank did in a round.
#[derive(Clone, Default, Serialize, Deserialize, PartialEq, Debug)]
pub struct Summary {
    /// Sequences that ended there.
    pub sequences: u64,
    /// Its steps.
    pub statistics: Statistics,
}

impl Summary {
    /// Seconds in which a step ran.
    pub fn busy_seconds(&self) -> f64 {
        (self.statistics.prefill.elapsed + self.statistics.decode.elapsed).as_secs_f64()
    }
}

impl Message {
    /// Its name, for a message about it.
    pub fn kind(&self) -> &'static str {
        match self {
            Message::Introduction(_) => "an introduction",
            Message::Load(_) => "an order to load",
            Message::Ready => "that it is ready",
            Message::Round(_) => "the start of a round",
            Message::Job(_) => "a request",
            Message::Close => "the end of the requests",
            Message::Report { .. } => "a report",
            Message::Ended(_) => "a result",
            Message::Summary(_) => "a summary",
            Message::Stop => "the end of all work",
        }
    }

    /// As bytes: the length of the JSON as u32, the JSON, the logits.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self).context("a message to another rank")?;
        let mut bytes = u32::try_from(json.len()).context("a message to another rank")?.to_le_bytes().to_vec();
        bytes.extend(json);
        if let Message::Ended(ended) = self {
            bytes.extend_from_slice(bytemuck::cast_slice(&ended.logits));
            bytes.extend_from_slice(bytemuck::cast_slice(&ended.prompt_logits));
        }
        Ok(bytes)
    }

    /// Reads what [`Message::to_bytes`] made.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Message> {
        let (length, rest) = bytes.split_first_chunk().context("expected at least 4 bytes, found fewer")?;
        let length = u32::from_le_bytes(*length) as usize;
        let (json, numbers) = rest.split_at_checked(length).with_context(|| {
            format!("expected {length} bytes of JSON, found {}; all ranks must run the same lfm2c", rest.len())
        })?;
        let mut message =
            serde_json::from_slice(json).context("expected what this lfm2c sends, found something else")?;
        if let Message::Ended(ended) = &mut message {
            let [logits, prompt_logits] = ended.counts;
            let expected = logits.checked_add(prompt_logits).and_then(|count| count.checked_mul(size_of::<f32>()));
            ensure!(
                expected == Some(numbers.len()),
                "expected {logits} and {prompt_logits} logits, found {} bytes",
                numbers.len()
            );
            let mut words = numbers.as_chunks().0.iter().map(|&word| f32::from_ne_bytes(word));
            ended.logits = words.by_ref().take(logits).collect();
            ended.prompt_logits = words.collect();
        }
        Ok(message)
    }
}

impl Introduction {
    /// What is not the same, if anything: expected as here, found there.
    pub fn difference(&self, found: &Introduction) -> Option<String> {
        let short = |hashes: &[String]| {
            let each = hashes.iter().map(|hash| hash.get(..12).unwrap_or(hash));
            each.collect::<Vec<_>>().join(" and ")
        };
        let (what, expected, found, fix) = if self.version != found.version {
            ("version of lfm2c", self.version.clone(), found.version.clone(), "install the same on every host")
        } else if self.plans != found.plans {
            ("plan", short(&self.plans), short(&found.plans), "give every rank the same plan")
        } else if self.device != found.device {
            ("device", self.device.clone(), found.device.clone(), "use hosts with the same, or --device cpu on all")
        } else {
            return None;
        };
        Some(format!("{what}: expected {expected}, as on rank 0, found {found}; {fix}"))
    }
}

impl From<Options> for Wanted {
    fn from(options: Options) -> Wanted {
        let Options { chunk, capture_logits, capture_prompt_logits } = options;
        Wanted { chunk, logits: capture_logits, prompt_logits: capture_prompt_logits }
    }
}

impl From<Wanted> for Options {
    fn from(Wanted { chunk, logits, prompt_logits }: Wanted) -> Options {
        Options { chunk, capture_logits: logits, capture_prompt_logits: prompt_logits }
    }
}

impl Job {
    /// Of a request without a session, which is bound to a place.
    pub(super) fn new(number: u64, request: &Request, stops: Vec<String>) -> Job {
        let Request { id, ref prompt, max_new_tokens, ref eos, sampling, session: _ } = *request;
        Job { number, id, prompt: prompt.clone(), max_new_tokens, eos: eos.clone(), sampling: sampling.to_row(), stops }
    }

    /// The request, and texts that end it.
    pub(super) fn into_request(self) -> (Request, Vec<String>) {
        let Job { number: _, id, prompt, max_new_tokens, eos, sampling, stops } = self;
        let sampling = SamplingParams::from_row(&sampling);
        (Request { id, prompt, max_new_tokens, eos, sampling, session: None }, stops)
    }
}

impl Ended {
    /// Of what has finished.
    pub(super) fn new(number: u64, finished: Finished) -> Ended {
        let Finished { id, prompt_tokens, tokens, reason, logits, prompt_logits, .. } = finished;
        let reason = match reason {
            FinishReason::Length => Reason::Length,
            FinishReason::Eos => Reason::Eos,
            FinishReason::Stop => Reason::Stop,
        };
        let counts = [logits.len(), prompt_logits.len()];
        Ended { number, id, prompt_tokens, tokens, reason, counts, logits, prompt_logits }
    }

    /// What has finished.
    pub(super) fn into_finished(self) -> Finished {
        let Ended { id, prompt_tokens, tokens, reason, logits, prompt_logits, .. } = self;
        let reason = match reason {
            Reason::Length => FinishReason::Length,
            Reason::Eos => FinishReason::Eos,
            Reason::Stop => FinishReason::Stop,
        };
        Finished { id, prompt_tokens, kept_rows: 0, lost_rows: 0, tokens, reason, logits, prompt_logits }
    }
}
