//! What the compile driver needs of a source: its graph as built, the sizes of the buckets, limits and types, as the recipe and
//! the command line choose them.

use anyhow::{Result, anyhow, bail};

use super::{CheckpointListing, CompileOptions, OptionError};
use crate::codegen::{Recipe, tensors, types};
use crate::ir::build::{BuildOptions, build};
use crate::ir::config::{Config, Experts, FeedForward};
use crate::ir::{DType, Extents, Graph};
use crate::passes::{BucketSpec, Phase};
use crate::plan::{self, ForcedRouting, Limits, Model, WeightSource};

/// Positions of one KV page.
const PAGE_TOKENS: u64 = 64;
/// Columns that a slot's convolution state keeps at the least, so that a sequence can be cut back by a few tokens.
const RING_COLUMNS: u64 = 8;
/// Rows of the prefill buckets where nothing else is said.
const DEFAULT_PREFILL: [u64; 10] = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];
/// Sequences of the decode buckets where nothing else is said.
const DEFAULT_DECODE: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// Positions of one sequence where nothing else is said and the model allows it.
const DEFAULT_CONTEXT: u64 = 32_768;
/// Positions of all sequences together where nothing else is said.
const DEFAULT_KV_TOKENS: u64 = 131_072;

/// Slots, positions and pages are counted in i32 on the device; a multiple of the page's size.
const MAX_LIMIT: u64 = (1 << 31) - PAGE_TOKENS;

/// What the driver needs of a source.
pub(super) struct Unit {
    pub(super) graph: Graph,
    pub(super) specs: Vec<BucketSpec>,
    pub(super) model: Model,
    pub(super) limits: Limits,
    pub(super) dtype: DType,
    pub(super) recipe: String,
    pub(super) checkpoint_dtype: Box<dyn Fn(&crate::ir::Weight) -> DType>,
}

pub(super) fn model_unit(
    recipe: &Recipe,
    listing: Option<&CheckpointListing>,
    options: &CompileOptions,
) -> Result<Unit> {
    let config = recipe.config()?;
    let stated = config.dtype.as_deref().map(parse_torch_dtype).transpose()?;
    let dtype = match (options.dtype, &recipe.dtype) {
        (Some(dtype), _) => dtype,
        (None, Some(text)) => text.parse::<DType>().map_err(|fault| anyhow!("the recipe's `dtype`: {fault}"))?,
        (None, None) => stated.unwrap_or(DType::BF16),
    };
    if !dtype.is_float() {
        bail!("the element type of activations: expected f32, bf16 or f16, found {dtype}");
    }
    let weights = options.synthetic.map_or_else(|| recipe.weights.clone(), WeightSource::Synthetic);
    let limits = limits(recipe, options, &config)?;
    let specs = buckets(recipe, options, &limits)?;
    let listed = listing.cloned();
    // A plan in f32 keeps weights as the checkpoint has them, which loses nothing; a narrower plan converts all.
    let in_checkpoint = move |name: &str| -> DType {
        let fallback = stated.unwrap_or(DType::BF16);
        let bias = name.ends_with("expert_bias");
        match &listed {
            Some(listing) => listed_dtype(listing, name).unwrap_or(if bias { DType::F32 } else { fallback }),
            None if bias => DType::F32,
            None => fallback,
        }
    };
    let in_pool = |name: &str| if dtype == DType::F32 { in_checkpoint(name) } else { dtype };
    let build_options = BuildOptions {
        dtype,
        max_sequences: limits.max_sequences,
        max_context: limits.max_context,
        pages: limits.pages(),
        page_tokens: limits.page_tokens,
        ring_columns: limits.ring_columns,
        forced_routing: options.forced_routing,
    };
    let graph = build(&config, &build_options, &in_pool).map_err(|fault| anyhow!("cannot build the graph: {fault}"))?;
    let model = Model {
        name: recipe.name.clone(),
        model_type: config.model_type.clone(),
        config_hash: config.hash(),
        vocab: config.vocab,
        eos_tokens: config.eos_tokens.clone(),
        weights: weights.clone(),
        prompt: recipe.prompt.tokens().to_vec(),
        forced_routing: options.forced_routing.then(|| forced_routing(&config)).flatten(),
    };
    if let Some(token) = model.prompt.iter().find(|&&token| u64::from(token) >= model.vocab) {
        bail!("the recipe's `prompt`: expected tokens below {}, found {token}", model.vocab);
    }
    let checkpoint_dtype = Box::new(move |weight: &crate::ir::Weight| in_checkpoint(&weight.name));
    let of_phase = |phase| specs.iter().filter(|spec| spec.phase == phase).map(|spec| spec.extents.tokens).collect();
    // As compiled: with what the command line chose.
    let recipe = Recipe {
        dtype: Some(dtype.to_string()),
        prefill: Some(of_phase(Phase::Prefill)),
        decode: Some(of_phase(Phase::Decode)),
        max_sequences: Some(limits.max_sequences),
        max_context: Some(limits.max_context),
        kv_tokens: Some(limits.kv_tokens),
        weights,
        ..recipe.clone()
    };
    Ok(Unit { graph, specs, model, limits, dtype, recipe: recipe.to_text()?, checkpoint_dtype })
}

