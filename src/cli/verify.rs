//! `lfm2c verify`: a plan against logits of a reference implementation.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use safetensors::{Dtype, SafeTensors};

use crate::cli::device::Device;
use crate::cli::load::{self, Choices};
use crate::cli::output::print;
use crate::cli::table::table;
use crate::cli::usage;
use crate::plan::DType;
use crate::runtime::cuda::Graphs;
use crate::runtime::{Executor, Generator, Options, Request};

/// Run a plan on a golden file's prompts and compare logits and greedy tokens.
///
/// A golden file holds, for each prompt N, `ids.N` int32 [length], `logits.N` float32 [length, vocab], optionally
/// `greedy.N` int32 [new tokens], and, for a plan compiled with --forced-routing, `experts.N` int32 [layers with experts,
/// length, experts a token]; such a plan takes those experts, and only logits are compared. Exits with 1 if an error exceeds
/// the tolerance or a token differs.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan, or a recipe (FILE.ron) to compile in memory
    plan: PathBuf,
    /// The Hugging Face directory whose checkpoint gives the weights
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The golden file
    #[arg(long, value_name = "FILE.safetensors")]
    golden: PathBuf,
    /// What to run on
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    /// Largest relative L2 error of a prompt's logits [default: 1e-5 in f32, 2e-2 in f16, 6e-2 in bf16]
    #[arg(long, value_name = "X")]
    tolerance: Option<f64>,
    /// Rows of a prompt in one step, at the most
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
}

/// One prompt with what the reference computed.
struct Golden {
    ids: Vec<u32>,
    logits: Vec<f32>,
    greedy: Option<Vec<u32>>,
    experts: Option<Vec<i32>>,
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    let file = load::plan(&arguments.plan, Some(&arguments.model), &Choices::default().options())?;
    let mut goldens = read(&arguments.golden)?;
    let forced = file.manifest.model.forced_routing.is_some();
    for (name, golden) in &mut goldens {
        if forced {
            if golden.experts.is_none() {
                bail!(
                    "the plan was compiled with --forced-routing: expected `experts.{name}` in the golden file, found none"
                );
            }
            // What follows the prompt has no recorded choices.
            golden.greedy = None;
        } else {
            golden.experts = None;
        }
    }
    let mut executor = load::executor(&file, Some(&arguments.model), arguments.device, Graphs::Lazy)?;
    if arguments.tolerance.is_some_and(|tolerance| tolerance.is_nan() || tolerance < 0.0) {
        return usage("--tolerance: expected a number of at least 0");
    }
    let tolerance = arguments.tolerance.unwrap_or(match file.manifest.dtype {
        DType::F16 => 2e-2,
        DType::BF16 => 6e-2,
        _ => 1e-5,
    });
    let mut rows = vec![];
    let mut failures = 0;
    for (name, golden) in &goldens {
        let compared = compare(&mut *executor, golden, arguments.chunk).with_context(|| format!("prompt {name}"))?;
        // NaN must fail.
        let holds = compared.error <= tolerance && compared.tokens_differ == 0;
        failures += usize::from(!holds);
        let greedy = match &golden.greedy {
            None => "-".to_owned(),
            Some(tokens) => format!("{}/{}", tokens.len() - compared.tokens_differ, tokens.len()),
        };
        rows.push(vec![
            name.clone(),
            golden.ids.len().to_string(),
            format!("{:.2e}", compared.error),
            format!("{:.2e}", compared.largest),
            greedy,
            if holds { "ok" } else { "FAILED" }.to_owned(),
        ]);
    }
    print(table(&["prompt", "tokens", "relative L2", "largest difference", "greedy", ""], &rows))?;
    let held = goldens.len() - failures;
    print(format_args!("tolerance {tolerance:e}: {held} of {} prompts hold\n", goldens.len()))?;
    if failures > 0 {
        bail!("{failures} of {} prompts differ from the golden file beyond the tolerance {tolerance:e}", goldens.len());
    }
    Ok(())
}

