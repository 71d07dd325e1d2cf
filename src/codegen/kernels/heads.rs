//! What the kernels around attention have in common: the paged cache, attention's operands, and heads on their way to both.

use super::builder::{Builder, c_number, c_type};
use super::pattern::{args, dims, dtype, results, rows_and_last};
use crate::plan::{DType, Instr, Op, Semantic, Slot};

/// A step's cache of keys and values with what says which position of it a row is of.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cache {
    /// The state `[pages, 2, kv_heads, page, head]`.
    pub kv: Slot,
    /// Block table.
    pub table: Slot,
    /// Positions of the rows.
    pub pos: Slot,
    /// Slots of the rows.
    pub slot: Slot,
    /// KV heads.
    pub kv_heads: u64,
    /// Positions of a page.
    pub page: u64,
    /// Size of a head.
    pub head: u64,
    /// Entries of the block table for a slot.
    pub pages_per_slot: u64,
}

impl Cache {
    /// The cache in these operands: state, block table, positions, slots.
    pub fn of(semantic: &Semantic, operands: [Slot; 4]) -> Option<Cache> {
        let [kv, table, pos, slot] = operands;
        let ([_, 2, kv_heads, page, head], [_, pages_per_slot]) = (dims(semantic, kv)?, dims(semantic, table)?) else {
            return None;
        };
        let types = operands.map(|slot| dtype(semantic, slot));
        let typed = types[0] != DType::I32 && types[1..] == [DType::I32; 3];
        let sized = kv_heads > 0 && page > 0 && head > 0 && page * head <= i32::MAX as u64;
        (typed && sized && operands.iter().all(is_input)).then_some(Cache {
            kv,
            table,
            pos,
            slot,
            kv_heads,
            page,
            head,
            pages_per_slot,
        })
    }

    /// Constants and types, without parameters.
    pub fn constants(&self, builder: &mut Builder) {
        let kv = builder.ty(self.kv).0;
        builder.alias("KV", kv).constant("KV_HEADS", self.kv_heads).constant("PAGE", self.page);
        builder.constant("D", self.head).constant("PAGES_PER_SLOT", self.pages_per_slot);
    }

    /// Parameters; the cache itself as a state that is written, or as one that is read.
    pub fn parameters(&self, builder: &mut Builder, written: bool) {
        if written {
            builder.state("kv", self.kv);
        } else {
            builder.pointer("kv", self.kv);
        }
        builder.pointer("table", self.table).pointer("pos", self.pos).pointer("slot", self.slot);
    }
}

fn is_input(slot: &Slot) -> bool {
    matches!(slot, Slot::In(_))
}

/// An attention over a cache.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Attend {
    /// Queries `[rows, heads * head]`.
    pub q: Slot,
    /// Result, an output.
    pub y: Slot,
    /// Keys and values.
    pub cache: Cache,
    /// Query heads.
    pub heads: u64,
    /// Factor on the scores.
    pub scale: f32,
    /// Rows.
    pub rows: u64,
}

impl Attend {
    /// The attention that an instruction computes into an output.
    pub fn of(semantic: &Semantic, instr: &Instr) -> Option<Attend> {
        let Op::Attention { heads, scale } = instr.0 else { return None };
        let ([q, kv, table, pos, slot], [y @ Slot::Out(_)]) = (args(instr)?, results(instr)?) else { return None };
        let cache = Cache::of(semantic, [kv, table, pos, slot])?;
        let (rows, width) = rows_and_last(semantic, q);
        let fits = heads > 0 && heads.is_multiple_of(cache.kv_heads) && width == heads * cache.head;
        let typed = dtype(semantic, q) != DType::I32 && rows_and_last(semantic, y) == (rows, width);
        (fits && typed).then_some(Attend { q, y, cache, heads, scale: scale as f32, rows })
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> u64 {
        self.heads / self.cache.kv_heads
    }

    /// The most query heads of a group that are at most `limit` and divide it.
    pub fn share(&self, limit: u64) -> Option<u64> {
        (1..=limit.min(self.group())).rev().find(|share| self.group().is_multiple_of(*share))
    }

    /// Constants of the heads, `share` of a group in a block, and the type of the result.
    pub fn constants(&self, builder: &mut Builder, share: u64) {
        self.cache.constants(builder);
        let y = builder.ty(self.y).0;
        builder.constant("HEADS", self.heads).constant("GROUP", self.group()).constant("SHARE", share).alias("Y", y);
    }
}

/// Where heads come from: an input, or a part of each of its rows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Raw {
    slot: Slot,
    /// Elements of a row of the input, and before the part.
    stride: u64,
    at: u64,
    dtype: DType,
    width: u64,
}

/// Heads that are normalised, then rotated.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Turned {
    raw: Raw,
    weight: Slot,
    eps: f32,
    normed: DType,
    rotated: DType,
    theta: f64,
}

/// Queries and keys normalised by heads and rotated, keys and values written to the cache.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prepared {
    /// The cache that is written.
    pub cache: Cache,
    /// Query heads.
    pub heads: u64,
    /// Rows.
    pub rows: u64,
    q: Turned,
    k: Turned,
    v: Raw,
}

