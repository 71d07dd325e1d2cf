//! The types of the manifest, written in RON. They are the only description of a plan: the compiler fills them, the
//! validator checks them, the runtime obeys them.
//!
//! Sizes are in bytes or elements as the names say; shapes are row-major and constant, because a bucket fixes them.

use serde::{Deserialize, Serialize};

use crate::plan::{Collective, Kernel, Launch, Packed, Semantic, Service, Weight};

/// Version of the plan format: of the container, of these types and of what they mean.
pub const FORMAT_VERSION: u32 = 9;

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
    /// The experts of each rank, ascending, where they are spread over several; empty where there is one rank.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<Vec<u64>>,
    /// One program a rank. Several run in lockstep, as a group.
    pub ranks: Vec<Program>,
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

/// One rank's share: its pool and its buckets.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The pool's regions, in the order of their offsets.
    pub pool: Pool,
    /// Weights, in the weights region.
    pub weights: Vec<Weight>,
    /// Packed forms of some of them, by ascending weight, behind all weights in the same region.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packed: Vec<Packed>,
    /// Persistent state, in the state region.
    pub states: Vec<State>,
    /// Inputs, and results that the host reads, in the io region; shared by all buckets and sized for the largest.
    pub io: Vec<Io>,
    /// What steps compute: a table, because the layers of a model repeat.
    pub semantics: Vec<Semantic>,
    /// The buckets: prefill by ascending rows, then decode by ascending rows.
    pub buckets: Vec<Bucket>,
}

/// The regions of the pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Written once, when weights are loaded.
    pub weights: Region,
    /// Lives from step to step.
    pub state: Region,
    /// Reused within a bucket.
    pub arena: Region,
    /// Exchanged with the host.
    pub io: Region,
}

impl Pool {
    /// Bytes of the whole pool.
    pub fn bytes(&self) -> u64 {
        self.io.offset + self.io.bytes
    }
}

/// A range of the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Region {
    /// Start.
    pub offset: u64,
    /// Size.
    pub bytes: u64,
}

/// A tensor's element type and shape.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct TensorType(pub DType, pub Vec<u64>);

impl TensorType {
    /// Number of elements; `None` on overflow.
    pub fn elements(&self) -> Option<u64> {
        self.1.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim))
    }

    /// Number of bytes; `None` on overflow.
    pub fn bytes(&self) -> Option<u64> {
        self.elements()?.checked_mul(self.0.bytes())
    }
}

/// Persistent state in the pool.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Name in the graph.
    pub name: String,
    /// Element type and shape.
    pub ty: TensorType,
    /// Offset in the state region.
    pub offset: u64,
    /// What it is for.
    pub role: StateRole,
}

/// What a state is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StateRole {
    /// Keys and values of one layer, `[pages, 2, kv heads, page tokens, head size]`.
    KvPages,
    /// Convolution columns of one layer, `[slots, ring columns, channels]`; position p is in column `p % ring`.
    ConvRing,
    /// The pages of each slot, i32 `[slots, pages per sequence]`.
    BlockTable,
    /// Sampling parameters of each slot, i32 `[slots, 8]`: the bits of f32 temperature (0: greedy), top-k (0: off), bits of
    /// f32 top-p (1: off), bits of f32 min-p (0: off), the low and the high half of the seed, two unused.
    Sampling,
    /// The token chosen last for each slot, i32 `[slots]`: what a device feeds a sequence's next step with.
    LastToken,
    /// What ends each slot's sequence, i32 `[slots, 8]`: up to seven tokens (-1: none), and the last position that runs.
    Stops,
    /// Number of steps that have published tokens, one 64-bit number as i32 `[2]`.
    StepCounter,
    /// Counters by which the blocks of a launch claim work, i32 `[steps of the longest bucket]`: zeros, whenever no launch that has
    /// one is on its way.
    Claims,
}

/// A buffer exchanged with the host.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Io {
    /// Name in the graph: `tokens`, `pos`, `slot`, `rows`, `next` in a language model.
    pub name: String,
    /// Offset in the io region.
    pub offset: u64,
    /// Room, for the largest bucket.
    pub bytes: u64,
    /// True if the host writes it, false if it reads it.
    pub input: bool,
}

/// A static program for up to so many rows.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// `prefill_512`, `decode_8`.
    pub name: String,
    /// Phase.
    pub phase: Phase,
    /// Token rows, T.
    pub tokens: u64,
    /// Sequences, S.
    pub sequences: u64,
    /// Rows that get logits, R.
    pub rows: u64,
    /// Arena bytes in use at the most.
    pub arena_bytes: u64,
    /// The largest sum of live bytes: no placement needs less.
    pub arena_lower_bound: u64,
    /// The arena's buffers.
    pub buffers: Vec<Buffer>,
    /// The steps, in an order that their dependencies allow.
    pub steps: Vec<Step>,
    /// The first step of the head: from there on, steps may be run again with other `rows`, because nothing they read is
    /// overwritten by them. Equal to the number of steps in a graph without a head.
    pub head: u32,
    /// What the graph returns, by name.
    pub outputs: Vec<(String, Ref)>,
    /// Position of the section with the bucket's final IR text.
    pub text: u32,
}

/// What a bucket is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Phase {
    /// Rows of prompts: several of a sequence.
    Prefill,
    /// One row a sequence.
    Decode,
    /// A graph in text form, without rows.
    Fixed,
}

/// A buffer of the arena: name, offset in the arena region, size in bytes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Buffer(pub String, pub u64, pub u64);

/// One operator of the fused graph: on a device, one launch.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Scope and stages, such as `layers.3.conv.norm+matmul`; unique in its bucket.
    pub name: String,
    /// What it computes, in [`Program::semantics`].
    pub op: u32,
    /// For each input of the semantic.
    pub reads: Vec<Ref>,
    /// For each output of the semantic.
    pub writes: Vec<Ref>,
    /// The states among the reads that it updates.
    pub updates: Vec<u32>,
    /// Steps that must be done before; all earlier in the list.
    pub after: Vec<u32>,
    /// What it moves and computes.
    pub cost: Cost,
    /// How it runs on the device; none in a plan for the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launch: Option<Launch>,
    /// How it runs together with the other ranks, if it does; it has no launch then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collective: Option<Collective>,
}

/// A place that a step reads or writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Ref {
    /// A buffer of the bucket's arena.
    Arena(u32),
    /// A weight.
    Weight(u32),
    /// A state.
    State(u32),
    /// An io buffer.
    Io(u32),
}

/// What a step moves and computes: bytes that must cross memory once, and floating-point operations.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cost {
    /// Bytes read and written, without experts' weights and without KV history.
    pub bytes: u64,
    /// Bytes of weights for each distinct expert that the rows select.
    pub bytes_per_expert: u64,
    /// Bytes of KV history for each earlier position of each row.
    pub bytes_per_position: u64,
    /// Floating-point operations, attention over history left out.
    pub flops: u64,
    /// Bytes that this rank sends to others.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub link_bytes: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}