struct Compared {
    error: f64,
    largest: f64,
    tokens_differ: usize,
}

fn compare(executor: &mut dyn Executor, golden: &Golden, chunk: Option<usize>) -> Result<Compared> {
    if let Some(experts) = &golden.experts {
        // A single request takes the lowest slot.
        executor.force_experts(0, experts.clone());
    }
    let options = Options { chunk, capture_logits: false, capture_prompt_logits: true };
    let mut generator = Generator::new(executor, options)?;
    let request = Request {
        id: 0,
        prompt: golden.ids.clone(),
        max_new_tokens: golden.greedy.as_ref().map_or(0, Vec::len),
        ..Request::default()
    };
    let results = generator.generate(vec![request], |_, _| ControlFlow::Continue(()))?;
    let Some(finished) = results.into_iter().next() else { bail!("the run gave no result") };
    let finished = finished?;
    if finished.prompt_logits.len() != golden.logits.len() {
        bail!("logits: expected {} numbers, found {}", golden.logits.len(), finished.prompt_logits.len());
    }
    let pairs = || finished.prompt_logits.iter().zip(&golden.logits).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let distance: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = pairs().map(|(_, b)| b * b).sum();
    let differ = golden.greedy.iter().flatten().zip(&finished.tokens).filter(|(a, b)| a != b).count();
    Ok(Compared {
        error: (distance / norm).sqrt(),
        largest: pairs().map(|(a, b)| (a - b).abs()).fold(0.0, f64::max),
        tokens_differ: differ,
    })
}

fn read(path: &Path) -> Result<BTreeMap<String, Golden>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| anyhow::anyhow!("{} is not a safetensors file: {e}", path.display()))?;
    let mut goldens = BTreeMap::new();
    for name in tensors.names() {
        let Some(number) = name.strip_prefix("ids.") else { continue };
        let integers = |name: &str| -> Result<Vec<i32>> {
            Ok(words(&tensors, name, Dtype::I32)?.into_iter().map(i32::from_le_bytes).collect())
        };
        let tokens = |name: &str| -> Result<Vec<u32>> {
            integers(name)?.into_iter().map(|id| u32::try_from(id).context("a token id is negative")).collect()
        };
        let ids = tokens(name)?;
        let logits_name = format!("logits.{number}");
        let logits = words(&tensors, &logits_name, Dtype::F32)?;
        let shape = tensors.tensor(&logits_name)?.shape().to_vec();
        if shape.len() != 2 || shape[0] != ids.len() {
            bail!(
                "`{logits_name}`: expected shape [{}, vocab], as `{name}` has length {0}, found {shape:?}",
                ids.len()
            );
        }
        let greedy_name = format!("greedy.{number}");
        let greedy = tensors.tensor(&greedy_name).is_ok().then(|| tokens(&greedy_name)).transpose()?;
        let experts_name = format!("experts.{number}");
        let experts = tensors.tensor(&experts_name).is_ok().then(|| integers(&experts_name)).transpose()?;
        let key = number.parse::<u64>().map_or_else(|_| number.to_owned(), |n| format!("{n:04}"));
        let logits = logits.into_iter().map(f32::from_le_bytes).collect();
        goldens.insert(key, Golden { ids, logits, greedy, experts });
    }
    if goldens.is_empty() {
        bail!("{}: expected tensors `ids.N` and `logits.N`, found none", path.display());
    }
    Ok(goldens)
}

/// The little-endian words of a 32-bit tensor.
fn words(tensors: &SafeTensors<'_>, name: &str, dtype: Dtype) -> Result<Vec<[u8; 4]>> {
    let tensor = tensors.tensor(name).with_context(|| format!("the golden file lacks `{name}`"))?;
    if tensor.dtype() != dtype {
        bail!("`{name}`: expected {dtype:?}, found {:?}", tensor.dtype());
    }
    Ok(tensor.data().as_chunks::<4>().0.to_vec())
}
