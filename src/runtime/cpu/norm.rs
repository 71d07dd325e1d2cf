//! RMSNorm, rotary embedding and sums of rows: what works along the last axis.

use anyhow::{Result, ensure};

use super::tensor::{View, dims, dot, round, rows_and_last};
use crate::plan::TensorType;

/// Groups of `weight.len()` elements, each divided by its root mean square in f32, rounded to the type of x, weighted.
pub(super) fn rms_norm(x: View, ty: &TensorType, weight: View, eps: f64) -> Result<Vec<f32>> {
    let mut x = x.to_f32()?.into_owned();
    let weight = weight.to_f32()?;
    let size = weight.len();
    let (_, last) = rows_and_last(ty)?;
    ensure!(size > 0 && last % size == 0, "a norm over groups of {size} in rows of {last}");
    for group in x.chunks_mut(size) {
        let mean = dot(group, group) / size as f32;
        let scale = 1.0 / (mean + eps as f32).sqrt();
        group.iter_mut().for_each(|x| *x *= scale);
        round(group, ty.0);
        group.iter_mut().zip(&*weight).for_each(|(x, weight)| *x *= weight);
    }
    Ok(x)
}

/// Rotates each head by its row's position; the first half of a head is paired with the second.
pub(super) fn rope(x: View, ty: &TensorType, pos: &[i32], theta: f64, head_dim: u64) -> Result<Vec<f32>> {
    let [rows, width] = dims(ty)?;
    let head = usize::try_from(head_dim)?;
    ensure!(head > 0 && head % 2 == 0 && width % head == 0, "heads of {head} in rows of {width}");
    ensure!(pos.len() == rows, "{} positions for {rows} rows", pos.len());
    let mut x = x.to_f32()?.into_owned();
    let half = head / 2;
    let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / head as f32)).collect();
    let mut angles = vec![(0.0, 0.0); half];
    for (row, &pos) in x.chunks_mut(width.max(1)).zip(pos) {
        for (angle, frequency) in angles.iter_mut().zip(&frequencies) {
            let (sin, cos) = (pos as f32 * frequency).sin_cos();
            *angle = (cos, sin);
        }
        for head in row.chunks_mut(head) {
            let (first, second) = head.split_at_mut(half);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(&angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    Ok(x)
}

/// Sum of each row, in ascending order.
pub(super) fn row_sum(x: View, ty: &TensorType) -> Result<Vec<f32>> {
    let (_, last) = rows_and_last(ty)?;
    let x = x.to_f32()?;
    Ok(x.chunks(last.max(1)).map(|row| row.iter().fold(0.0, |sum, x| sum + x)).collect())
}
