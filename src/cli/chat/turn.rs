//! A turn: what the user says, and the answer as it is made.

use std::ops::ControlFlow;

use anyhow::Result;
use serde_json::json;

use super::{Chat, SESSION};
use crate::cli::output::{describe, note, print};
use crate::runtime::{FinishReason, Request};

impl Chat<'_> {
    /// Answers what is said. A turn that cannot be is told, and the conversation is as before.
    ///
    /// # Errors
    /// The executor or an output failed.
    pub(super) fn turn(&mut self, said: &str) -> Result<()> {
        self.turns += 1;
        let prompt = match self.conversation.ask(said) {
            Ok(prompt) => prompt.to_vec(),
            Err(error) => return self.refuse(said, &describe(&error)),
        };
        let (history, most) = (prompt.len(), self.generator.most_positions());
        if history >= most {
            let what = format!(
                "the conversation is full: {history} tokens with what you said, of {most} at the most; /clear begins another"
            );
            return self.refuse(said, &what);
        }
        let request = Request {
            id: self.turns,
            prompt,
            max_new_tokens: self.arguments.max_new_tokens.min(most - history),
            eos: self.eos.clone(),
            sampling: self.sampling,
            session: Some(SESSION),
        };
        let (mut stream, mut fault, mut interrupted) = (self.text.stream(&self.arguments.stop), None, false);
        let before = self.generator.statistics().clone();
        let (eos, interrupt) = (&self.eos, self.interrupt);
        let show = |_, token| {
            // What comes after Ctrl-C is not shown, and so it was not said.
            interrupted = interrupt.is_asked();
            if interrupted {
                return ControlFlow::Break(());
            }
            if eos.contains(&token) {
                return ControlFlow::Continue(());
            }
            let stopped = stream.push(token).and_then(|piece| print(&piece.text).map(|()| piece.stopped));
            match stopped {
                Ok(false) => ControlFlow::Continue(()),
                Ok(true) => ControlFlow::Break(()),
                Err(error) => {
                    fault = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let answering = interrupt.begin();
        let results = self.generator.generate(vec![request], show);
        drop(answering);
        if let Some(error) = fault {
            return Err(error);
        }
        let finished = match results?.into_iter().next() {
            Some(Ok(finished)) => finished,
            Some(Err(error)) => return self.refuse(said, &error.to_string()),
            None => return self.refuse(said, "no result"),
        };
        if finished.reason != FinishReason::Stop {
            print(stream.finish()?)?;
        }
        print("\n")?;
        let tokens = match finished.tokens.split_last() {
            Some((last, tokens)) if self.eos.contains(last) => tokens,
            _ => &finished.tokens,
        };
        self.conversation.answer(tokens, stream.text())?;
        let after = self.generator.statistics();
        let seconds = after.decode.elapsed - before.decode.elapsed;
        let decoded = after.decode.rows - before.decode.rows;
        let per_second = if seconds.is_zero() { 0.0 } else { decoded as f64 / seconds.as_secs_f64() };
        self.log.write(&json!({
            "turn": self.turns,
            "prompt_rows": after.prefill.rows - before.prefill.rows,
            "kept_rows": finished.kept_rows,
            "recomputed_rows": finished.lost_rows,
            "history_tokens": history,
            "new_tokens": finished.tokens.len(),
            "finish_reason": if interrupted { "interrupted".to_owned() } else { finished.reason.to_string() },
            "user": said,
            "text": stream.text(),
            "prefill_seconds": (after.prefill.elapsed - before.prefill.elapsed).as_secs_f64(),
            "decode_seconds": seconds.as_secs_f64(),
            "tokens_per_second": per_second,
        }))
    }

    /// Tells why there is no answer.
    fn refuse(&mut self, said: &str, why: &str) -> Result<()> {
        self.conversation.take_back();
        note(why);
        self.log.write(&json!({ "turn": self.turns, "user": said, "error": why }))
    }
}