/// The choices that a model's routers would make; none if it has no experts.
fn forced_routing(config: &Config) -> Option<ForcedRouting> {
    let experts = config.layers.iter().enumerate().filter_map(|(i, layer)| match &layer.feed_forward {
        FeedForward::Experts(experts) => Some((i as u64, experts)),
        FeedForward::Dense(_) => None,
    });
    let (layers, experts): (Vec<u64>, Vec<&Experts>) = experts.unzip();
    let first = experts.first()?;
    Some(ForcedRouting { layers, experts: first.count, per_token: first.per_token })
}

pub(super) fn graph_unit(name: &str, graph: &Graph, options: &CompileOptions) -> Result<Unit> {
    crate::ir::verify(graph)?;
    let symbolic = graph.values.iter().flat_map(|value| &value.ty.shape).any(|dim| dim.sym.is_some());
    let specs = match options.prefill.as_deref() {
        None | Some([]) if symbolic => {
            bail!(OptionError("the graph has symbolic dimensions: name their size with --prefill ROWS".into()))
        }
        Some(sizes) if symbolic => sorted(sizes, "--prefill")?.into_iter().map(fixed).collect(),
        _ => vec![fixed(1)],
    };
    let model = Model {
        name: name.to_owned(),
        model_type: "graph".into(),
        config_hash: blake3::hash(graph.to_string().as_bytes()).to_hex().to_string(),
        vocab: 0,
        eos_tokens: vec![],
        weights: WeightSource::Synthetic(options.synthetic.unwrap_or(0)),
        prompt: vec![],
        forced_routing: None,
    };
    let limits = Limits { max_sequences: 1, max_context: 1, kv_tokens: 1, page_tokens: 1, ring_columns: RING_COLUMNS };
    let dtype = graph.inputs.first().map_or(DType::F32, |&input| graph.ty(input).dtype);
    Ok(Unit {
        graph: graph.clone(),
        specs,
        model,
        limits,
        dtype,
        recipe: String::new(),
        checkpoint_dtype: Box::new(|weight| weight.ty.dtype),
    })
}

fn fixed(rows: u64) -> BucketSpec {
    BucketSpec { phase: Phase::Fixed, extents: Extents { tokens: rows, sequences: rows, rows } }
}

