//! `kernels/include/normed.cuh`: the RMSNorm of rows by the kernel that makes them, each a block's.

use super::builder::Builder;
use super::hopper::PROCESSORS;
use super::pattern::{dims, dtype, ty};
use crate::plan::{DType, Instr, Op, Semantic, Slot};

/// Threads of a block that normalises nothing.
const THREADS: u32 = 256;
/// Blocks beyond which a block does several parts.
const MOST_BLOCKS: u64 = PROCESSORS * 64;
/// Threads of a block that normalises.
const MOST_THREADS: u64 = 1024;

/// The RMSNorm of what a body makes, at its end.
pub struct Norm {
    x: Slot,
    weight: Slot,
    normed: Slot,
    eps: f64,
}

/// What a kernel makes: so many rows of so many columns.
pub struct Rows {
    pub made: Slot,
    pub count: u64,
    pub columns: u64,
}

impl Norm {
    /// The norm, if the body ends in one, and what is before it.
    pub fn split(body: &[Instr]) -> (Option<Norm>, &[Instr]) {
        match body.split_last() {
            Some((Instr(Op::RmsNorm { eps }, args, results), before)) => match (&args[..], &results[..]) {
                ([x, weight], [normed]) => (Some(Norm { x: *x, weight: *weight, normed: *normed, eps: *eps }), before),
                _ => (None, body),
            },
            _ => (None, body),
        }
    }

    /// Writes what the norm of these rows needs, or that there is none, where a thread has so many adjacent columns. What the kernel counts
    /// (packs of columns, or whole rows), blocks and threads; none if such rows cannot be normalised while they are made.
    pub fn share(
        norm: Option<&Norm>,
        builder: &mut Builder,
        semantic: &Semantic,
        rows: &Rows,
        vector: u64,
    ) -> Option<(u64, u64, u32)> {
        builder.line(format_args!("#define NORM {}", u8::from(norm.is_some())));
        let Some(norm) = norm else {
            let count = rows.count.checked_mul(rows.columns / vector)?;
            return Some((count, count.div_ceil(u64::from(THREADS)).min(MOST_BLOCKS), THREADS));
        };
        let threads = (rows.columns / vector).next_multiple_of(32);
        let widest = vector * dtype(semantic, norm.weight).bytes().max(dtype(semantic, norm.normed).bytes());
        if !norm.fits(semantic, rows) || threads > MOST_THREADS || widest > 16 {
            return None;
        }
        builder.number("EPS", norm.eps as f32);
        builder.alias("W", dtype(semantic, norm.weight)).alias("N", dtype(semantic, norm.normed));
        builder.pointer("normed", norm.normed).pointer("norm_weight", norm.weight);
        Some((rows.count, rows.count.min(MOST_BLOCKS), threads as u32))
    }

    /// Whether it is of these rows, as they are stored.
    fn fits(&self, semantic: &Semantic, rows: &Rows) -> bool {
        let whole = dims(semantic, self.weight) == Some([rows.columns])
            && ty(semantic, self.normed).1 == ty(semantic, rows.made).1;
        let places =
            matches!(self.weight, Slot::In(_)) && matches!((rows.made, self.normed), (Slot::Out(_), Slot::Out(_)));
        let types = [self.weight, self.normed].map(|slot| dtype(semantic, slot));
        self.x == rows.made && whole && places && !types.contains(&DType::I32)
    }
}
