//! Division of work among threads, where there is enough of it. Pieces have sizes that do not depend on the number of
//! threads.

use anyhow::Result;
use rayon::prelude::*;

/// Elementary operations below which work is not worth dividing.
pub(super) const SMALL: usize = 1 << 16;

/// Calls `function` with each piece of `size` elements and its index.
pub(super) fn chunks(
    parallel: bool,
    out: &mut [f32],
    size: usize,
    function: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
) -> Result<()> {
    let size = size.max(1);
    if parallel {
        out.par_chunks_mut(size).enumerate().try_for_each(|(i, out)| function(i, out))
    } else {
        out.chunks_mut(size).enumerate().try_for_each(|(i, out)| function(i, out))
    }
}

/// The results of `function` for `0..count`, in order.
pub(super) fn map<R: Send>(
    parallel: bool,
    count: usize,
    function: impl Fn(usize) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    if parallel { (0..count).into_par_iter().map(function).collect() } else { (0..count).map(function).collect() }
}
