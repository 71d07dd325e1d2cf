//! What several commands do first: find the plan, compile a recipe, fill a pool with weights.

mod choices;
mod compiled;
mod cpu;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cli::device::{Device, Neighbours, Place};
use crate::cli::measure::is_source;
use crate::cli::output::{note, note_once};
use crate::cli::table::size;
use crate::cli::{lock, progress, usage};
use crate::codegen::recipe::{ModelSource, read_config};
use crate::codegen::{CompileOptions, Recipe, Source};
use crate::cuda;
use crate::plan::{EXCHANGE_RANKS, Manifest, PlanError, PlanFile, WeightSource};
use crate::runtime::Executor;
use crate::runtime::cuda::{CudaExecutor, Graphs, check_device};
use crate::runtime::weights::{self, Checkpoint, Origin, share};

pub use self::choices::{Choices, TargetChoice, choices_of};
pub use self::compiled::{compile_for_checkpoint, compile_source};
pub use self::cpu::cpu_executor;

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
            "{} is compiled already: --target, --dtype, --pack, --libraries, --synthetic, --ranks, bucket sizes, limits and passes are choices of \
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

/// The CUDA executor of a plan's first rank on the first GPU, with its weights loaded: if there are others, it exchanges with itself, so that
/// its steps can be timed.
pub fn first_rank_alone(file: &PlanFile, model: Option<&Path>, graphs: Graphs) -> Result<CudaExecutor> {
    if file.manifest.ranks.len() == 1 {
        return cuda_executor(file, model, graphs);
    }
    experts_alone(&file.manifest)?;
    check_device(&file.manifest, None)?;
    loaded_on_gpu(file, model, (0, &Device::Cuda.into()), graphs)?.looped()
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
    let rank = group.as_ref().map_or(0, |group| group.rank());
    let executor = loaded_on_gpu(file, model, (rank, place), graphs)?;
    match group {
        Some(group) => executor.with_group(group, place.road),
        None => Ok(executor),
    }
}

/// The CUDA executor of a rank's program, with its weights loaded.
fn loaded_on_gpu(
    file: &PlanFile,
    model: Option<&Path>,
    (rank, place): (usize, &Place),
    graphs: Graphs,
) -> Result<CudaExecutor> {
    let device = cuda::Device::open(place.gpu)?;
    let mut executor = CudaExecutor::new(file, rank, &device, graphs)?;
    executor.on_announcement(|text| note(format_args!("lfm2c: {text}")));
    let bar = progress::bytes("loading weights", weights::total_bytes(executor.program()));
    let read = |executor: &mut CudaExecutor| {
        with_origin(file, model, |origin| executor.load(origin, &|done| bar.set_position(done)))
    };
    let loaded = match &place.neighbours {
        None => read(&mut executor).map(|()| vec![])?,
        Some(Neighbours { rank, host, sharing }) => {
            executor.load_with(&mut *host.borrow_mut(), *rank, *sharing, &read)?
        }
    };
    bar.finish_and_clear();
    // The first rank of the host tells for all of them.
    if let (Some(own), Some(first)) = (&place.neighbours, loaded.first())
        && own.rank == first.rank
    {
        let bytes = executor.program().pool.weights.bytes;
        note(format_args!("weights, {} for rank {}: {}", size(bytes), own.rank, share::in_words(&loaded)));
    }
    Ok(executor)
}

/// Refuses a plan of several ranks where one at a time is looked at.
pub fn one_rank(manifest: &Manifest) -> Result<()> {
    match manifest.ranks.len() {
        1 => Ok(()),
        found => bail!(
            "plan `{}`: expected a program for one rank, found programs for {found}; compile it without --ranks for this command, or, to bench \
             it, start it with `mpirun -n {found}` or name parts with --block",
            manifest.model.name
        ),
    }
}

/// Refuses a plan of which no rank can be looked at by itself: one whose layers are spread, or with more ranks than kernels exchange between.
pub fn experts_alone(manifest: &Manifest) -> Result<()> {
    let (name, stages, ranks) = (&manifest.model.name, manifest.stages.len(), manifest.ranks.len() as u64);
    if stages > 1 {
        bail!(
            "plan `{name}`: expected all layers on each rank, found them in {stages} stages; compile it without pipeline={stages} for this \
             command"
        );
    }
    match most_alone(ranks) {
        Some(most) => bail!(
            "plan `{name}`: expected at most {most} ranks, of which one can be looked at by itself, found {ranks}; compile it with \
             expert={most} for this command"
        ),
        None => Ok(()),
    }
}

/// The most ranks of which one can exchange with itself, if these are more.
pub fn most_alone(ranks: u64) -> Option<u64> {
    let most = *EXCHANGE_RANKS.end();
    (ranks > most).then_some(most)
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
