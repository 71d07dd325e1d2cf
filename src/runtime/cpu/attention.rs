//! The paged cache of keys and values, and causal attention over it.

use anyhow::{Context, Result, ensure};

use super::parallel::{SMALL, chunks};
use super::tensor::{View, dims, dot, store_f32};
use crate::plan::TensorType;

/// Which page holds which position of a slot, and where in the cache.
pub(super) struct Pages<'a> {
    table: &'a [i32],
    /// Entries of one slot's row.
    per_slot: usize,
    pages: usize,
    kv_heads: usize,
    page_tokens: usize,
    head_dim: usize,
}

impl<'a> Pages<'a> {
    pub(super) fn new(kv_ty: &TensorType, table: &'a [i32], table_ty: &TensorType) -> Result<Self> {
        let ([pages, halves, kv_heads, page_tokens, head_dim], [_, per_slot]) = (dims(kv_ty)?, dims(table_ty)?);
        ensure!(
            halves == 2 && kv_heads > 0 && page_tokens > 0 && head_dim > 0,
            "a cache {kv_ty:?}, not [pages, 2, kv heads, page tokens, head size]"
        );
        Ok(Pages { table, per_slot, pages, kv_heads, page_tokens, head_dim })
    }

    /// The page with this index of a slot.
    fn page(&self, slot: usize, index: usize) -> Result<usize> {
        ensure!(index < self.per_slot, "slot {slot} has {} pages, position in page {index}", self.per_slot);
        let page = self.table.get(slot * self.per_slot + index).copied().unwrap_or(-1);
        usize::try_from(page).ok().filter(|&page| page < self.pages).with_context(|| {
            format!("block table of slot {slot}: page {page} at {index}, of {} pages; set its pages first", self.pages)
        })
    }

    /// Offset in elements of the first token of a page, for keys (half 0) or values (half 1) of a head.
    fn offset(&self, page: usize, half: usize, kv_head: usize) -> usize {
        ((page * 2 + half) * self.kv_heads + kv_head) * self.page_tokens * self.head_dim
    }

    /// For each row with a slot, where its keys and values go: row, offset of a head's key, and of its value.
    pub(super) fn destinations(&self, pos: &[i32], slots: &[i32]) -> Result<Vec<(usize, usize, usize)>> {
        let mut list = Vec::with_capacity(slots.len() * self.kv_heads);
        for (row, (&pos, &slot)) in pos.iter().zip(slots).enumerate() {
            let (Ok(slot), Ok(pos)) = (usize::try_from(slot), usize::try_from(pos)) else { continue };
            let page = self.page(slot, pos / self.page_tokens)?;
            let token = pos % self.page_tokens * self.head_dim;
            for head in 0..self.kv_heads {
                list.push((row, self.offset(page, 0, head) + token, self.offset(page, 1, head) + token));
            }
        }
        Ok(list)
    }
}

/// Writes keys and values `[rows, kv heads * head size]` where [`Pages::destinations`] says.
pub(super) fn write(
    k: &[f32],
    v: &[f32],
    destinations: &[(usize, usize, usize)],
    kv: &mut [u8],
    kv_ty: &TensorType,
) -> Result<()> {
    let [_, _, kv_heads, _, head_dim] = dims(kv_ty)?;
    let size = kv_ty.0.bytes() as usize;
    for (i, &(row, key, value)) in destinations.iter().enumerate() {
        let from = (row * kv_heads + i % kv_heads) * head_dim;
        for (source, to) in [(k, key), (v, value)] {
            let source = source.get(from..from + head_dim).context("fewer keys or values than rows")?;
            let to = kv.get_mut(to * size..(to + head_dim) * size).context("a page outside of the cache")?;
            store_f32(source, kv_ty.0, to)?;
        }
    }
    Ok(())
}

/// Attention of each row over positions `0..=pos` of its slot; zeros in padding.
pub(super) struct Attention<'a> {
    /// `[rows, heads * head size]`.
    pub(super) q: &'a [f32],
    pub(super) kv: View<'a>,
    pub(super) pages: Pages<'a>,
    pub(super) pos: &'a [i32],
    pub(super) slots: &'a [i32],
    pub(super) heads: usize,
    pub(super) scale: f32,
}

impl Attention<'_> {
    pub(super) fn compute(&self) -> Result<Vec<f32>> {
        let (kv_heads, head_dim) = (self.pages.kv_heads, self.pages.head_dim);
        ensure!(self.heads > 0 && self.heads.is_multiple_of(kv_heads), "{} heads over {kv_heads} KV heads", self.heads);
        let rows = self.slots.len();
        ensure!(
            self.pos.len() == rows && self.q.len() == rows * self.heads * head_dim,
            "queries of {} elements for {rows} rows of {} heads",
            self.q.len(),
            self.heads
        );
        let group = self.heads / kv_heads;
        let mut out = vec![0.0; self.q.len()];
        // One task a row and KV head, with the query heads that share it.
        let positions: usize = self.pos.iter().map(|&pos| usize::try_from(pos).unwrap_or(0)).sum();
        chunks((positions + rows) * self.heads * head_dim > SMALL, &mut out, group * head_dim, |i, out| {
            let (row, kv_head) = (i / kv_heads, i % kv_heads);
            match (usize::try_from(self.slots[row]), usize::try_from(self.pos[row])) {
                (Ok(slot), Ok(pos)) => {
                    let q = &self.q[i * group * head_dim..][..group * head_dim];
                    self.group(q, slot, pos + 1, kv_head, out)
                }
                _ => Ok(()),
            }
        })?;
        Ok(out)
    }

    /// The query heads of one KV head over the first `length` positions of a slot. Every sum runs over ascending positions.
    fn group(&self, q: &[f32], slot: usize, length: usize, kv_head: usize, out: &mut [f32]) -> Result<()> {
        let (head_dim, page_tokens) = (self.pages.head_dim, self.pages.page_tokens);
        let group = q.len() / head_dim;
        let mut page_values = vec![0.0; page_tokens.min(length) * head_dim];
        let mut scores = vec![0.0; group * length];
        for start in (0..length).step_by(page_tokens) {
            let count = page_tokens.min(length - start);
            let page = self.pages.page(slot, start / page_tokens)?;
            let keys = &mut page_values[..count * head_dim];
            self.kv.read(self.pages.offset(page, 0, kv_head), keys)?;
            for (q, scores) in q.chunks(head_dim).zip(scores.chunks_mut(length)) {
                for (score, key) in scores[start..].iter_mut().zip(keys.chunks(head_dim)) {
                    *score = dot(q, key) * self.scale;
                }
            }
        }
        for scores in scores.chunks_mut(length) {
            softmax(scores);
        }
        for start in (0..length).step_by(page_tokens) {
            let count = page_tokens.min(length - start);
            let page = self.pages.page(slot, start / page_tokens)?;
            let values = &mut page_values[..count * head_dim];
            self.kv.read(self.pages.offset(page, 1, kv_head), values)?;
            for (out, scores) in out.chunks_mut(head_dim).zip(scores.chunks(length)) {
                for (probability, value) in scores[start..].iter().zip(values.chunks(head_dim)) {
                    out.iter_mut().zip(value).for_each(|(out, value)| *out += probability * value);
                }
            }
        }
        Ok(())
    }
}

/// In f32, the largest subtracted first.
fn softmax(scores: &mut [f32]) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(score));
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
}
