//! `flash`: attention of packed rows by warpgroups, keys and values copied by the copy engine.

use super::builder::{Builder, Specialised};
use super::heads::{Attend, same_half};
use super::hopper::{ALL_SHARED, MOST_SHARED, PROCESSORS, SYSTEM_SHARED};
use super::pattern::{dtype, only};
use super::{Problem, Twin};
use crate::plan::{Phase, Slot};

/// The twin.
pub struct Flash;

/// Lines of a warpgroup: its rows times the query heads that share a KV head.
const LINES: u64 = 64;
/// Query heads of a KV head in one block: more would leave few rows to a block.
const MOST_SHARE: u64 = 16;
/// The size of heads: a row of keys is one span of the copy engine's permutation.
const HEAD: u64 = 64;
const ROW_BYTES: u64 = 128;
/// Rows of the atoms that products read.
const ATOM: u64 = 8;
const MOST_STAGES: u64 = 4;
/// Blocks from which on larger tiles pay.
const ENOUGH_BLOCKS: u64 = PROCESSORS * 2;

/// A way to divide the work.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Shape {
    /// Multiplying warpgroups.
    groups: u64,
    /// Positions at a time.
    keys: u64,
    /// Blocks on a multiprocessor.
    resident: u64,
    /// Copying warps.
    copiers: u64,
    /// Registers of the threads that copy and that multiply, where the latter need more than there are for each: together no
    /// more than a block begins with.
    registers: Option<(u64, u64)>,
    /// Whether a tile's exponentials are taken while the products of the tile before are under way, which takes registers.
    exponentials_first: bool,
}

const THREE: Shape =
    Shape { groups: 3, keys: 128, resident: 1, copiers: 2, registers: Some((32, 160)), exponentials_first: false };
const TWO: Shape =
    Shape { groups: 2, keys: 128, resident: 1, copiers: 2, registers: Some((40, 232)), exponentials_first: true };
const FOUR: Shape =
    Shape { groups: 4, keys: 64, resident: 1, copiers: 2, registers: Some((32, 112)), exponentials_first: false };
const TWICE_ONE: Shape =
    Shape { groups: 1, keys: 128, resident: 2, copiers: 2, registers: None, exponentials_first: false };
const THRICE_ONE: Shape =
    Shape { groups: 1, keys: 64, resident: 3, copiers: 1, registers: None, exponentials_first: true };

impl Twin for Flash {
    fn name(&self) -> &'static str {
        "flash"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/flash.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let large = [THREE, TWO, FOUR, TWICE_ONE, THRICE_ONE];
        let small = [THRICE_ONE, TWICE_ONE, TWO, THREE, FOUR];
        let found = |shapes: [Shape; 5]| -> Vec<Specialised> {
            shapes.iter().filter_map(|shape| shape.specialise(problem)).collect()
        };
        let list = found(large);
        match list.first() {
            Some(first) if u64::from(first.launch.grid[0]) < ENOUGH_BLOCKS => found(small),
            _ => list,
        }
    }
}

impl Shape {
    fn threads(&self) -> u64 {
        // Registers are given away and taken by whole warpgroups.
        self.groups * 128 + if self.registers.is_some() { 128 } else { self.copiers * 32 }
    }

    /// Buffers of keys, and of values, and shared memory in all.
    fn memory(&self, rows: u64) -> Option<(u64, u64)> {
        let most = MOST_SHARED.min(ALL_SHARED / self.resident - SYSTEM_SHARED);
        let fixed = self.groups * LINES * ROW_BYTES + 2 * rows * 4;
        let stage = 2 * self.keys * ROW_BYTES + 4 * 8;
        let stages = (most.checked_sub(fixed)? / stage).min(MOST_STAGES);
        (stages >= 2).then_some((stages, stages * stage + fixed))
    }