impl Prepared {
    /// What a body does to give the queries `q`, beside `others` instructions that the caller knows; none if there is
    /// anything else in it.
    pub fn of(semantic: &Semantic, q: Slot, others: usize) -> Option<Prepared> {
        let body = Body { semantic };
        let write = semantic.body.iter().find(|Instr(op, ..)| matches!(op, Op::KvWrite))?;
        let [key, value, kv, table, pos, slot] = args(write)?;
        let cache = Cache::of(semantic, [kv, table, pos, slot])?;
        let (q, k) = (body.turned(q, &cache)?, body.turned(key, &cache)?);
        let (v, split) = body.raw(value)?;
        // With a split all come from the one; without, there is none.
        let splits = semantic.body.iter().filter(|Instr(op, ..)| matches!(op, Op::Split { .. })).count();
        let known = 5 + usize::from(split) + others;
        let together = [q.1, k.1, value].iter().all(|slot| is_input(slot) != split) && splits == usize::from(split);
        let (rows, width) = (rows_and_last(semantic, q.1).0, cache.kv_heads * cache.head);
        let (q, k) = (q.0, k.0);
        let fits = k.raw.width == width && v.width == width && q.raw.width.is_multiple_of(cache.head);
        let same = q.theta == k.theta && semantic.body.len() == known;
        (together && fits && same).then_some(Prepared { cache, heads: q.raw.width / cache.head, rows, q, k, v })
    }

    /// Elements of half a head.
    pub fn half(&self) -> u64 {
        self.cache.head / 2
    }

    /// Constants, types and the table of frequencies, then parameters: queries, keys, values and the weights of norms.
    pub fn declare(&self, builder: &mut Builder) {
        builder.constant("HALF", self.half());
        for (name, head) in [("Q", &self.q), ("K", &self.k)] {
            builder.alias(&format!("X{name}"), head.raw.dtype).alias(&format!("N{name}"), head.normed);
            builder.alias(&format!("R{name}"), head.rotated).number(&format!("{name}_EPS"), head.eps);
        }
        for (name, raw) in [("Q", self.q.raw), ("K", self.k.raw), ("V", self.v)] {
            builder.constant(&format!("{name}_STRIDE"), raw.stride).constant(&format!("{name}_AT"), raw.at);
        }
        declare_frequencies(builder, self.q.theta, self.cache.head);
        builder.pointer("q_in", self.q.raw.slot).pointer("k_in", self.k.raw.slot).pointer("v_in", self.v.slot);
        builder.pointer("q_weight", self.q.weight).pointer("k_weight", self.k.weight);
    }
}

struct Body<'a> {
    semantic: &'a Semantic,
}

impl Body<'_> {
    /// The instruction that makes a temporary or an output.
    fn maker(&self, slot: Slot) -> Option<&Instr> {
        self.semantic.body.iter().find(|Instr(_, _, made)| made.contains(&slot))
    }

    /// Heads that a norm and a rotation make, and the slot of what they are made of.
    fn turned(&self, slot: Slot, cache: &Cache) -> Option<(Turned, Slot)> {
        let rope = self.maker(slot)?;
        let (Op::Rope { theta, head_dim }, [normed, pos]) = (&rope.0, args(rope)?) else { return None };
        let norm = self.maker(normed)?;
        let (Op::RmsNorm { eps }, [x, weight]) = (&norm.0, args(norm)?) else { return None };
        let (raw, _) = self.raw(x)?;
        let by_heads = *head_dim == cache.head && dims(self.semantic, weight)? == [cache.head] && is_input(&weight);
        let typed = dtype(self.semantic, weight) != DType::I32 && cache.head.is_multiple_of(2);
        (by_heads && typed && pos == cache.pos).then_some((
            Turned {
                raw,
                weight,
                eps: *eps as f32,
                normed: dtype(self.semantic, normed),
                rotated: dtype(self.semantic, slot),
                theta: *theta,
            },
            x,
        ))
    }

    /// Where a value lies: an input, or, with true, a part of one.
    fn raw(&self, slot: Slot) -> Option<(Raw, bool)> {
        let width = rows_and_last(self.semantic, slot).1;
        let dtype = dtype(self.semantic, slot);
        if is_input(&slot) {
            return Some((Raw { slot, stride: width, at: 0, dtype, width }, false));
        }
        let split = self.maker(slot)?;
        let (Op::Split { block: None }, [x @ Slot::In(_)]) = (&split.0, args(split)?) else { return None };
        let before = split.2.iter().take_while(|part| **part != slot);
        let at = before.map(|&part| rows_and_last(self.semantic, part).1).sum();
        Some((Raw { slot: x, stride: rows_and_last(self.semantic, x).1, at, dtype, width }, true))
    }
}

/// How a group of lanes holds one half of a head: elements of a vector, at most `widest`, and lanes.
pub fn halves(half: u64, widest: u64) -> (u64, u64) {
    let vector = [4, 2, 1].into_iter().find(|&v| v <= widest && half.is_multiple_of(v)).unwrap_or(1);
    (vector, (half / vector).next_power_of_two().min(32))
}

/// Frequencies of the rotation, `FREQUENCIES[head / 2]`: the numbers of the CPU's executor, to the bit.
pub fn declare_frequencies(builder: &mut Builder, theta: f64, head: u64) {
    let frequency = |i: u64| 1.0 / (theta as f32).powf((2 * i) as f32 / head as f32);
    let list: Vec<String> = (0..head / 2).map(|i| c_number(frequency(i))).collect();
    builder.line(format_args!("__device__ const float FREQUENCIES[{}] = {{{}}};", list.len(), list.join(", ")));
}

/// Elements of a type that one load takes of a row of `width`.
pub fn vector(dtype: DType, width: u64) -> u64 {
    let most = 16 / dtype.bytes();
    [8, 4, 2, 1].into_iter().find(|&v| v <= most && width.is_multiple_of(v)).unwrap_or(1)
}

/// The type with which the products of two types are computed on tensor cores, if they are.
pub fn same_half(a: DType, b: DType) -> Option<&'static str> {
    (a == b && super::pattern::is_half(a)).then(|| c_type(a))
}

#[cfg(test)]
pub mod testing;