fn limits(recipe: &Recipe, options: &CompileOptions, config: &Config) -> Result<Limits> {
    let choose = |name: &str, option: Option<u64>, recipe: Option<u64>, default: u64| {
        let value = option.or(recipe).unwrap_or(default);
        if value == 0 || value > MAX_LIMIT {
            bail!(OptionError(format!("{name}: expected 1 to {MAX_LIMIT}, found {value}")));
        }
        Ok(value)
    };
    let max_sequences = choose("--max-sequences", options.max_sequences, recipe.max_sequences, DEFAULT_DECODE[9])?;
    let context = DEFAULT_CONTEXT.min(config.max_positions.unwrap_or(DEFAULT_CONTEXT)).max(1);
    let max_context = choose("--max-context", options.max_context, recipe.max_context, context)?;
    let tokens = choose("--kv-tokens", options.kv_tokens, recipe.kv_tokens, DEFAULT_KV_TOKENS.max(max_context))?;
    Ok(Limits {
        max_sequences,
        max_context,
        kv_tokens: tokens.next_multiple_of(PAGE_TOKENS),
        page_tokens: PAGE_TOKENS,
        ring_columns: RING_COLUMNS.max((2 * config.conv_taps).next_power_of_two()),
    })
}

fn buckets(recipe: &Recipe, options: &CompileOptions, limits: &Limits) -> Result<Vec<BucketSpec>> {
    let defaults = |sizes: &[u64], limit: u64| -> Vec<u64> {
        let mut fitting: Vec<u64> = sizes.iter().copied().filter(|&size| size <= limit).collect();
        if fitting.last() != Some(&limit) && fitting.len() < sizes.len() {
            fitting.push(limit);
        }
        fitting
    };
    let all_rows = limits.max_sequences.saturating_mul(limits.max_context);
    let prefill = options.prefill.clone().or_else(|| recipe.prefill.clone());
    let prefill = prefill.unwrap_or_else(|| defaults(&DEFAULT_PREFILL, all_rows));
    // Fewer slots than the recipe has: its decode buckets are cut to them, as the defaults are.
    let fitting = |sizes: &Vec<u64>| match options.max_sequences {
        Some(limit) => defaults(sizes, limit),
        None => sizes.clone(),
    };
    let decode = options.decode.clone().or_else(|| recipe.decode.as_ref().map(fitting));
    let decode = decode.unwrap_or_else(|| defaults(&DEFAULT_DECODE, limits.max_sequences));
    let mut specs = vec![];
    for rows in sorted(&prefill, "--prefill")? {
        let sequences = rows.min(limits.max_sequences);
        specs.push(BucketSpec { phase: Phase::Prefill, extents: Extents { tokens: rows, sequences, rows: sequences } });
    }
    for sequences in sorted(&decode, "--decode")? {
        if sequences > limits.max_sequences {
            let most = limits.max_sequences;
            bail!(OptionError(format!("--decode {sequences}: expected at most --max-sequences {most}")));
        }
        let extents = Extents { tokens: sequences, sequences, rows: sequences };
        specs.push(BucketSpec { phase: Phase::Decode, extents });
    }
    if specs.is_empty() {
        bail!(OptionError("no bucket to compile: expected sizes with --prefill or --decode".into()));
    }
    Ok(specs)
}

fn sorted(sizes: &[u64], what: &str) -> Result<Vec<u64>> {
    let mut sizes = sizes.to_vec();
    sizes.sort_unstable();
    sizes.dedup();
    match sizes.iter().find(|&&size| size == 0 || size > 1 << 20) {
        Some(size) => bail!(OptionError(format!("{what}: expected sizes from 1 to {}, found {size}", 1u64 << 20))),
        None => Ok(sizes),
    }
}

/// The element type of a weight in a checkpoint's listing, under any of the forms a checkpoint may hold it in; f32, which
/// holds all others, where they are several.
fn listed_dtype(listing: &CheckpointListing, name: &str) -> Option<DType> {
    let found = tensors::listed_dtypes(listing, name);
    let first = *found.first()?;
    let same = found.iter().all(|dtype| *dtype == first);
    Some(types::graph_dtype(if same { first } else { plan::DType::F32 }))
}

fn parse_torch_dtype(name: &str) -> Result<DType> {
    match name.trim_start_matches("torch.") {
        "float32" => Ok(DType::F32),
        "float16" => Ok(DType::F16),
        "bfloat16" => Ok(DType::BF16),
        other => bail!("the configuration's `dtype`: expected float32, float16 or bfloat16, found `{other}`"),
    }
}