    fn specialise(&self, problem: &Problem) -> Option<Specialised> {
        let semantic = problem.semantic;
        let attend = Attend::of(semantic, only(semantic)?)?;
        let Slot::In(_) = attend.q else { return None };
        let half = same_half(dtype(semantic, attend.q), dtype(semantic, attend.cache.kv))?;
        let (page, cache) = (attend.cache.page, &attend.cache);
        let box_rows = page.min(self.keys);
        // Tiles and pages divide each other, at atoms.
        let paged =
            box_rows.is_multiple_of(ATOM) && self.keys.is_multiple_of(box_rows) && page.is_multiple_of(box_rows);
        // The cache's rows are counted in 32 bits.
        let counted = super::pattern::ty(semantic, cache.kv).1.iter().rev().skip(1).product::<u64>() < 1 << 31;
        if cache.head != HEAD || !paged || !counted || problem.phase == Phase::Decode || attend.scale <= 0.0 {
            return None;
        }
        let share = attend.share(MOST_SHARE)?;
        let rows = self.groups * (LINES / share);
        let blocks = attend.rows.div_ceil(rows) * cache.kv_heads * (attend.group() / share);
        let (stages, shared) = self.memory(rows)?;
        if blocks > i32::MAX as u64 {
            return None;
        }
        let mut builder = Builder::new(problem);
        attend.constants(&mut builder, share);
        builder
            .constant("GROUPS", self.groups)
            .constant("KEYS", self.keys)
            .constant("BOX", box_rows)
            .constant("STAGES", stages)
            .constant("RESIDENT", self.resident)
            .constant("COPIERS", self.copiers)
            // Scores count in powers of two.
            .number("SCALE", attend.scale * std::f32::consts::LOG2_E);
        builder.line(format_args!("constexpr bool EXPONENTIALS_FIRST = {};", self.exponentials_first));
        builder.line(format_args!("#define MANY_REGISTERS {}", u8::from(self.registers.is_some())));
        if let Some((copy, multiply)) = self.registers {
            builder.constant("COPY_REGISTERS", copy).constant("PRODUCT_REGISTERS", multiply);
        }
        builder.line(format_args!("typedef {half} T;"));
        let name = if half == "f16" { "f16" } else { "bf16" };
        for (function, adds) in [("scores_first", false), ("scores_more", true)] {
            builder.line(scores(function, name, self.keys, adds));
        }
        builder.line(sums(name));
        builder.pointer("q", attend.q).row_map("kv_map", cache.kv, box_rows as u32);
        cache.parameters(&mut builder, false);
        builder.pointer("y", attend.y).int("rows", attend.rows);
        let config = format!("groups={} keys={} blocks={}", self.groups, self.keys, self.resident);
        Some(builder.finish(config, [blocks, 1, 1], self.threads() as u32, shared))
    }
}

/// `"f"(name[0]), ...` of an operand with this constraint, and the numbers that an instruction calls them by.
fn registers(count: u64, constraint: &str, name: &str) -> (String, String) {
    let list = |item: &dyn Fn(u64) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
    (list(&|i| format!("%{i}")), list(&|i| format!("\"{constraint}\"({name}[{i}])")))
}

/// The instruction for scores of so many keys, both operands in shared memory: sets them, or adds to them.
fn scores(function: &str, name: &str, keys: u64, adds: bool) -> String {
    let count = keys / 2;
    let (places, bound) = registers(count, if adds { "+f" } else { "=f" }, "d");
    format!(
        "__device__ __forceinline__ void {function}(float (&d)[{count}], unsigned long long q, unsigned long long k) {{\n    asm \
         volatile(\"wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.{name}.{name} {{{places}}}, %{count}, %{}, {}, 1, 1, 0, 0;\" \
         : {bound} : \"l\"(q), \"l\"(k));\n}}",
        count + 1,
        u8::from(adds)
    )
}

/// The instruction for sums of values: probabilities in registers, values as they lie, a row for each position.
fn sums(name: &str) -> String {
    let count = HEAD / 2;
    let (places, bound) = registers(count, "+f", "d");
    format!(
        "__device__ __forceinline__ void sums_more(float (&d)[{count}], const unsigned (&p)[4], unsigned long long v) {{\n    asm \
         volatile(\"wgmma.mma_async.sync.aligned.m64n{HEAD}k16.f32.{name}.{name} {{{places}}}, {{%{count}, %{}, %{}, %{}}}, %{}, \
         1, 1, 1, 1;\" : {bound} : \"r\"(p[0]), \"r\"(p[1]), \"r\"(p[2]), \"r\"(p[3]), \"l\"(v));\n}}",
        count + 1,
        count + 2,
        count + 3,
        count + 4
    )
}

#[cfg(test)]
mod tests;
