//! `lfm2c run --input FILE.bin`: how long samples take, and whether their logits are right.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Arguments, Format};
use crate::cli::device::Place;
use crate::cli::load;
use crate::cli::output::{note, print};
use crate::cli::samples::file::{Answers, How, Inputs, Timed, run};
use crate::cli::usage;
use crate::cli::world::{World, rank_table};
use crate::plan::PlanFile;
use crate::runtime::Executor;
use crate::runtime::ranks::Mode;

/// Samples that run first and do not count: memory is touched, threads are started, clocks are up.
const WARM_UP: usize = 16;

/// What became of a plan's run over samples.
struct Report {
    plan: String,
    dtype: String,
    device: String,
    seconds: f64,
    tokens_per_second: f64,
    verdict: Option<Verdict>,
}

/// How logits compare with answers.
#[derive(Clone, PartialEq, Debug)]
struct Verdict {
    /// The largest difference of any logit of any sample; NaN if a logit is.
    largest: f64,
    /// Samples with a logit beyond the tolerance.
    bad: usize,
    /// The first of them.
    first: Option<Bad>,
}

/// A sample beyond the tolerance, where its difference is largest.
#[derive(Clone, PartialEq, Debug)]
struct Bad {
    sample: usize,
    token: usize,
    expected: f32,
    found: f32,
}

/// Does it.
pub fn execute(arguments: &Arguments, input: &Path, world: &mut World) -> Result<()> {
    check_options(arguments)?;
    let plans = super::plans(arguments)?;
    if let Some(path) = &arguments.batch.compare {
        check_models(path, &plans)?;
    }
    let place = world.agree(&plans, arguments.device, arguments.ranks)?;
    let inputs = Inputs::open(input)?;
    let count = arguments.batch.first.unwrap_or(inputs.count);
    if count == 0 || count > inputs.count {
        return usage(format!(
            "-n: expected 1 to {} samples, as many as are in {}, found {count}",
            inputs.count,
            input.display()
        ));
    }
    let mut reports = vec![];
    let names = [&arguments.input_plan].into_iter().chain(&arguments.batch.compare);
    for (at, (name, file)) in names.zip(&plans).enumerate() {
        world.load(at)?;
        reports.push(evaluate(arguments, name.display().to_string(), file, place.clone(), input, count, world)?);
    }
    world.leave()?;
    match arguments.format.unwrap_or(Format::Text) {
        Format::Text => print(text(arguments, &reports, count, inputs.length))?,
        Format::Json => print(format_args!("{}\n", object(arguments, &reports, count, inputs.length)))?,
    }
    let invalid = |report: &&Report| report.verdict.as_ref().is_some_and(|verdict| verdict.bad > 0);
    if let Some(report) = reports.iter().find(invalid) {
        bail!("{}: logits differ from the answers beyond the tolerance {:e}", report.plan, arguments.batch.tolerance);
    }
    Ok(())
}

/// Refuses plans of different models, whose times say nothing about each other.
fn check_models(compare: &Path, plans: &[PlanFile]) -> Result<()> {
    let [expected, found] = [0, 1].map(|index| &plans[index].manifest.model);
    ensure!(
        expected.config_hash == found.config_hash,
        "--compare {}: expected a plan of the same model, `{}` with configuration {:.12}, found `{}` with configuration {:.12}",
        compare.display(),
        expected.name,
        expected.config_hash,
        found.name,
        found.config_hash,
    );
    Ok(())
}

fn check_options(arguments: &Arguments) -> Result<()> {
    let batch = &arguments.batch;
    if batch.resume {
        return usage("--resume: expected --input FILE.jsonl, found samples; they run as a whole");
    }
    if arguments.logits.is_some() || arguments.prompt_logits.is_some() {
        return usage(
            "--logits and --prompt-logits: expected no samples; --output FILE.bin writes the logits of samples",
        );
    }
    if arguments.count_experts.is_some() {
        return usage("--count-experts: expected prompts or --input FILE.jsonl, found samples");
    }
    if batch.compare.is_some() && batch.output.is_some() {
        return usage("--compare: expected no --output, which is the answers of one plan");
    }
    if batch.tolerance.is_nan() || batch.tolerance < 0.0 {
        return usage(format!("--tolerance: expected a number of at least 0, found {}", batch.tolerance));
    }
    Ok(())
}

