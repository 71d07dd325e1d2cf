//! What several commands do first: find the plan, compile a recipe, fill a pool with weights.

mod compiled;
mod cpu;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::cli::device::{Device, Place};
use crate::cli::measure::is_source;
use crate::cli::output::{note, note_once};
use crate::cli::{lock, progress, usage};
use crate::codegen::recipe::{ModelSource, read_config};
use crate::codegen::select::{F32, Pack};
use crate::codegen::{CompileOptions, Recipe, Source};
use crate::cuda;
use crate::ir::DType;
use crate::passes::Target;
use crate::plan::{self, Manifest, PlanError, PlanFile, WeightSource};
use crate::runtime::Executor;
use crate::runtime::cuda::{CudaExecutor, Graphs, check_device};
use crate::runtime::weights::{self, Checkpoint, Origin};

pub use self::compiled::{compile_for_checkpoint, compile_source};
pub use self::cpu::cpu_executor;

/// What a recipe's choices can be overridden with.
#[derive(Args, Clone, Debug, Default)]
pub struct Choices {
    /// What to lower the steps for; `auto` is the GPU of this machine if it is one that kernels can be compiled for, else cpu
    #[arg(long, value_enum, default_value_t = TargetChoice::Auto)]
    pub target: TargetChoice,
    /// Element type of activations and caches [default: the recipe's, else the model's]
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeChoice>,
    /// How products of f32 are computed: as such, or, where a weight is of bf16 and rows are many, on tensor cores, each number of f32
    /// as three of bf16 that are together the number itself. What a lock file chooses goes before
    #[arg(long, value_enum, default_value_t = F32Choice::Exact)]
    pub f32: F32Choice,
    /// Keeps weights of bf16 a second time, packed to 12 bits a number without loss, for the kernels of few rows: decode moves a quarter
    /// less, the weights take two thirds more room
    #[arg(long)]
    pub pack: bool,
    /// Rows of the prefill buckets [default: the recipe's, else 16 to 8192]
    #[arg(long, value_delimiter = ',', value_name = "ROWS,...")]
    pub prefill: Option<Vec<u64>>,
    /// Sequences of the decode buckets [default: the recipe's, else 1 to 512]
    #[arg(long, value_delimiter = ',', value_name = "SEQUENCES,...")]
    pub decode: Option<Vec<u64>>,
    /// Draws the weights with this seed instead of reading a checkpoint: for measurements
    #[arg(long, value_name = "SEED", conflicts_with = "model")]
    pub synthetic: Option<u64>,
    /// Sequences that can be in work at a time; more wait in a queue
    #[arg(long, value_name = "N")]
    pub max_sequences: Option<u64>,
    /// Longest sequence, prompt and new tokens together
    #[arg(long, value_name = "N")]
    pub max_context: Option<u64>,
    /// Positions of all sequences together that the KV cache holds
    #[arg(long, value_name = "N")]
    pub kv_tokens: Option<u64>,
    /// Spreads the experts over ranks, with all else on each: `expert=2`; or the layers, in as many stages: `pipeline=2`. The plan then has a
    /// program for each of them, and runs on as many ranks, or a multiple of that, under `mpirun`
    #[arg(long, value_name = "expert=N|pipeline=N", value_parser = ranks)]
    pub ranks: Option<Spread>,
    /// Counts of choices that `lfm2c run` has written: experts are spread such that the ranks get as equally many rows as can be
    #[arg(long, value_name = "FILE", requires = "ranks")]
    pub expert_counts: Option<PathBuf>,
    /// Gives each rank up to N more of the experts, those of other ranks that take most rows from the busiest: the ranks that have an expert
    /// share its rows
    #[arg(long, value_name = "N", requires = "expert_counts")]
    pub expert_replicas: Option<u64>,
    /// Leaves a pass out; may be repeated
    #[arg(long, value_name = "NAME")]
    pub disable_pass: Vec<String>,
    /// Makes the choice of experts an input, for `verify` with a golden file that holds the reference's choices
    #[arg(long)]
    pub forced_routing: bool,
    /// Leaves machine code out of a plan for a GPU, which then only the CPU executor can run; needs no CUDA compiler
    #[arg(long)]
    pub without_cubins: bool,
    /// Applies only the first N patches of each bucket's pipeline, to find a bad one by bisection
    #[arg(long, value_name = "N")]
    pub stop_after_patch: Option<usize>,
    /// Ignores the lock file beside a recipe (FILE.lock.ron): the choices among kernels that `compile --tune` made
    #[arg(long)]
    pub no_lock: bool,
}

