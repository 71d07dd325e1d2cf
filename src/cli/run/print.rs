//! What a run without `--input` prints: text as it is made, tokens and JSON at the end.

use std::ops::ControlFlow;

use anyhow::Result;
use serde_json::json;

use super::Timing;
use crate::cli::output::print;
use crate::runtime::{Finished, PhaseStatistics};
use crate::text::{Text, TextStream};

/// The text of each sequence, as its tokens come.
pub struct Texts<'t> {
    streams: Vec<TextStream<'t>>,
    /// Prints it at once.
    live: bool,
    fault: Option<anyhow::Error>,
}

impl<'t> Texts<'t> {
    /// For so many sequences, which end at the stop strings. With `live`, text is printed as it is made.
    pub fn new(rules: Option<&'t Text>, sequences: usize, stops: &[String], live: bool) -> Self {
        let streams = rules.map(|rules| (0..sequences).map(|_| rules.stream(stops)).collect());
        Texts { streams: streams.unwrap_or_default(), live, fault: None }
    }

    /// Takes a token of the sequence with that id; says whether the sequence goes on.
    pub fn token(&mut self, id: u64, token: u32) -> ControlFlow<()> {
        let Some(stream) = usize::try_from(id).ok().and_then(|id| self.streams.get_mut(id)) else {
            return ControlFlow::Continue(());
        };
        let pushed = stream.push(token).and_then(|piece| {
            if self.live && !piece.text.is_empty() {
                print(&piece.text)?;
            }
            Ok(piece.stopped)
        });
        match pushed {
            Ok(false) => ControlFlow::Continue(()),
            Ok(true) => ControlFlow::Break(()),
            Err(fault) => {
                self.fault.get_or_insert(fault);
                ControlFlow::Break(())
            }
        }
    }

    /// The texts, one for each sequence; none where there are no rules.
    pub fn finish(mut self) -> Result<Vec<String>> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let live = self.live;
        let finish = |stream: &mut TextStream| {
            let rest = stream.finish()?;
            if live {
                let end = if stream.text().ends_with('\n') { "" } else { "\n" };
                print(format_args!("{rest}{end}"))?;
            }
            Ok(stream.text().to_owned())
        };
        self.streams.iter_mut().map(finish).collect()
    }
}

/// Tokens, a line for each sequence.
pub fn tokens(results: &[Result<Finished, String>]) -> Result<()> {
    results.iter().flatten().try_for_each(|finished| {
        let tokens: Vec<String> = finished.tokens.iter().map(ToString::to_string).collect();
        print(format_args!("{}\n", tokens.join(",")))
    })
}

/// Texts, with an empty line between two.
pub fn texts(results: &[Result<Finished, String>], texts: &[String]) -> Result<()> {
    let ran = results.iter().zip(texts).filter(|(result, _)| result.is_ok());
    for (index, (_, text)) in ran.enumerate() {
        let between = if index > 0 { "\n" } else { "" };
        let end = if text.ends_with('\n') { "" } else { "\n" };
        print(format_args!("{between}{text}{end}"))?;
    }
    Ok(())
}

/// One object with everything.
pub fn object(results: &[Result<Finished, String>], texts: &[String], timing: &Timing) -> Result<()> {
    let sequences = results.iter().enumerate().map(|(index, result)| match result {
        Ok(finished) => json!({
            "prompt_tokens": finished.prompt_tokens,
            "tokens": finished.tokens,
            "text": texts.get(index),
            "finish_reason": finished.reason.to_string(),
        }),
        Err(fault) => json!({ "error": fault }),
    });
    let statistics = &timing.statistics;
    let phase = |phase: &PhaseStatistics| {
        json!({
            "steps": phase.steps,
            "rows": phase.rows,
            "padding_rows": phase.padding,
            "seconds": phase.elapsed.as_secs_f64(),
            "tokens_per_second": phase.rows_per_second(),
        })
    };
    let timing = json!({
        "ready_seconds": timing.ready_seconds,
        "generate_seconds": timing.generate_seconds,
        "new_tokens": statistics.tokens,
        "prefill": phase(&statistics.prefill),
        "decode": phase(&statistics.decode),
    });
    print(format_args!("{}\n", json!({ "sequences": sequences.collect::<Vec<_>>(), "timing": timing })))
}