/// Runs samples with a plan, compares and writes as the options say.
fn evaluate(
    arguments: &Arguments,
    plan: String,
    file: &PlanFile,
    place: Place,
    input: &Path,
    count: usize,
    world: &mut World,
) -> Result<Report> {
    let mut inputs = Inputs::open(input)?;
    let batch = &arguments.batch;
    let vocab = file.manifest.model.vocab;
    let open = |path| Answers::open(path, inputs.count, vocab);
    let mut answers = batch.validate.as_deref().map(open).transpose()?;
    let mut output = batch.output.as_deref().map(Output::create).transpose()?;
    let mut executor = load::prepared_executor(file, arguments.model.as_deref(), place, arguments.graphs())?;
    let mut verdict = Verdict { largest: 0.0, bad: 0, first: None };
    let length = inputs.length;
    let warm_up = count.min(WARM_UP);
    world.wait_until_ready()?;
    let how = |mode| How { chunk: arguments.chunk, mode };
    // Every rank gets all of them: nothing that runs for the first time is timed.
    run(&mut *executor, how(Mode::Copy), &mut Inputs::open(input)?, warm_up, world, &mut |_, _| Ok(()))?;
    let Timed { seconds, ranks } =
        run(&mut *executor, how(Mode::Deal), &mut inputs, count, world, &mut |sample, logits| {
            if let Some(answers) = &mut answers {
                verdict.compare(sample, &answers.read()?, logits, batch.tolerance);
            }
            output.as_mut().map_or(Ok(()), |output| output.write(logits))
        })?;
    output.map_or(Ok(()), Output::finish)?;
    if !ranks.is_empty() {
        note(rank_table(world.peers(), &ranks, seconds).trim_end());
    }
    Ok(Report {
        plan,
        dtype: format!("{:?}", file.manifest.dtype).to_lowercase(),
        device: match ranks.len() {
            0 => executor.device(),
            count => format!("{}, {count} ranks", executor.device()),
        },
        seconds,
        tokens_per_second: if seconds > 0.0 { (count * length) as f64 / seconds } else { 0.0 },
        verdict: batch.validate.is_some().then_some(verdict),
    })
}

impl Verdict {
    /// Compares a sample's logits with the answer.
    fn compare(&mut self, sample: usize, expected: &[f32], found: &[f32], tolerance: f64) {
        let (mut largest, mut at) = (0.0, 0);
        for (token, (&a, &b)) in expected.iter().zip(found).enumerate() {
            // Equal infinities differ by nothing; what is NaN is the largest difference of all.
            let difference = if a == b { 0.0 } else { (f64::from(a) - f64::from(b)).abs() };
            if difference > largest || (difference.is_nan() && !f64::is_nan(largest)) {
                (largest, at) = (difference, token);
            }
        }
        if largest > self.largest || largest.is_nan() {
            self.largest = largest;
        }
        // NaN is beyond any tolerance.
        if largest > tolerance || largest.is_nan() {
            self.bad += 1;
            let bad = Bad { sample, token: at, expected: expected[at], found: found[at] };
            self.first.get_or_insert(bad);
        }
    }
}

/// Answers as they are computed.
struct Output<'p> {
    file: BufWriter<File>,
    path: &'p Path,
}

impl<'p> Output<'p> {
    fn create(path: &'p Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Output { file: BufWriter::new(file), path })
    }

