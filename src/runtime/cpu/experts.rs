//! Matrix products with an expert for each row, the grouping of rows by expert, and weighted sums over a token's experts.

use anyhow::{Context, Result, ensure};

use super::matmul;
use super::parallel::{SMALL, map};
use super::tensor::{View, dims};
use crate::plan::TensorType;

/// For each row of a result: its expert and the row of x, or none for zeros.
pub(super) type Assignment = Vec<Option<(usize, usize)>>;

/// Each result row: a row of `x [_,K]` times its expert's matrix of `weight [E,N,K]`.
pub(super) fn product(x: &[f32], weight: View, weight_ty: &TensorType, assignment: &Assignment) -> Result<Vec<f32>> {
    let [experts, n, k] = dims(weight_ty)?;
    let mut groups: Vec<Vec<(usize, usize)>> = vec![vec![]; experts];
    for (to, pair) in assignment.iter().enumerate() {
        if let &Some((expert, from)) = pair {
            let group = groups.get_mut(expert).with_context(|| format!("expert {expert} of {experts}"))?;
            group.push((from, to));
        }
    }
    let used: Vec<usize> = (0..experts).filter(|&expert| !groups[expert].is_empty()).collect();
    let results = map(assignment.len() * n * k > SMALL, used.len(), |i| {
        let (expert, group) = (used[i], &groups[used[i]]);
        let mut rows = vec![0.0; group.len() * k];
        for (row, (from, _)) in rows.chunks_mut(k.max(1)).zip(group) {
            row.copy_from_slice(x.get(from * k..(from + 1) * k).context("fewer rows than pairs")?);
        }
        matmul::product(&rows, weight.part(expert * n * k, n * k)?, group.len(), k, n)
    })?;
    let mut out = vec![0.0; assignment.len() * n];
    for (expert, result) in used.iter().zip(&results) {
        for (row, (_, to)) in result.chunks(n.max(1)).zip(&groups[*expert]) {
            out[to * n..(to + 1) * n].copy_from_slice(row);
        }
    }
    Ok(out)
}

/// For each choice, its position in the ascending list of local experts; -1 if it is none of them, or if `own(choice, position)` says that
/// another rank runs it.
pub(super) fn local(chosen: &[i32], experts: &[u64], own: impl Fn(usize, usize) -> bool) -> Vec<i32> {
    let position = |expert: i32| experts.binary_search(&u64::try_from(expert).ok()?).ok();
    let local = |(i, &expert): (usize, &i32)| position(expert).filter(|&at| own(i, at)).map_or(-1, |at| at as i32);
    chosen.iter().enumerate().map(local).collect()
}

/// The sum of so many blocks of x, in ascending order.
pub(super) fn block_sum(x: &[f32], blocks: usize) -> Result<Vec<f32>> {
    ensure!(blocks > 0 && x.len().is_multiple_of(blocks), "{} elements in {blocks} blocks", x.len());
    let each = x.len() / blocks;
    let mut out = x[..each].to_vec();
    for block in x.chunks(each.max(1)).skip(1) {
        out.iter_mut().zip(block).for_each(|(out, x)| *out += x);
    }
    Ok(out)
}

/// The assignment of `experts [T,k]`, where x has a row for each token, or one for each pair.
pub(super) fn by_pair(experts: &[i32], k: usize, row_a_pair: bool) -> Assignment {
    let pair = |(i, &expert): (usize, &i32)| Some((usize::try_from(expert).ok()?, if row_a_pair { i } else { i / k }));
    experts.iter().enumerate().map(pair).collect()
}

/// The assignment of rows grouped by expert: expert e has rows `offsets[e]..offsets[e+1]` of `count`, and row i is row
/// `source(i)` of x.
pub(super) fn by_group(offsets: &[i32], count: usize, source: impl Fn(usize) -> Result<usize>) -> Result<Assignment> {
    let mut assignment = vec![None; count];
    for (expert, bounds) in offsets.windows(2).enumerate() {
        let (start, end) = (usize::try_from(bounds[0])?, usize::try_from(bounds[1])?);
        ensure!(start <= end && end <= count, "expert {expert} has rows {start}..{end} of {count}");
        for (row, pair) in assignment.iter_mut().enumerate().take(end).skip(start) {
            *pair = Some((expert, source(row)?));
        }
    }
    Ok(assignment)
}

/// Pairs sorted by expert.
pub(super) struct Groups {
    /// Pairs `t*k + j` in that order, then -1 for padding.
    pub(super) pairs: Vec<i32>,
    /// The place of each pair among them; -1 for padding.
    pub(super) places: Vec<i32>,
    /// Expert e has the places `offsets[e]..offsets[e+1]`.
    pub(super) offsets: Vec<i32>,
}

/// Sorts pairs by expert; pairs of one expert stay in order.
pub(super) fn group_rows(experts: &[i32], count: usize) -> Result<Groups> {
    let mut offsets = vec![0i32; count + 1];
    for &expert in experts {
        if let Ok(expert) = usize::try_from(expert) {
            ensure!(expert < count, "expert {expert} of {count}");
            offsets[expert + 1] += 1;
        }
    }
    for expert in 0..count {
        offsets[expert + 1] += offsets[expert];
    }
    let mut next = offsets.clone();
    let (mut pairs, mut places) = (vec![-1; experts.len()], vec![-1; experts.len()]);
    for (pair, &expert) in experts.iter().enumerate() {
        if let Ok(expert) = usize::try_from(expert) {
            places[pair] = next[expert];
            pairs[next[expert] as usize] = i32::try_from(pair)?;
            next[expert] += 1;
        }
    }
    Ok(Groups { pairs, places, offsets })
}

/// For each token, the sum over its k pairs, ascending, of weight times row of y; `place(pair)` is the row, none is left out.
pub(super) fn weighted_sum(
    y: &[f32],
    n: usize,
    weights: &[f32],
    k: usize,
    place: impl Fn(usize) -> Option<usize>,
) -> Result<Vec<f32>> {
    ensure!(k > 0 && weights.len().is_multiple_of(k), "{} weights for {k} experts a token", weights.len());
    let mut out = vec![0.0; weights.len() / k * n];
    for (pair, weight) in weights.iter().enumerate() {
        let Some(place) = place(pair) else { continue };
        let row = y.get(place * n..(place + 1) * n).with_context(|| format!("row {place} of {} elements", y.len()))?;
        let out = &mut out[pair / k * n..][..n];
        out.iter_mut().zip(row).for_each(|(out, y)| *out += weight * y);
    }
    Ok(out)
}
