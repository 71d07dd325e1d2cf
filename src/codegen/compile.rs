//! The compile driver: description to graph, graph through the passes for each bucket, everything into one plan file.

mod unit;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};

use crate::codegen::cubins::{self, Compilation};
use crate::codegen::expert_placement::Balance;
use crate::codegen::expert_ranks::expert_ranks;
use crate::codegen::kernel_table::KernelTable;
use crate::codegen::lower::{self, TensorTable};
use crate::codegen::pipeline::{Pipeline, Share};
use crate::codegen::pipeline_ranks::pipeline_ranks;
use crate::codegen::select::{Allowed, F32, Known, Libraries, Pack, Selector, Tactics};
use crate::codegen::{Recipe, services, types};
use crate::ir::{DType, Graph};
use crate::passes::driver::PassReport;
use crate::passes::{LayerShare, Target, names};
use crate::plan::{self, Manifest, PlanFile};

use self::unit::{Unit, graph_unit, model_unit};

/// Choices of the command line; each that is given overrides the recipe's.
#[derive(Clone, PartialEq, Debug)]
pub struct CompileOptions {
    /// What to lower for.
    pub target: Target,
    /// Element type of activations.
    pub dtype: Option<DType>,
    /// Rows of the prefill buckets.
    pub prefill: Option<Vec<u64>>,
    /// Sequences of the decode buckets.
    pub decode: Option<Vec<u64>>,
    /// Seed of drawn weights, in place of a checkpoint's.
    pub synthetic: Option<u64>,
    /// Sequence slots.
    pub max_sequences: Option<u64>,
    /// Positions of one sequence.
    pub max_context: Option<u64>,
    /// Positions of all sequences together.
    pub kv_tokens: Option<u64>,
    /// Passes left out, by name.
    pub disabled: Vec<String>,
    /// Applies only so many patches in each bucket's pipeline, to find a bad one.
    pub stop_after_patch: Option<usize>,
    /// Makes the choice of experts an input, to compare runs with the choices of a reference.
    pub forced_routing: bool,
    /// Choices among kernels.
    pub tactics: Tactics,
    /// Ranks that experts are spread over; 1 if each has all of its layers.
    pub expert_ranks: u64,
    /// Stages of neighbouring layers, each on `expert_ranks` ranks; 1 if each rank has all layers.
    pub pipeline_ranks: u64,
    /// File of how often each expert was chosen ([`plan::ExpertCounts`]), by which they are spread.
    pub expert_counts: Option<PathBuf>,
    /// How many experts a rank may have beyond its share, each one that another rank has too; they are chosen by the counts.
    pub expert_replicas: u64,
    /// How products of f32 are computed that tactics do not choose a kernel for.
    pub f32: F32,
    /// Which weights get a packed form.
    pub pack: Pack,
    /// Whether steps may be calls of libraries, where tactics choose them.
    pub libraries: Libraries,
    /// Names of weights that get none, because they do not pack.
    pub unpacked: BTreeSet<String>,
    /// Leaves machine code out of a plan for a device, which then only the CPU executor can run; needs no CUDA compiler.
    pub without_cubins: bool,
}

impl CompileOptions {
    /// What candidates may use.
    pub fn allowed(&self) -> Allowed {
        Allowed { pack: self.pack, libraries: self.libraries }
    }
}

impl Default for CompileOptions {
    fn default() -> Self {
        CompileOptions {
            target: Target::Cpu,
            dtype: None,
            prefill: None,
            decode: None,
            synthetic: None,
            max_sequences: None,
            max_context: None,
            kv_tokens: None,
            disabled: vec![],
            stop_after_patch: None,
            forced_routing: false,
            expert_ranks: 1,
            pipeline_ranks: 1,
            expert_counts: None,
            expert_replicas: 0,
            tactics: Tactics::default(),
            f32: F32::default(),
            pack: Pack::default(),
            libraries: Libraries::default(),
            unpacked: BTreeSet::new(),
            without_cubins: false,
        }
    }
}

/// What to compile.
pub enum Source {
    /// A model; with the checkpoint's listing (name to element type and shape) if there is a checkpoint at hand.
    Recipe(Box<Recipe>, Option<CheckpointListing>),
    /// Any graph in text form, by name.
    Graph(String, Box<Graph>),
}

/// Element types and shapes of a checkpoint's tensors, by name.
pub type CheckpointListing = BTreeMap<String, (plan::DType, Vec<u64>)>;

/// A plan with what compiling it did.
pub struct Compiled {
    /// The plan.
    pub file: PlanFile,
    /// The passes before the buckets.
    pub once: Vec<PassReport>,
    /// The passes of each bucket, in the plan's order.
    pub buckets: Vec<BucketReport>,
    /// Steps of the graph as built, one an operator.
    pub unfused_steps: usize,
    /// What compiling the kernels did.
    pub kernels: Compilation,
    /// How many of the choices among kernels were those of the options' tactics.
    pub known: Known,
    /// How evenly experts are spread, if their choices were counted.
    pub balance: Option<Balance>,
}

/// What the passes did in one bucket.
pub struct BucketReport {
    /// The bucket's name.
    pub name: String,
    /// What each pass did.
    pub passes: Vec<PassReport>,
    /// Problems of fused operators that tactics may want apart, by [`crate::codegen::select::problem_key`].
    pub optional: BTreeSet<String>,
}

