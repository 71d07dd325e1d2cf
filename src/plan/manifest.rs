//! The types of the manifest, written in RON; those of a rank's program stand in `program`. They are the only description of a
//! plan: the compiler fills them, the validator checks them, the runtime obeys them.
//!
//! Sizes are in bytes or elements as the names say; shapes are row-major and constant, because a bucket fixes them.

use serde::{Deserialize, Serialize};

pub use crate::plan::program::*;
use crate::plan::{Kernel, Service};

/// Version of the plan format: of the container, of these types and of what they mean.
pub const FORMAT_VERSION: u32 = 11;

/// Alignment of every buffer in the pool, in bytes.
pub const ALIGNMENT: u64 = 256;

/// Columns of the sampling parameter table; see [`StateRole::Sampling`].
pub const SAMPLING_COLUMNS: u64 = 8;

/// Columns of the table of stops; see [`StateRole::Stops`].
pub const STOP_COLUMNS: u64 = 8;

/// A whole plan, without its texts and machine code.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the compiler that wrote it.
    pub compiler: String,
    /// What the plan computes.
    pub model: Model,
    /// What it runs on. The CPU executor runs every plan.
    pub target: Target,
    /// Version of the CUDA toolkit that compiled its kernels, major and minor; none without machine code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toolkit: Option<(u32, u32)>,
    /// Element type of activations and caches.
    pub dtype: DType,
    /// What the plan holds room for.
    pub limits: Limits,
    /// The tensors it needs from a checkpoint.
    pub tensors: Vec<Tensor>,
    /// The kernels that steps launch; none in a plan for the CPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<Kernel>,
    /// The kernels that the runtime launches by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
    /// The experts of each rank, ascending, where they are spread over the ranks of each stage, or over all where there are no stages; else
    /// empty. Each is on one of these ranks or more, which then run it for different rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<Vec<u64>>,
    /// The layers of each stage, the first and the one behind the last, where layers are spread over ranks; else empty. Each stage is on as
    /// many ranks ([`Manifest::stage_ranks`]), neighbours by number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<(u64, u64)>,
    /// One program a rank. Several run in lockstep, as a group.
    pub ranks: Vec<Program>,
}

impl Manifest {
    /// Ranks of a stage, which have the same layers and may have other experts: all, where there are no stages.
    pub fn stage_ranks(&self) -> usize {
        self.ranks.len() / self.stages.len().max(1)
    }

    /// What runs a step on a device, as tables call it: its kernel, its library, or `exchange`; none in a plan for the CPU.
    pub fn runner(&self, step: &Step) -> Option<String> {
        match (&step.launch, step.library) {
            (Some(launch), _) => self.kernels.get(launch.kernel as usize).map(Kernel::title),
            (None, Some(call)) => Some(call.name().to_owned()),
            (None, None) => step.collective.as_ref().filter(|_| self.target != Target::Cpu).map(|_| "exchange".into()),
        }
    }
}

/// Identity of the model.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Name from the recipe or the directory.
    pub name: String,
    /// `model_type` of the configuration; for a graph in text form, `graph`.
    pub model_type: String,
    /// BLAKE3 of the normalised configuration, in hexadecimal: a checkpoint directory must agree.
    pub config_hash: String,
    /// Vocabulary size.
    pub vocab: u64,
    /// Token ids that end a sequence.
    pub eos_tokens: Vec<u32>,
    /// Where weights come from.
    pub weights: WeightSource,
    /// The recipe's own prompt as token ids, used when a run is given none; if it is a text, the plan's recipe has it.
    pub prompt: Vec<u32>,
    /// If present, routers choose no experts: the input `experts.N`, i32 `[T, experts a token]` for layer N, says them.
    #[serde(default)]
    pub forced_routing: Option<ForcedRouting>,
}

/// Shape of the choices of a plan with forced routing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForcedRouting {
    /// The layers with experts, ascending.
    pub layers: Vec<u64>,
    /// Experts of a layer.
    pub experts: u64,
    /// Experts a token.
    pub per_token: u64,
}

impl ForcedRouting {
    /// Name of a layer's input.
    pub fn input(layer: u64) -> String {
        format!("experts.{layer}")
    }
}

/// Where weights come from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum WeightSource {
    /// A checkpoint directory, named when the plan runs.
    Checkpoint,
    /// Numbers from a counter, with this seed.
    Synthetic(u64),
}

/// What a plan's steps are lowered for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(non_camel_case_types)]
pub enum Target {
    /// The CPU executor.
    Cpu,
    /// NVIDIA Hopper.
    Sm_90a,
}

/// Element type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// Two's complement 32-bit integer.
    I32,
}

impl DType {
    /// Size of an element in bytes.
    pub fn bytes(self) -> u64 {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

/// What a plan holds room for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Sequence slots.
    pub max_sequences: u64,
    /// Positions of one sequence.
    pub max_context: u64,
    /// Positions of all sequences together, in whole pages.
    pub kv_tokens: u64,
    /// Positions of one page.
    pub page_tokens: u64,
    /// Columns of a slot's convolution state.
    pub ring_columns: u64,
}

impl Limits {
    /// The most positions that one sequence can have, were it alone.
    pub fn longest(&self) -> u64 {
        self.max_context.min(self.kv_tokens)
    }

    /// Pages in the pool.
    pub fn pages(&self) -> u64 {
        self.kv_tokens / self.page_tokens
    }

    /// Entries of one row of the block table.
    pub fn pages_per_sequence(&self) -> u64 {
        self.max_context.div_ceil(self.page_tokens)
    }
}

/// A tensor of the checkpoint, under the name the model's documentation gives it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// The name; for experts, one tensor for all of them, such as `model.layers.2.feed_forward.experts.w1.weight`.
    pub name: String,
    /// Element type in the checkpoint; loading refuses another.
    pub dtype: DType,
    /// Where a checkpoint holds one tensor for each index and these differ in type: the type of each. Else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub index_dtypes: Vec<DType>,
    /// Shape.
    pub shape: Vec<u64>,
    /// The forms in which a checkpoint may hold it, any one of them.
    pub sources: Vec<TensorSource>,
    /// The numbers of a synthetic checkpoint.
    pub synthetic: Synthetic,
}

impl Tensor {
    /// The types that its elements may have in a checkpoint.
    pub fn dtypes(&self) -> impl Iterator<Item = DType> {
        std::iter::once(self.dtype).chain(self.index_dtypes.iter().copied())
    }
}

/// How a checkpoint holds a tensor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum TensorSource {
    /// As one tensor of the same number of elements; dimensions of size 1 may be added.
    Whole(String),
    /// As one tensor for each index of the first axis: `{}` in the name stands for the index.
    PerIndex(String),
    /// As part of a tensor: the indices `start..start + shape[1]` of its second axis, whose size is `of`.
    Part {
        /// The tensor's name.
        name: String,
        /// First index.
        start: u64,
        /// Size of the second axis in the checkpoint.
        of: u64,
    },
}

/// Element i is `center + scale * u(i)`, rounded to the tensor's type, where `u(i)` is a uniform number in [-1, 1) from the
/// counter (seed, salt, i); see `runtime::synthetic`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Synthetic {
    /// Tells tensors apart.
    pub salt: u64,
    /// Mean.
    pub center: f32,
    /// Half width.
    pub scale: f32,
}
