//! `lfm2c run --input FILE.jsonl`: many requests, results in the order of the input.

mod captured;

use std::collections::BTreeMap;
use std::io::BufRead;
use std::ops::ControlFlow;
use std::path::Path;
use std::slice::from_ref;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use self::captured::Captured;
use super::line::{Asked, Defaults, Fault, Reader, key};
use super::lines::{Lines, count, is_regular};
use super::results::Results;
use super::{Arguments, Format, Timing, summary, write_npy};
use crate::cli::device::Place;
use crate::cli::output::{describe, note};
use crate::cli::progress::Sequences;
use crate::cli::world::World;
use crate::cli::{load, usage};
use crate::plan::PlanFile;
use crate::runtime::ranks::Mode;
use crate::runtime::{Finished, Generator, Request, RequestError, SamplingParams, Work};
use crate::text::{Text, TextStream};

/// Does it.
pub fn execute(
    arguments: &Arguments,
    sampling: SamplingParams,
    input: &Path,
    started: Instant,
    world: &mut World,
) -> Result<()> {
    check_options(arguments, input)?;
    let model = arguments.model.as_deref();
    let file = load::plan(&arguments.input_plan, model, &arguments.choices.options_for(&arguments.input_plan)?)?;
    let place = world.agree(from_ref(&file), arguments.device, arguments.ranks)?;
    let mut lines = Lines::open(input, arguments.batch.first)?;
    let total = count(input, arguments.batch.first, arguments.prompt_logits.is_some())?;
    if arguments.prompt_logits.is_some() && total != Some(1) {
        return usage(format!(
            "--prompt-logits: expected a single prompt, found {} in {}",
            total.unwrap_or(0),
            input.display()
        ));
    }
    let results = match &arguments.batch.output {
        None => Results::to_stdout(),
        Some(path) if arguments.batch.resume => Results::resume(path, arguments.batch.retry_errors)?,
        Some(path) => Results::create(path)?,
    };
    let text = text(&file, model)?;
    if let (Err(why), false) = (&text, arguments.text.stop.is_empty()) {
        return usage(format!("--stop: {why}"));
    }
    let mut batch = Batch::new(file.hash(), reader(arguments, sampling, &file, &text), &mut lines, results);
    batch.plain = arguments.format == Some(Format::Text);
    batch.retry = arguments.batch.retry_errors;
    batch.captured = (arguments.logits.is_some() || arguments.prompt_logits.is_some()).then(Captured::default);
    batch.bar = Sequences::new(total.map(|total| total as u64));
    // What an earlier run left is checked before weights are loaded; there may be nothing to load them for.
    batch.first = batch.read()?;
    if batch.first.is_some() {
        generate(arguments, &file, place, &mut batch, started, world)?;
    }
    world.leave()?;
    let Batch { results, captured, bar, done, failed, .. } = batch;
    bar.end();
    results.finish()?;
    if let Some(captured) = captured {
        captured.write(arguments, done, file.manifest.model.vocab)?;
    }
    if failed > 0 {
        bail!("{failed} of {done} sequences could not run");
    }
    Ok(())
}

fn generate<R: BufRead>(
    arguments: &Arguments,
    file: &PlanFile,
    place: Place,
    batch: &mut Batch<'_, '_, R>,
    started: Instant,
    world: &mut World,
) -> Result<()> {
    world.load(0)?;
    let mut executor = load::executor(file, arguments.model.as_deref(), place, arguments.graphs())?;
    super::counts(arguments, &*executor)?;
    world.wait_until_ready()?;
    let ready_seconds = started.elapsed().as_secs_f64();
    let begun = Instant::now();
    batch.bar.start();
    let mut generator = Generator::new(&mut *executor, arguments.generating())?;
    let ranks = world.run(&mut generator, batch, arguments.generating(), Mode::Deal)?;
    let timing = Timing::new(ready_seconds, begun, generator.statistics(), ranks);
    batch.bar.suspend(|| summary(file, &timing, world.peers(), &*executor));
    super::write_counts(arguments, &*executor)
}