/// An option of the command line that no model could be compiled with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OptionError(pub(super) String);

/// What is told of the work as it goes on.
pub trait Observer: Sync {
    /// A pass is done, for rank 0; `bucket` is none before the buckets.
    fn pass(&self, _bucket: Option<&str>, _pass: &str, _graph: &Graph) {}
    /// `done` of `total` buckets are compiled.
    fn progress(&self, _done: usize, _total: usize) {}
    /// `done` of `total` kernels are machine code.
    fn kernels(&self, _done: usize, _total: usize) {}
}

/// Hears nothing.
pub struct Silent;
impl Observer for Silent {}

/// Refuses choices among kernels for a target that has none: they would be without effect.
fn for_kernels_alone(options: &CompileOptions) -> Result<()> {
    let asked = [
        ("--pack", options.pack != Pack::Never),
        ("--libraries", options.libraries != Libraries::Never),
        ("--f32 split", options.f32 != F32::Exact),
    ];
    match asked.into_iter().find(|(_, is)| *is && options.target == Target::Cpu) {
        None => Ok(()),
        Some((option, _)) => bail!(OptionError(format!(
            "{option}: expected a plan for a GPU, whose kernels it is for, found one for the CPU; leave it out, or add --target sm_90a"
        ))),
    }
}

/// Compiles a model or a graph.
///
/// # Errors
/// An unusable description or option, an unknown pass, or a pass that broke the graph.
pub fn compile(source: &Source, options: &CompileOptions, observer: &dyn Observer) -> Result<Compiled> {
    let unit = match source {
        Source::Recipe(recipe, listing) => model_unit(recipe, listing.as_ref(), options)?,
        Source::Graph(name, graph) => graph_unit(name, graph, options)?,
    };
    if let Some(unknown) = options.disabled.iter().find(|name| !names().contains(&name.as_str())) {
        let known = names().join(", ");
        bail!(OptionError(format!("--disable-pass {unknown}: expected one of {known}")));
    }
    for_kernels_alone(options)?;
    let stages = pipeline_ranks(source, options, &unit.graph)?;
    let spread = expert_ranks(source, options, &stages)?;
    let experts = spread.experts();
    let Unit { graph, specs, checkpoint_dtype, .. } = unit;
    let unfused_steps = graph.ops.len();
    let selector = (options.target != Target::Cpu).then(|| {
        Selector::new(&options.tactics, options.f32, options.allowed())
            .with_experts(&experts)
            .leaving(&options.unpacked)
    });
    let pipeline = Pipeline {
        options,
        observer,
        specs: &specs,
        selector: selector.as_ref(),
        ranks: experts.len().max(stages.len()).max(1),
    };
    let (mut once, mut buckets, mut texts) = (vec![], vec![], vec![]);
    let (mut tensors, mut programs, mut kernels) = (TensorTable::default(), vec![], KernelTable::default());
    for rank in 0..pipeline.ranks {
        let width = pipeline.ranks / stages.len().max(1);
        let of_layers = (!stages.is_empty()).then(|| LayerShare { rank, width, stages: stages.clone() });
        let share = Share { experts: spread.share(rank), layers: of_layers };
        let passed = pipeline.run(graph.clone(), share, rank, &mut texts)?;
        let program = lower::lower(&passed.prepared, &*checkpoint_dtype, selector.as_ref(), &mut kernels, &mut tensors)
            .map_err(|fault| anyhow!(fault))?;
        programs.push(program);
        if rank == 0 {
            (once, buckets) = (passed.once, passed.buckets);
        }
    }
    let mut tensors = tensors.tensors;
    let known = selector.as_ref().map_or(Known::default(), |selector| selector.known(&programs));
    if let Source::Recipe(_, Some(listing)) = source {
        tensors.iter_mut().for_each(|tensor| super::tensors::note_mixed(tensor, listing));
    }
    let KernelTable { kernels, mut sources, .. } = kernels;
    let mut manifest = Manifest {
        compiler: env!("CARGO_PKG_VERSION").to_owned(),
        model: unit.model,
        target: match options.target {
            Target::Cpu => plan::Target::Cpu,
            Target::Sm90a => plan::Target::Sm_90a,
        },
        toolkit: None,
        dtype: types::plan_dtype(unit.dtype),
        limits: unit.limits,
        tensors,
        kernels,
        services: vec![],
        experts,
        stages: stages.into_iter().map(|stage| (stage.start, stage.end)).collect(),
        ranks: programs,
    };
    let (mut cubins, mut compilation) = (vec![], Compilation::default());
    if options.target != Target::Cpu {
        services::add(&mut manifest, &mut sources);
        if !options.without_cubins {
            (cubins, compilation) =
                cubins::build(manifest.target, &sources, &|done, total| observer.kernels(done, total))?;
            manifest.toolkit = Some(compilation.toolkit);
            manifest.kernels.iter_mut().zip(0..).for_each(|(kernel, i)| kernel.cubin = Some(i));
        }
    }
    let file = PlanFile { manifest, recipe: unit.recipe, texts, cubins };
    file.validate()
        .context("the compiled plan does not hold: its sizes are beyond the format, or this is a bug of lfm2c")?;
    Ok(Compiled { file, once, buckets, unfused_steps, kernels: compilation, known, balance: spread.balance })
}