    fn write(&mut self, logits: &[f32]) -> Result<()> {
        let mut write = || logits.iter().try_for_each(|logit| self.file.write_all(&logit.to_le_bytes()));
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn finish(mut self) -> Result<()> {
        self.file.flush().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Computes the answers to samples.
///
/// # Errors
/// The samples are none for the plan, the executor failed, or the file cannot be written.
pub fn write_answers(executor: &mut dyn Executor, inputs: &mut Inputs, count: usize, path: &Path) -> Result<()> {
    let mut output = Output::create(path)?;
    let how = How { chunk: None, mode: Mode::Deal };
    run(executor, how, inputs, count, &mut World::alone(), &mut |_, logits| output.write(logits))?;
    output.finish()
}

fn text(arguments: &Arguments, reports: &[Report], count: usize, length: usize) -> String {
    let tolerance = arguments.batch.tolerance;
    let mut text = format!("{count} samples of {length} tokens\n");
    for report in reports {
        let Report { plan, dtype, device, seconds, tokens_per_second, verdict } = report;
        text += &format!("{plan} ({dtype}, {device}): {seconds:.6} s, {tokens_per_second:.0} tokens/s\n");
        match verdict {
            None => {}
            Some(Verdict { largest, first: None, .. }) => {
                text += &format!("VALID: largest difference {largest:.3e}, tolerance {tolerance:e}\n");
            }
            Some(Verdict { bad, first: Some(Bad { sample, token, expected, found }), .. }) => {
                text += &format!(
                    "INVALID: {bad} of {count} samples beyond the tolerance {tolerance:e}; the first is sample {sample}, at token \
                     {token}: expected {expected}, found {found}\n"
                );
            }
        }
    }
    if let Some(times) = times_as_fast(reports) {
        text += &format!("{} is {times:.2} times as fast as {}\n", reports[1].plan, reports[0].plan);
    }
    text
}

fn object(arguments: &Arguments, reports: &[Report], count: usize, length: usize) -> Value {
    let report = |report: &Report| {
        let verdict = report.verdict.as_ref();
        let first = verdict.and_then(|verdict| verdict.first.as_ref());
        json!({
            "plan": report.plan,
            "dtype": report.dtype,
            "device": report.device,
            "elapsed_seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
            "valid": verdict.map(|verdict| verdict.bad == 0),
            "largest_difference": verdict.map(|verdict| verdict.largest),
            "invalid_samples": verdict.map(|verdict| verdict.bad),
            "first_invalid": first.map(|bad| json!({
                "sample": bad.sample,
                "token": bad.token,
                "expected": bad.expected,
                "found": bad.found,
            })),
        })
    };
    json!({
        "samples": count,
        "length": length,
        "tolerance": arguments.batch.validate.is_some().then_some(arguments.batch.tolerance),
        "plans": reports.iter().map(report).collect::<Vec<_>>(),
        "times_as_fast": times_as_fast(reports),
    })
}

/// How many times as fast the second plan is as the first.
fn times_as_fast(reports: &[Report]) -> Option<f64> {
    match reports {
        [first, second] if second.seconds > 0.0 => Some(first.seconds / second.seconds),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(samples: &[([f32; 3], [f32; 3])]) -> Verdict {
        let mut verdict = Verdict { largest: 0.0, bad: 0, first: None };
        for (sample, (expected, found)) in samples.iter().enumerate() {
            verdict.compare(sample, expected, found, 0.25);
        }
        verdict
    }

    #[test]
    fn differences_up_to_the_tolerance_are_valid() {
        let verdict = compared(&[([1.0, 2.0, 3.0], [1.25, 2.0, 2.75]), ([f32::INFINITY; 3], [f32::INFINITY; 3])]);
        assert_eq!(verdict, Verdict { largest: 0.25, bad: 0, first: None });
    }

    #[test]
    fn the_first_bad_sample_is_named_at_its_largest_difference() {
        let good = ([0.0; 3], [0.125; 3]);
        let verdict = compared(&[good, ([0.0; 3], [0.5, -2.0, 1.0]), ([0.0; 3], [8.0; 3]), good]);
        let first = Some(Bad { sample: 1, token: 1, expected: 0.0, found: -2.0 });
        assert_eq!(verdict, Verdict { largest: 8.0, bad: 2, first });
    }

    #[test]
    fn no_number_is_invalid_on_either_side() {
        for pair in [([0.0; 3], [9.0, f32::NAN, 1.0]), ([0.0, f32::NAN, 0.0], [9.0; 3])] {
            let verdict = compared(&[pair, ([0.0; 3], [1.0; 3])]);
            assert!(verdict.largest.is_nan() && verdict.bad == 2, "{verdict:?}");
            assert_eq!(verdict.first.map(|bad| (bad.sample, bad.token)), Some((0, 1)));
        }
    }
}
