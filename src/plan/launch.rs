//! Kernels and launches: how a plan's steps run on a device.

use serde::{Deserialize, Serialize};

use crate::plan::{DType, EXCHANGE_PARTS, EXCHANGE_RANKS, Ref, Step};

/// A specialised kernel, compiled for the plan's target.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Its symbol, which is the name of its source file in `kernels/`.
    pub name: String,
    /// What it was specialised to, for a person to read.
    pub config: String,
    /// BLAKE3 of everything that it was compiled from, in hexadecimal.
    pub source: String,
    /// Its parameters, in order.
    pub params: Vec<Param>,
    /// Position of its machine code among the plan's; none in a plan that was lowered without a compiler, which only the CPU
    /// executor can run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cubin: Option<u32>,
}

impl Kernel {
    /// What tables and tactics call it: `stream rows=16 warps=8`.
    pub fn title(&self) -> String {
        format!("{} {}", self.name, self.config).trim_end().to_owned()
    }
}

/// A kernel's parameter: name and type.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Param(pub String, pub ParamType);

/// What a kernel takes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum ParamType {
    /// The address of elements that it reads.
    In(DType),
    /// The address of elements that it writes, or reads and writes.
    Out(DType),
    /// A 32-bit integer.
    Int,
    /// A 64-bit integer.
    Long,
    /// A binary32 number.
    Float,
    /// What the device's copy engine is told of a tensor that the kernel reads: 128 bytes, by value.
    Map(DType),
}

impl ParamType {
    /// Size in bytes.
    pub fn bytes(self) -> usize {
        match self {
            ParamType::Map(_) => 128,
            ParamType::In(_) | ParamType::Out(_) | ParamType::Long => 8,
            ParamType::Int | ParamType::Float => 4,
        }
    }
}

/// A kernel that the runtime launches by itself: what it is for, and its position in [`crate::plan::Manifest::kernels`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Service(pub ServiceRole, pub u32);

/// What the runtime needs kernels for, with the parameters that it passes, in order. Blocks have [`SERVICE_THREADS`] threads
/// along x and no dynamic shared memory; but for [`ServiceRole::Advance`], any number of blocks does the work.
///
/// Element i of a tensor is the weight's element `i / part * whole + i % part / run * stride + offset + i % part % run`;
/// `runtime::weights::places` gives the numbers for a layout. Eight elements move at a time where `first` and the five numbers
/// are multiples of eight and the addresses of 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum ServiceRole {
    /// Makes elements `first..first + count` of a synthetic tensor of the first type, stored as the second: `to Out(second)`
    /// (the weight), `first Long`, `count Long`, `key Long`, `center Float`, `scale Float`, `part Long`, `whole Long`,
    /// `run Long`, `stride Long`, `offset Long`.
    Synthesize(DType, DType),
    /// Puts elements `first..first + count` of a tensor of the first type into a weight of the second, rounded to nearest: `to
    /// Out(second)` (the weight), `from In(first)` (the first of these elements, in memory of the device or mapped to it), `first
    /// Long`, `count Long`, `part Long`, `whole Long`, `run Long`, `stride Long`, `offset Long`.
    Place(DType, DType),
    /// Takes the tokens that a step chose, tells the host, and makes the next step's inputs of them; one block. `next In(I32)`,
    /// `tokens Out(I32)`, `pos Out(I32)`, `slot Out(I32)`, `rows In(I32)`, `last Out(I32)` (a token for each slot), `stops
    /// In(I32)` (`[slots, 8]`), `ring Long` (address of u64 `[depth, width]`, in memory that the host reads), `number Long`
    /// (address of a u64, zero at first), `count Int` (rows of `next` and `rows`), `moves Int` (0: leaves the inputs as they are),
    /// `depth Int`, `width Int`. What they mean is told in `kernels/advance.cu`.
    Advance,
    /// Packs a weight of bf16 (see [`super::packed`]): `to Out(I32)` (its packed form), `from In(BF16)` (the weight), `rows Long`,
    /// `columns Long`, `failed Out(I32)` (rows that do not pack are added to it).
    Pack,
    /// Fills in the tokens that the host did not know when it started a step: `tokens Out(I32)`, `pos Out(I32)`,
    /// `slot Out(I32)`, `last In(I32)`, `count Int` (rows of the inputs). See `kernels/advance.cu`.
    Feed,
    /// Exchanges parts with the other ranks of the host, so many ranks and parts, through [areas](super::exchange) that each has mapped
    /// of the others; all their blocks run at once. Addresses as `Long`: `own` (this rank's area), `peer0`, `peer1`, ... (those of the
    /// ranks after it, around); for each part `from0 Long`, `to0 Long` (addresses), `bytes0 Long` (even: to each rank, this one
    /// included), ...; `slots Long` (where slots for it begin in an area), `slot Long` (bytes of one), `rank Int`, `blocks Int` (0: all
    /// ranks get the same; 1: rank i gets block i of `from`), `wide Int` (0 or 1; with 1, all ranks launch as many blocks). What rank i sends becomes block i of `to`.
    Exchange(u64, u64),
}

impl ServiceRole {
    /// Whether there is such a kernel.
    pub fn is_possible(self) -> bool {
        match self {
            ServiceRole::Exchange(ranks, parts) => EXCHANGE_RANKS.contains(&ranks) && EXCHANGE_PARTS.contains(&parts),
            _ => true,
        }
    }