/// `--target`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(non_camel_case_types)]
pub enum TargetChoice {
    /// What can run here.
    #[default]
    Auto,
    /// The CPU executor.
    Cpu,
    /// NVIDIA Hopper.
    #[value(name = "sm_90a")]
    Sm_90a,
}

/// `--dtype`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum DTypeChoice {
    F32,
    Bf16,
    F16,
}

/// `--f32`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub enum F32Choice {
    #[default]
    Exact,
    Split,
}

impl Choices {
    /// As options of the compile driver.
    pub fn options(&self) -> CompileOptions {
        CompileOptions {
            target: match self.target {
                TargetChoice::Auto if has_hopper() => Target::Sm90a,
                TargetChoice::Auto | TargetChoice::Cpu => Target::Cpu,
                TargetChoice::Sm_90a => Target::Sm90a,
            },
            dtype: self.dtype.map(|dtype| match dtype {
                DTypeChoice::F32 => DType::F32,
                DTypeChoice::Bf16 => DType::BF16,
                DTypeChoice::F16 => DType::F16,
            }),
            f32: if self.f32 == F32Choice::Split { F32::Split } else { F32::Exact },
            pack: if self.pack { Pack::Asked } else { Pack::Never },
            prefill: self.prefill.clone(),
            decode: self.decode.clone(),
            synthetic: self.synthetic,
            max_sequences: self.max_sequences,
            max_context: self.max_context,
            kv_tokens: self.kv_tokens,
            disabled: self.disable_pass.clone(),
            stop_after_patch: self.stop_after_patch,
            forced_routing: self.forced_routing,
            without_cubins: self.without_cubins,
            expert_ranks: self.ranks.unwrap_or_default().experts,
            pipeline_ranks: self.ranks.unwrap_or_default().layers,
            expert_counts: self.expert_counts.clone(),
            expert_replicas: self.expert_replicas.unwrap_or(0),
            ..CompileOptions::default()
        }
    }

    /// As options of the compile driver, with the choices of the lock file beside what is to be compiled; nothing is beside
    /// what is compiled already.
    pub fn options_for(&self, path: &Path) -> Result<CompileOptions> {
        let options = self.options();
        if self.no_lock || !is_source(path) { Ok(options) } else { lock::apply(options, path) }
    }
}

/// `--ranks`: how many ranks each is spread over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spread {
    experts: u64,
    layers: u64,
}

impl Default for Spread {
    fn default() -> Self {
        Spread { experts: 1, layers: 1 }
    }
}

/// The value of `--ranks`.
fn ranks(text: &str) -> Result<Spread, String> {
    let mut spread = Spread::default();
    for part in text.split(',') {
        let number = |name: &str| part.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
        match (number("expert"), number("pipeline")) {
            (Some(count), _) => spread.experts = count,
            (_, Some(count)) => spread.layers = count,
            _ => {
                return Err(format!(
                    "expected expert=N or pipeline=N with a whole number N, such as expert=2, found `{text}`"
                ));
            }
        }
    }
    Ok(spread)
}

/// True if the first GPU is of the kind that kernels are compiled for.
fn has_hopper() -> bool {
    cuda::Device::count() > 0 && cuda::Device::open(0).is_ok_and(|device| device.capability == (9, 0))
}

/// The options that compile a plan's recipe again: it has the sizes and types as compiled; passes left out are not known.
pub fn choices_of(manifest: &Manifest) -> CompileOptions {
    CompileOptions {
        target: match manifest.target {
            plan::Target::Cpu => Target::Cpu,
            plan::Target::Sm_90a => Target::Sm90a,
        },
        forced_routing: manifest.model.forced_routing.is_some(),
        expert_ranks: manifest.experts.len().max(1) as u64,
        pipeline_ranks: manifest.stages.len().max(1) as u64,
        ..CompileOptions::default()
    }
}

