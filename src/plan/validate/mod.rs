//! Every rule that a manifest must keep before anything runs it. An executor trusts what passes: all places lie inside
//! the pool, every operator's shapes fit, nothing is read before it is written, nothing live is overwritten.
//!
//! - Limits are positive and whole pages; regions are ordered, aligned and disjoint; weights, states, io and buffers lie
//!   inside their regions, aligned, and those that live for ever do not overlap.
//! - Packed forms are of weights that can have one, listed by weight, behind all weights; what a launch wants packed has one.
//! - A weight's layout takes existing tensors whose shapes add up to its own; a tensor's sources can hold it.
//! - A semantic's body takes what is written, writes each output and temporary once, and follows the shape rules of
//!   `ops`; integers are used only as what they are made for (`meaning`).
//! - A step's reads and writes have the types of its semantic; each buffer has one writer; every reader of it happens after
//!   that; two buffers share bytes only if all accesses to one happen before the other is written (`order`).
//! - The head can run again: it updates no state, and what it reads of earlier steps, like what the graph returns, lives to
//!   the end.
//! - On a device every step has a launch, of a kernel of the plan, within the device's limits, whose arguments are of its
//!   parameters' types and of the step's operands; a plan for the CPU has neither. A service's kernel takes what the runtime
//!   passes for its role.
//! - Programs of several ranks have the same buckets and io; each layer is in a stage, and each expert on a rank of every stage. Collectives
//!   have an order, which their dependencies impose; none is in the head. What some ranks do together, all of these do; what one sends,
//!   another receives; and no rank waits for one that waits for it (`exchanges`).
//! - A language model's buckets have the inputs, results and sizes that the runtime counts on.

mod bucket;
mod exchanges;
mod launch;
mod library;
mod meaning;
mod model;
mod ops;
mod order;
mod payload;
mod pool;
mod ranks;
mod rule;
mod semantic;
mod steps;

use std::collections::HashSet;
use std::fmt::{self, Display};

use crate::plan::{Manifest, Phase, TensorType};

/// A validation stops looking after so many faults.
const MAX_FAULTS: usize = 64;
/// The rank of any tensor.
const MAX_RANK: usize = 8;
/// Indices, positions and sizes are i32 on the device.
const MAX_DIM: u64 = i32::MAX as u64;
/// The pool's bytes: addresses are added without overflow, on the host too.
const MAX_BYTES: u64 = 1 << 56;

/// Something that does not hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Where: `rank 0, bucket decode_8, step layers.3.conv.matmul`.
    pub location: String,
    /// What: expected and found.
    pub message: String,
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.message)
    }
}

/// The faults found so far.
#[derive(Default)]
struct Faults(Vec<Fault>);

impl Faults {
    fn add(&mut self, location: impl Display, message: impl Into<String>) {
        if !self.full() {
            self.0.push(Fault { location: location.to_string(), message: message.into() });
        }
    }

    /// Adds a check's fault, if it found one; true if it did not.
    fn note(&mut self, location: impl Display, result: Result<(), String>) -> bool {
        match result {
            Ok(()) => true,
            Err(message) => {
                self.add(location, message);
                false
            }
        }
    }

    fn full(&self) -> bool {
        self.0.len() >= MAX_FAULTS
    }

    fn count(&self) -> usize {
        self.0.len()
    }

    /// Adds a fault for each name that is empty or not the first of its kind.
    fn unique<'a>(&mut self, location: impl Display, names: impl Iterator<Item = &'a str>) {
        let mut known = HashSet::new();
        for name in names {
            if name.is_empty() {
                self.add(&location, "an empty name");
            } else if !known.insert(name) {
                self.add(&location, format!("`{name}` is there more than once"));
            }
        }
    }
}

/// Checks a manifest against every rule; `texts` and `cubins` are the numbers of graph texts and of kernels' machine code in its
/// file.
///
/// # Errors
/// What does not hold, up to a number of faults at which nobody reads on.
pub fn validate(manifest: &Manifest, texts: usize, cubins: usize) -> Result<(), Vec<Fault>> {
    let mut faults = Faults::default();
    model::check(manifest, &mut faults);
    launch::check_kernels(manifest, cubins, &mut faults);
    // Each stage trusts the one before it, and faults in later ones would mostly be echoes.
    if faults.count() > 0 {
        return Err(faults.0);
    }
    for (rank, program) in manifest.ranks.iter().enumerate() {
        let at = format!("rank {rank}");
        let language = program.buckets.iter().any(|bucket| bucket.phase != Phase::Fixed);
        pool::check(manifest, program, language, &at, &mut faults);
        if faults.count() > 0 {
            continue;
        }
        let scratch =
            program.pool.bytes().saturating_mul(semantic::MAX_TEMPORARY_POOLS).max(semantic::MIN_TEMPORARY_LIMIT);
        let signatures: Vec<_> = program
            .semantics
            .iter()
            .enumerate()
            .filter_map(|(i, semantic)| {
                semantic::check(semantic, scratch, &format_args!("{at}, semantic {i}"), &mut faults)
            })
            .collect();
        if faults.count() > 0 {
            continue;
        }
        let context = bucket::Context { manifest, program, signatures: &signatures, texts, language };
        bucket::check_all(&context, &at, &mut faults);
    }
    if faults.count() == 0 {
        ranks::check(manifest, &mut faults);
    }
    if faults.0.is_empty() { Ok(()) } else { Err(faults.0) }
}

/// Rank, dimensions and size of a tensor; gives its bytes.
fn type_bytes(ty: &TensorType) -> Result<u64, String> {
    if ty.1.len() > MAX_RANK {
        return Err(format!("expected a rank up to {MAX_RANK}, found {}", ty.1.len()));
    }
    if let Some(dim) = ty.1.iter().find(|&&dim| dim == 0 || dim > MAX_DIM) {
        return Err(format!("expected dimensions from 1 to {MAX_DIM}, found {dim}"));
    }
    ty.bytes().filter(|&bytes| bytes <= MAX_BYTES).ok_or_else(|| format!("the size of {} overflows", Show(ty)))
}

/// A type as it is written in graphs: `bf16[8,64]`.
struct Show<'a>(&'a TensorType);

impl Display for Show<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.1.iter().map(ToString::to_string).collect();
        write!(f, "{}[{}]", format!("{:?}", self.0.0).to_lowercase(), dims.join(","))
    }
}

#[cfg(test)]
mod tests;