    /// The types of its parameters, in order; none of one that is not possible.
    pub fn params(self) -> Vec<ParamType> {
        use ParamType::{Float, In, Int, Long, Out};
        const I32: DType = DType::I32;
        match self {
            ServiceRole::Synthesize(_, weight) => {
                vec![Out(weight), Long, Long, Long, Float, Float, Long, Long, Long, Long, Long]
            }
            ServiceRole::Place(tensor, weight) => {
                vec![Out(weight), In(tensor), Long, Long, Long, Long, Long, Long, Long]
            }
            ServiceRole::Advance => {
                let rows = [In(I32), Out(I32), Out(I32), Out(I32), In(I32), Out(I32), In(I32)];
                [&rows[..], &[Long, Long, Int, Int, Int, Int]].concat()
            }
            ServiceRole::Pack => vec![Out(I32), In(DType::BF16), Long, Long, Out(I32)],
            ServiceRole::Feed => vec![Out(I32), Out(I32), Out(I32), In(I32), Int],
            ServiceRole::Exchange(ranks, parts) if self.is_possible() => {
                let addresses = vec![Long; (ranks + 3 * parts) as usize];
                [&addresses[..], &[Long, Long, Int, Int, Int]].concat()
            }
            ServiceRole::Exchange(..) => vec![],
        }
    }
}

/// Threads of a block of a service.
pub const SERVICE_THREADS: u32 = 256;

/// How a step runs on the device.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Position in [`crate::plan::Manifest::kernels`].
    pub kernel: u32,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, along x.
    pub block: u32,
    /// Blocks along x that form a cluster.
    pub cluster: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// Whether it may start before the step before it is done; the kernel itself waits.
    pub dependent: bool,
    /// Whether its blocks let the next kernel start only once they have waited themselves, so that when that starts, all steps
    /// but this one are done.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub releases_late: bool,
    /// Positions of the reads, beside weights, that it reads before it waits, because they are [`settled`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub early: Vec<u32>,
    /// What its parameters are, in order.
    pub args: Vec<Arg>,
}

/// A kernel's argument.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub enum Arg {
    /// The address of the step's read of this position.
    Read(u32),
    /// The address of the step's write of this position.
    Write(u32),
    /// The address of the packed form of the weight that is the step's read of this position: see [`super::packed`].
    Packed(u32),
    /// A 32-bit integer.
    Int(i32),
    /// A 64-bit integer.
    Long(i64),
    /// A number.
    Float(f32),
    /// A 32-bit integer: 1 if there are [`Launch::early`] reads, else 0.
    Early,
    /// The address of this counter of [`StateRole::Claims`](super::StateRole::Claims), which no other step of the bucket has.
    Claim(u32),
    /// How boxes of one of the step's reads are copied; the runtime makes the driver's form of it.
    Map(TensorMap),
}

/// A tensor as the copy engine sees it: a read of the step, or a part of it from its beginning on, cut into boxes. Axes are listed
/// from the innermost, whose elements are adjacent. Elements of a box outside of the tensor are zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorMap {
    /// Position among the step's reads.
    pub read: u32,
    /// Elements along each axis.
    pub sizes: [u64; 3],
    /// Bytes from one to the next along the second and the third axis.
    pub strides: [u64; 2],
    /// Elements of a box along each axis.
    pub tile: [u32; 3],
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
    /// How much is brought into the L2 cache where a part of it is asked for.
    pub promotion: Promotion,
}

/// How a box's rows of so many bytes lie in shared memory: chunks of 16 bytes permuted within so many bytes by their row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Swizzle {
    /// As they are.
    None,
    /// Within 32 bytes.
    Bytes32,
    /// Within 64 bytes.
    Bytes64,
    /// Within 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Bytes of a box's row, at the most.
    pub fn span(self) -> Option<u64> {
        match self {
            Swizzle::None => None,
            Swizzle::Bytes32 => Some(32),
            Swizzle::Bytes64 => Some(64),
            Swizzle::Bytes128 => Some(128),
        }
    }
}

/// Bytes that are brought into the L2 cache together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Promotion {
    /// What is asked for.
    None,
    /// 64 bytes.
    Bytes64,
    /// 128 bytes.
    Bytes128,
    /// 256 bytes.
    Bytes256,
}

/// Whether some reads of the last of some steps are sure to be there when its kernel starts, which is as soon as the step before
/// lets it. That is so of what no step before writes, and in a chain, if the step before has itself waited for all others by
/// then, of what that step does not write.
pub fn settled(steps: &[Step], reads: &[u32]) -> bool {
    let [.., before, step] = steps else { return false };
    let chain = steps.iter().zip(0u32..).skip(1).all(|(step, i)| step.after.contains(&(i - 1)));
    let late = before.launch.as_ref().is_some_and(|launch| launch.releases_late);
    let touches = |other: &Step, place: &Ref| match place {
        Ref::State(state) => other.updates.contains(state),
        place => other.writes.contains(place),
    };
    let there = |&i: &u32| {
        let Some(place) = step.reads.get(i as usize) else { return false };
        let given =
            matches!(place, Ref::State(_) | Ref::Io(_)) && !steps[..steps.len() - 1].iter().any(|s| touches(s, place));
        given || (chain && late && !touches(before, place))
    };
    reads.iter().all(there)
}