/// The source that a path or `--model` names. A recipe's own directory, or `--model` beside it, gives the checkpoint's
/// element types, if the weights are not drawn.
pub fn source(path: Option<&Path>, model: Option<&Path>, synthetic: Option<u64>) -> Result<Source> {
    let recipe = match (path, model) {
        (Some(path), _) if has_extension(path, "ir") => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            let graph = crate::ir::parse(&text).with_context(|| format!("in {}", path.display()))?.graph;
            return Ok(Source::Graph(graph.name.clone(), Box::new(graph)));
        }
        (Some(path), model) => {
            let mut recipe = Recipe::read(path)?;
            if let Some(model) = model {
                recipe.model = ModelSource::Directory(model.to_owned());
                recipe.weights = WeightSource::Checkpoint;
            }
            if let Some(seed) = synthetic {
                recipe.weights = WeightSource::Synthetic(seed);
            }
            recipe
        }
        (None, Some(model)) => Recipe::for_directory(model),
        (None, None) => return usage("expected a recipe (FILE.ron) or --model DIR"),
    };
    recipe_source(recipe)
}

/// A recipe with the element types of its checkpoint, if it names one.
pub fn recipe_source(recipe: Recipe) -> Result<Source> {
    let checkpoint = match (&recipe.weights, recipe.directory()) {
        (WeightSource::Checkpoint, Some(directory)) => {
            read_config(directory)?;
            Some(Checkpoint::open(directory)?.listing())
        }
        _ => None,
    };
    Ok(Source::Recipe(Box::new(recipe), checkpoint))
}

/// Position of the bucket of that name.
pub fn find_bucket(names: &[&str], wanted: &str) -> Result<usize> {
    match names.iter().position(|name| *name == wanted) {
        Some(at) => Ok(at),
        None => usage(format!("--bucket {wanted}: expected one of {}", names.join(", "))),
    }
}

/// A plan from a plan file, or compiled on the spot from a recipe or a graph.
pub fn plan(path: &Path, model: Option<&Path>, options: &CompileOptions) -> Result<PlanFile> {
    if is_source(path) {
        let source = source(Some(path), model, options.synthetic)?;
        let compiled = compile_for_checkpoint(&source, options, &|options| compile_source(&source, options))?;
        if !options.tactics.chosen.is_empty()
            && let Some(line) = lock::report(path, &compiled)
        {
            note_once(line);
        }
        return Ok(compiled.file);
    }
    if *options != Choices::default().options() {
        return usage(format!(
            "{} is compiled already: --target, --dtype, --pack, --synthetic, --ranks, bucket sizes, limits and passes are choices of \
             `lfm2c compile`",
            path.display()
        ));
    }
    let file = read_plan(path)?;
    if let Some(model) = model {
        check_identity(&file.manifest, model)?;
    }
    Ok(file)
}

/// Reads a plan file; every error names it.
pub fn read_plan(path: &Path) -> Result<PlanFile> {
    match PlanFile::read(path) {
        Err(error @ PlanError::File { .. }) => Err(error.into()),
        result => result.with_context(|| path.display().to_string()),
    }
}