fn check_options(arguments: &Arguments, input: &Path) -> Result<()> {
    let batch = &arguments.batch;
    if batch.output.is_some() && arguments.format == Some(Format::Text) {
        return usage("--output: expected --format json, which is what the file gets, found --format text");
    }
    let of_samples = [("--validate", &batch.validate), ("--compare", &batch.compare)];
    if let Some((name, _)) = of_samples.iter().find(|(_, path)| path.is_some()) {
        return usage(format!("{name}: expected --input FILE.bin, found {}", input.display()));
    }
    if batch.first == Some(0) {
        return usage("-n: expected at least 1 line, found 0");
    }
    if batch.resume && (arguments.logits.is_some() || arguments.prompt_logits.is_some()) {
        return usage("--resume: expected neither --logits nor --prompt-logits, which are of all sequences of a run");
    }
    if arguments.prompt_logits.is_some() && !is_regular(input) {
        return usage("--prompt-logits: expected --tokens, or --input with a regular file of one line");
    }
    Ok(())
}

/// The model's rules from text to tokens, or why there are none; prompts can be given as tokens then.
fn text(file: &PlanFile, model: Option<&Path>) -> Result<std::result::Result<Text, String>> {
    let Some(directory) = crate::cli::text::directory(file, model) else {
        let why =
            "no tokenizer: the plan's recipe names no model directory; name one with --model DIR, or give `tokens`";
        return Ok(Err(why.to_owned()));
    };
    let missing = || Text::open(&directory).err().map_or_else(String::new, |e| describe(&e));
    Ok(Text::find(&directory)?.ok_or_else(missing))
}

fn reader<'t>(
    arguments: &Arguments,
    sampling: SamplingParams,
    file: &PlanFile,
    text: &'t std::result::Result<Text, String>,
) -> Reader<'t> {
    let Arguments { max_new_tokens, ignore_eos, .. } = *arguments;
    Reader {
        defaults: Defaults {
            max_new_tokens,
            sampling,
            ignore_eos,
            stop: arguments.text.stop.clone(),
            wording: arguments.text.wording.clone(),
        },
        eos: crate::cli::text::stop_tokens(file, text.as_ref().ok()),
        text: text.as_ref().map_err(Clone::clone),
    }
}

/// Requests of lines, and their results.
struct Batch<'l, 't, R> {
    lines: &'l mut Lines<R>,
    /// The plan's hash.
    plan: String,
    reader: Reader<'t>,
    results: Results,
    /// Prints tokens rather than JSON.
    plain: bool,
    /// Runs lines again that an earlier run could not.
    retry: bool,
    /// A request that was read ahead.
    first: Option<Request>,
    /// Tells what is wrong with a line.
    report: fn(&str),
    /// Why a new token's text cannot be told.
    fault: Option<anyhow::Error>,
    /// Requests given, which is also the id of the next.
    asked: u64,
    at_work: BTreeMap<u64, AtWork<'t>>,
    captured: Option<Captured>,
    bar: Sequences,
    /// Lines that are done, here or before.
    done: usize,
    /// Those of them that could not run.
    failed: usize,
}

/// What a result needs of its line.
struct AtWork<'t> {
    number: usize,
    place: usize,
    key: String,
    id: Option<String>,
    max_new_tokens: usize,
    /// Texts that end it.
    stops: Vec<String>,
    /// The text of its new tokens, where there is a tokenizer.
    stream: Option<TextStream<'t>>,
}

impl<'l, 't, R> Batch<'l, 't, R> {
    fn new(plan: String, reader: Reader<'t>, lines: &'l mut Lines<R>, results: Results) -> Self {
        Batch {
            lines,
            plan,
            reader,
            results,
            plain: false,
            retry: false,
            first: None,
            report: |what| note(format_args!("lfm2c: {what}")),
            fault: None,
            asked: 0,
            at_work: BTreeMap::new(),
            captured: None,
            bar: Sequences::new(None),
            done: 0,
            failed: 0,
        }
    }
}

impl<R: BufRead> Batch<'_, '_, R> {
    /// The request of the next line that can run and is not done.
    fn read(&mut self) -> Result<Option<Request>> {
        loop {
            let Some((number, place, bytes)) = self.lines.next()? else { return Ok(None) };
            let asked = self.reader.read(number, place, bytes);
            let key = key(&self.plan, place, bytes, asked.as_ref().ok());
            if let Some(kept) = self.results.earlier()? {
                let again = kept.failed && self.retry;
                if kept.number != number || (kept.key != key && !again) {
                    let fix = if kept.failed { "; --retry-errors runs lines that were corrected" } else { "" };
                    bail!(
                        "result {} of the earlier run: expected that of line {number} of {}, with these settings and this plan \
                         (request {key}), found line {}, request {}; resume with the same input, options and plan, or give \
                         another --output{fix}",
                        place + 1,
                        self.lines.name,
                        kept.number,
                        kept.key,
                    );
                }
                if !again {
                    self.end(kept.failed);
                    self.results.keep(place, kept)?;
                    continue;
                }
            }
            let mut at_work = AtWork { number, place, key, id: None, max_new_tokens: 0, stops: vec![], stream: None };
            let Asked { id, request, stop } = match asked {
                Ok(asked) => asked,
                Err(Fault { id, what }) => {
                    self.refuse(&AtWork { id, ..at_work }, &what)?;
                    continue;
                }
            };
            at_work.id = id;
            at_work.max_new_tokens = request.max_new_tokens;
            at_work.stream = self.reader.text.as_ref().ok().map(|text| text.stream(&stop));
            at_work.stops = stop;
            let request = Request { id: self.asked, ..request };
            self.at_work.insert(self.asked, at_work);
            self.asked += 1;
            return Ok(Some(request));
        }
    }
}

