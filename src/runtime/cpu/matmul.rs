//! Matrix products. A row's bits depend on that row and the weight alone: neither on how many rows share the product
//! nor on the number of threads.

use anyhow::{Result, ensure};

use super::parallel::{SMALL, chunks, map};
use super::tensor::View;

/// Rows of one task.
const ROW_BLOCK: usize = 512;

/// Weight elements that one task converts to f32, at the most (unless one row is more): few stay in the nearest cache, and
/// many spread the cost of packing the rows.
const WEIGHT_BLOCK: [usize; 2] = [1 << 16, 1 << 19];

/// Rows from which the larger block is better.
const MANY_ROWS: usize = 64;

/// `x [m,k] @ weight [n,k]^T`, accumulated in f32. The weight is converted by blocks, never as a whole.
pub(super) fn product(x: &[f32], weight: View, m: usize, k: usize, n: usize) -> Result<Vec<f32>> {
    ensure!(x.len() == m * k, "a left operand of {} elements for {m} rows of {k}", x.len());
    ensure!(weight.len() == n * k, "a weight of {} elements for [{n},{k}]", weight.len());
    let mut out = vec![0.0; m * n];
    if out.is_empty() || k == 0 {
        return Ok(out);
    }
    let columns = (WEIGHT_BLOCK[usize::from(m >= MANY_ROWS)] / k).clamp(1, 256).next_multiple_of(8);
    let blocks = n.div_ceil(columns);
    let parallel = m * k * n > SMALL;
    chunks(parallel, &mut out, ROW_BLOCK * n, |band, out| {
        let rows = out.len() / n;
        let x = &x[band * ROW_BLOCK * k..][..rows * k];
        let tiles =
            map(parallel, blocks, |i| block_product(x, weight, rows, k, i * columns..n.min((i + 1) * columns)))?;
        tiles.iter().enumerate().for_each(|(i, tile)| place(tile, out, n, i * columns));
        Ok(())
    })?;
    Ok(out)
}

/// The product for some rows of the weight: `[rows, columns]`.
fn block_product(x: &[f32], weight: View, rows: usize, k: usize, columns: std::ops::Range<usize>) -> Result<Tile> {
    let width = columns.len();
    let weight = weight.part(columns.start * k, width * k)?.to_f32()?;
    let mut values = vec![0.0; rows * width];
    sgemm(x, &weight, &mut values, rows, k, width);
    Ok(Tile { values, width })
}

struct Tile {
    values: Vec<f32>,
    width: usize,
}

fn place(tile: &Tile, out: &mut [f32], n: usize, column: usize) {
    for (row, out) in tile.values.chunks(tile.width).zip(out.chunks_mut(n)) {
        out[column..column + tile.width].copy_from_slice(row);
    }
}

/// `out [m,n] = a [m,k] @ b [n,k]^T`. The library divides k by blocks of a constant size, so that an element is summed in
/// an order that depends on k alone.
#[allow(unsafe_code)]
fn sgemm(a: &[f32], b: &[f32], out: &mut [f32], m: usize, k: usize, n: usize) {
    assert_eq!(Some(a.len()), m.checked_mul(k), "left operand");
    assert_eq!(Some(b.len()), n.checked_mul(k), "right operand");
    assert_eq!(Some(out.len()), m.checked_mul(n), "result");
    // SAFETY: the strides are those of dense row-major matrices, b transposed, whose sizes are the slices' lengths as
    // asserted above; so every access is inside a slice. `out` is borrowed mutably, hence overlaps neither operand. Lengths
    // of slices fit isize, and so do the strides, which are no larger unless a slice is empty; then nothing is accessed.
    unsafe {
        matrixmultiply::sgemm(
            m,
            k,
            n,
            1.0,
            a.as_ptr(),
            k as isize,
            1,
            b.as_ptr(),
            1,
            k as isize,
            0.0,
            out.as_mut_ptr(),
            n as isize,
            1,
        );
    }
}