/// Refuses a model directory that a plan was not made for.
fn check_identity(manifest: &Manifest, model: &Path) -> Result<()> {
    let found = read_config(model)?.hash();
    if found != manifest.model.config_hash {
        bail!(
            "the plan was compiled for another model: expected `{}` with configuration {}, found configuration {} in {}; \
             compile a plan for this model with `lfm2c compile --model {}`",
            manifest.model.name,
            short(&manifest.model.config_hash),
            short(&found),
            model.display(),
            model.display(),
        );
    }
    Ok(())
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// An executor with its weights loaded: from `model`, from the directory in the plan's recipe, or synthetic.
pub fn executor(
    file: &PlanFile,
    model: Option<&Path>,
    place: impl Into<Place>,
    graphs: Graphs,
) -> Result<Box<dyn Executor>> {
    let place = place.into();
    if place.device.is_cuda(&file.manifest) {
        return Ok(Box::new(executor_on_gpu(file, model, &place, graphs)?));
    }
    if graphs == Graphs::Required {
        bail!("--require-graphs: the CPU executor has no CUDA graphs; leave the option out, or run on a GPU");
    }
    cpu::executor(file, model, place.groups)
}

/// As [`executor`], with every graph captured that would be when first needed, so that what is timed is running.
pub fn prepared_executor(
    file: &PlanFile,
    model: Option<&Path>,
    place: impl Into<Place>,
    graphs: Graphs,
) -> Result<Box<dyn Executor>> {
    let place = place.into();
    if !place.device.is_cuda(&file.manifest) {
        return executor(file, model, place, graphs);
    }
    let mut executor = executor_on_gpu(file, model, &place, graphs)?;
    match executor.capture_all() {
        // A bucket without a graph runs step by step, and that is told when it does.
        Err(error) if graphs == Graphs::Required => Err(error),
        _ => Ok(Box::new(executor)),
    }
}

/// The CUDA executor of a plan of one rank on the first GPU, with its weights loaded.
pub fn cuda_executor(file: &PlanFile, model: Option<&Path>, graphs: Graphs) -> Result<CudaExecutor> {
    one_rank(&file.manifest)?;
    executor_on_gpu(file, model, &Device::Cuda.into(), graphs)
}

/// The CUDA executor of this rank of a plan, with its weights loaded, and joined with those of the others if there are such.
pub fn executor_on_gpu(file: &PlanFile, model: Option<&Path>, place: &Place, graphs: Graphs) -> Result<CudaExecutor> {
    check_device(&file.manifest, None)?;
    let ranks = file.manifest.ranks.len();
    let group = match &place.groups {
        _ if ranks == 1 => None,
        Some(groups) => Some(groups(ranks)?),
        None => bail!(
            "the plan's ranks: expected {ranks} processes with a GPU each, found one; start it with `mpirun -n {ranks}`, or run it with \
             --device cpu"
        ),
    };
    let device = cuda::Device::open(place.gpu)?;
    let rank = group.as_ref().map_or(0, |group| group.rank());
    let mut executor = CudaExecutor::new(file, rank, &device, graphs)?;
    executor.on_announcement(|text| note(format_args!("lfm2c: {text}")));
    let bar = progress::bytes("loading weights", weights::total_bytes(executor.program()));
    with_origin(file, model, |origin| executor.load(origin, &|done| bar.set_position(done)))?;
    bar.finish_and_clear();
    match group {
        Some(group) => executor.with_group(group, place.road),
        None => Ok(executor),
    }
}

/// Refuses a plan of several ranks where one at a time is looked at.
pub fn one_rank(manifest: &Manifest) -> Result<()> {
    match manifest.ranks.len() {
        1 => Ok(()),
        found => bail!(
            "plan `{}`: expected a program for one rank, found programs for {found}; compile it without --ranks for this command",
            manifest.model.name
        ),
    }
}

/// Calls with where the weights come from.
fn with_origin(file: &PlanFile, model: Option<&Path>, load: impl FnOnce(Origin) -> Result<()>) -> Result<()> {
    let manifest = &file.manifest;
    let directory = match (model, &manifest.model.weights) {
        (None, &WeightSource::Synthetic(seed)) => return load(Origin::Synthetic(seed)),
        (Some(model), _) => model.to_owned(),
        (None, WeightSource::Checkpoint) => {
            // Not what the plan was given, so it may have changed since.
            let directory = recipe_directory(file)?;
            check_identity(manifest, &directory)?;
            directory
        }
    };
    load(Origin::Checkpoint(&Checkpoint::open(&directory)?))
}

fn recipe_directory(file: &PlanFile) -> Result<PathBuf> {
    let directory = Recipe::parse(&file.recipe).ok().and_then(|recipe| recipe.directory().map(Path::to_owned));
    match directory {
        Some(directory) if directory.is_dir() => Ok(directory),
        _ => usage(
            "this plan's weights come from a checkpoint: name its directory with --model DIR, or have them drawn with --synthetic SEED \
             where the plan is made",
        ),
    }
}

/// True if a path ends in `.extension`.
pub fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}
