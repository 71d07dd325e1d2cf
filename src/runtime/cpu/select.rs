//! Operators that move elements: embedding, gathers, splits, the choice of columns.

use anyhow::{Result, ensure};

use super::tensor::{View, dims, rows_and_last};
use crate::plan::TensorType;

/// Rows of a table, as numbers; zeros where the index is negative.
pub(super) fn rows(table: View, ty: &TensorType, indices: &[i32]) -> Result<Vec<f32>> {
    let [count, width] = dims(ty)?;
    let mut out = vec![0.0; indices.len() * width];
    if width == 0 {
        return Ok(out);
    }
    for (out, &index) in out.chunks_mut(width).zip(indices) {
        if let Ok(index) = usize::try_from(index) {
            ensure!(index < count, "row {index} of a table of {count} rows");
            table.read(index * width, out)?;
        }
    }
    Ok(out)
}

/// Elements `columns [rows,k]` of each row of x; zero where the index is negative.
pub(super) fn columns(x: View, ty: &TensorType, columns: &[i32], columns_ty: &TensorType) -> Result<Vec<f32>> {
    let ([rows, width], [index_rows, k]) = (dims(ty)?, dims(columns_ty)?);
    ensure!(rows == index_rows, "columns for {index_rows} rows of {rows}");
    let x = x.to_f32()?;
    let mut out = vec![0.0; columns.len()];
    for (i, (out, &column)) in out.iter_mut().zip(columns).enumerate() {
        if let Ok(column) = usize::try_from(column) {
            ensure!(column < width, "column {column} of rows of {width}");
            *out = x[i / k * width + column];
        }
    }
    Ok(out)
}

/// Parts of the last axis, of the sizes given; in turn `block` elements at a time if given.
pub(super) fn split(x: View, ty: &TensorType, parts: &[usize], block: Option<u64>) -> Result<Vec<Vec<f32>>> {
    let (rows, last) = rows_and_last(ty)?;
    ensure!(parts.iter().sum::<usize>() == last, "parts of {parts:?} of rows of {last}");
    let block = block.map(usize::try_from).transpose()?;
    if let Some(block) = block {
        let even = parts.iter().all(|&n| n == parts[0]);
        ensure!(block > 0 && even && parts.iter().all(|n| n % block == 0), "parts of {parts:?} in blocks of {block}");
    }
    let mut out: Vec<Vec<f32>> = parts.iter().map(|n| vec![0.0; n * rows]).collect();
    for row in 0..rows {
        let mut start = row * last;
        match block {
            None => {
                for (out, &n) in out.iter_mut().zip(parts) {
                    x.read(start, &mut out[row * n..][..n])?;
                    start += n;
                }
            }
            Some(block) => {
                let n = parts[0];
                for at in (0..n).step_by(block) {
                    for out in &mut out {
                        x.read(start, &mut out[row * n + at..][..block])?;
                        start += block;
                    }
                }
            }
        }
    }
    Ok(out)
}

/// The columns of the k largest scores of each row, largest first, ties to the lower column, NaN last; -1 in padding.
pub(super) fn top_k(scores: View, ty: &TensorType, slots: &[i32], k: usize) -> Result<Vec<i32>> {
    let [rows, width] = dims(ty)?;
    ensure!(k <= width, "the {k} largest of {width} scores");
    ensure!(slots.len() == rows, "{} slots for {rows} rows", slots.len());
    let scores = scores.to_f32()?;
    let mut out = vec![-1; rows * k];
    let mut order: Vec<usize> = vec![];
    for row in (0..rows).filter(|&row| slots[row] >= 0) {
        let scores = &scores[row * width..][..width];
        let key = |i: usize| if scores[i].is_nan() { f32::NEG_INFINITY } else { scores[i] };
        order.clear();
        order.extend(0..width);
        // A stable sort: equal scores stay in the order of their columns. `+ 0.0` makes the two zeros equal.
        order.sort_by(|&a, &b| (key(b) + 0.0).total_cmp(&(key(a) + 0.0)));
        for (out, &column) in out[row * k..].iter_mut().zip(&order[..k]) {
            *out = i32::try_from(column)?;
        }
    }
    Ok(out)
}