impl<R: BufRead> Work for Batch<'_, '_, R> {
    fn next(&mut self) -> Result<Option<Request>> {
        self.first.take().map_or_else(|| self.read(), |first| Ok(Some(first)))
    }

    fn stops(&self, id: u64) -> Vec<String> {
        self.at_work.get(&id).map(|at_work| at_work.stops.clone()).unwrap_or_default()
    }

    fn token(&mut self, id: u64, token: u32) -> ControlFlow<()> {
        self.bar.token();
        let stream = self.at_work.get_mut(&id).and_then(|at_work| at_work.stream.as_mut());
        match stream.map(|stream| stream.push(token)) {
            None => ControlFlow::Continue(()),
            Some(Ok(piece)) if !piece.stopped => ControlFlow::Continue(()),
            Some(outcome) => {
                // Told when the sequence has ended, which it does now.
                self.fault = outcome.err().or_else(|| self.fault.take());
                ControlFlow::Break(())
            }
        }
    }

    fn finished(&mut self, index: usize, result: std::result::Result<Finished, RequestError>) -> Result<()> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let id = index as u64;
        let mut at_work = self.at_work.remove(&id).context("a result of no request; this is a bug")?;
        let finished = match result {
            Ok(finished) => finished,
            Err(error) => {
                let what = error.to_string();
                let what = what.strip_prefix(&format!("request {id}: ")).unwrap_or(&what);
                return self.refuse(&at_work, &format!("line {}: {what}", at_work.number));
            }
        };
        let line = if self.plain { tokens(&finished) } else { at_work.object(&finished)? };
        self.end(false);
        if let Some(captured) = &mut self.captured {
            captured.keep(at_work.place, at_work.max_new_tokens, finished);
        }
        self.bar.suspend(|| self.results.put(at_work.place, Some(line)))
    }
}

impl<R> Batch<'_, '_, R> {
    /// A line that cannot run.
    fn refuse(&mut self, line: &AtWork<'_>, what: &str) -> Result<()> {
        self.end(true);
        let text = (!self.plain).then(|| line.error(what));
        self.bar.suspend(|| {
            (self.report)(what);
            self.results.put(line.place, text)
        })
    }

    fn end(&mut self, failed: bool) {
        self.done += 1;
        self.failed += usize::from(failed);
        self.bar.sequence();
    }
}

impl AtWork<'_> {
    fn head(&self) -> Map<String, Value> {
        let mut head = Map::new();
        head.insert("line".into(), self.number.into());
        head.insert("request".into(), self.key.clone().into());
        head
    }

    fn error(&self, what: &str) -> String {
        let mut object = self.head();
        object.insert("error".into(), what.into());
        self.named(object)
    }

    /// An object behind the line's own name, which is repeated as it was written.
    fn named(&self, object: Map<String, Value>) -> String {
        let text = Value::from(object).to_string();
        match (&self.id, text.strip_prefix('{')) {
            (Some(id), Some(rest)) => format!("{{\"id\":{id},{rest}"),
            _ => text,
        }
    }

    fn object(&mut self, finished: &Finished) -> Result<String> {
        let text = match &mut self.stream {
            None => Value::Null,
            Some(stream) => {
                stream.finish()?;
                stream.text().into()
            }
        };
        let mut object = self.head();
        object.insert("prompt_tokens".into(), finished.prompt_tokens.into());
        object.insert("tokens".into(), finished.tokens.clone().into());
        object.insert("text".into(), text);
        object.insert("finish_reason".into(), finished.reason.to_string().into());
        Ok(self.named(object))
    }
}

fn tokens(finished: &Finished) -> String {
    finished.tokens.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
