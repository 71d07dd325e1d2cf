//! The types of a rank's program: its pool and what lies there, its buckets, and their steps.

use serde::{Deserialize, Serialize};

use crate::plan::{Collective, DType, Launch, LibraryCall, Packed, Semantic, Weight};

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
    /// Keys and values of one layer, or of one layer for the rows of one rank, `[pages, 2, kv heads, page tokens, head size]`.
    KvPages,
    /// Convolution columns of one layer, or of one layer for the rows of one rank, `[slots, ring columns, channels]`; position p is in column `p % ring`.
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
    /// What sends and receives of a rank update, i32 `[1]`, so that they have an order. Nothing is stored there.
    Link,
    /// Counters by which the blocks of a launch claim work, i32 `[steps of the longest bucket]`: zeros, whenever no launch that has
    /// one is on its way.
    Claims,
    /// What libraries' calls work in, i32 `[bytes / 4]`: nothing is kept there from one call to the next.
    Workspace,
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

/// One operator of the fused graph: on a device one launch, what ranks do together, or a library's call.
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
    /// The library's function that it is on the device, if it is one; it has no launch then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<LibraryCall>,
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
