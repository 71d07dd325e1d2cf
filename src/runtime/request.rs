//! What a caller asks of the generate loop, and what it gets.

use std::fmt;

use thiserror::Error;

use super::SamplingParams;

/// A conversation of several requests, by a number of the caller's.
///
/// Each request of a session has the whole conversation as its prompt. The pool keeps the rows of the last one, and those that
/// the next one's prompt begins with are not run again. A session changes no result, only how many rows run: a prompt that
/// differs from what the pool holds runs from there on, or, where too much is cut away for the convolutions' state to be
/// there still, from its beginning. Between requests a session keeps its slot and its pages, until
/// [`Generator::forget`](super::Generator::forget).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Session(pub u64);

/// One sequence to generate.
///
/// Prompt and new tokens together must be at most the plan's `max_context`, and pages are reserved for that sum. Strictly
/// the last new token needs no position, because it is never run; it counts all the same, so that the limit does not
/// depend on how a sequence ends, and so that a sequence can be continued.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Request {
    /// The caller's name for it. Results come in the order of the requests, so ids need not be unique.
    pub id: u64,
    /// Prompt, at least one token.
    pub prompt: Vec<u32>,
    /// New tokens at the most. With 0 nothing is generated, and the prompt runs only if its logits are asked for.
    pub max_new_tokens: usize,
    /// Tokens that end the sequence; empty to ignore the end.
    pub eos: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The session that it goes on with or begins; without one, nothing is kept when it ends.
    pub session: Option<Session>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// It has all the new tokens it asked for.
    Length,
    /// Its last token is one of those that end it. That wins over the others.
    Eos,
    /// The caller's callback said so. That wins over [`FinishReason::Length`].
    Stop,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FinishReason::Length => "length",
            FinishReason::Eos => "eos",
            FinishReason::Stop => "stop",
        })
    }
}

/// A sequence that has ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Finished {
    /// The request's id.
    pub id: u64,
    /// Length of its prompt.
    pub prompt_tokens: usize,
    /// Rows of its prompt that its session had in the pool: they did not run.
    pub kept_rows: usize,
    /// Rows of its prompt that its session had in the pool and that ran all the same, because too much was cut away.
    pub lost_rows: usize,
    /// The new tokens, with the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
    /// `[new tokens, vocab]`: the row each was chosen from; empty unless asked for.
    pub logits: Vec<f32>,
    /// `[prompt tokens, vocab]`; empty unless asked for.
    pub prompt_logits: Vec<f32>,
}

/// A request that the plan cannot serve. Other requests are not affected.
#[derive(Clone, PartialEq, Debug, Error)]
#[allow(missing_docs)]
pub enum RequestError {
    /// A prompt without tokens.
    #[error("request {id}: prompt: expected at least 1 token, found 0; start it with the model's first token")]
    EmptyPrompt { id: u64 },
    /// A token that the model does not have.
    #[error(
        "request {id}: prompt token {index}: expected an id below the vocabulary size {vocab}, found {token}; use the \
         tokenizer of the plan's model"
    )]
    UnknownToken { id: u64, index: usize, token: u32, vocab: usize },
    /// Prompt and new tokens beyond the plan's context.
    #[error(
        "request {id}: prompt and new tokens: expected at most max-context = {max_context}, found {prompt} + {new}; ask \
         for fewer new tokens or compile the plan with a larger --max-context"
    )]
    TooLong { id: u64, prompt: usize, new: usize, max_context: usize },
    /// More pages than the pool has in all: it would wait forever.
    #[error(
        "request {id}: prompt and new tokens need {needed} pages of {page_tokens} tokens: expected at most the pool's \
         {pages}, found {prompt} + {new} tokens; ask for fewer new tokens or compile the plan with a larger --kv-tokens"
    )]
    TooManyPages { id: u64, prompt: usize, new: usize, needed: usize, page_tokens: usize, pages: usize },
    /// Sessions hold the pages or slots that it needs, and nothing else runs.
    #[error(
        "request {id}: expected a slot and {needed} more pages for prompt and new tokens, found {slots} free slots and {pages} \
         free pages beside {others} other sessions; end one of these, ask for fewer new tokens, or compile the plan with a \
         larger --max-sequences and --kv-tokens"
    )]
    NoRoom { id: u64, needed: usize, pages: usize, slots: usize, others: usize },
    /// A sampling parameter out of range.
    #[error("request {id}: {name}: expected a number {expected}, found {found}; change --{name}")]
    Sampling { id: u64, name: &'static str, expected: &'static str, found: f32 },
}

impl Request {
    /// Rows that it runs if nothing ends it early: the last new token is never run.
    pub fn rows(&self) -> usize {
        self.prompt.len().saturating_add(self.max_new_tokens.saturating_sub(1))
    }

    /// Checks the sampling parameters, which need no plan.
    pub(super) fn check_sampling(&self) -> Result<(), RequestError> {
        match self.sampling.fault() {
            Some((name, expected, found)) => Err(RequestError::Sampling { id: self.id, name, expected, found }),
            None => Ok(()),
        }
    }
}
