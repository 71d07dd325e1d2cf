//! What a recipe's choices can be overridden with on the command line.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::cli::lock;
use crate::cli::measure::is_source;
use crate::codegen::CompileOptions;
use crate::codegen::select::{F32, Libraries, Pack};
use crate::cuda;
use crate::ir::DType;
use crate::passes::Target;
use crate::plan::{self, Manifest};

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
    /// Lets steps of prompts be calls of a library where a lock file says that it is faster; the plan then needs the library wherever it runs
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,...")]
    pub libraries: Vec<LibraryChoice>,
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
    /// Spreads the experts over ranks, with all else on each: `expert=2`; or the layers, in as many stages: `pipeline=2`; or both, the experts
    /// over the ranks of each stage: `expert=2,pipeline=2`. The plan then has a program for each of them, and runs on as many ranks, or a
    /// multiple of that, under `mpirun`
    #[arg(long, value_name = "expert=M,pipeline=K", value_parser = ranks)]
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

/// `--libraries`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LibraryChoice {
    /// cuBLASLt, for dense products
    Cublaslt,
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
            libraries: if self.libraries.is_empty() { Libraries::Never } else { Libraries::Asked },
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

/// `--ranks`: over how many ranks experts are spread, and over how many stages layers.
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
    let mut names = vec![];
    for part in text.split(',') {
        let name = part.split('=').next().unwrap_or_default();
        if names.contains(&name) {
            return Err(format!("expected `{name}` once, found it twice in `{text}`"));
        }
        names.push(name);
        let number = |name: &str| part.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
        match (number("expert"), number("pipeline")) {
            (Some(count), _) => spread.experts = count,
            (_, Some(count)) => spread.layers = count,
            _ => {
                return Err(format!(
                    "expected expert=N or pipeline=N with a whole number N, such as expert=2, or both with a comma between, found `{text}`"
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
        expert_ranks: if manifest.experts.is_empty() { 1 } else { manifest.stage_ranks() as u64 },
        pipeline_ranks: manifest.stages.len().max(1) as u64,
        ..CompileOptions::default()
    }
}
