//! Places of inputs and tables that the host writes, the same for every executor.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use crate::plan::{Limits, Program, State};

/// The bytes of an input in the io region.
///
/// # Errors
/// No input of that name.
pub fn input(program: &Program, name: &str) -> Result<Range<usize>> {
    let found = program.io.iter().find(|io| io.input && io.name == name);
    let io = found.with_context(|| {
        let names: Vec<&str> = program.io.iter().filter(|io| io.input).map(|io| io.name.as_str()).collect();
        format!("the plan has no input `{name}`; its inputs are {names:?}")
    })?;
    let (start, len) = (usize::try_from(io.offset)?, usize::try_from(io.bytes)?);
    let end = start.checked_add(len).with_context(|| format!("input `{name}` leaves the address space"))?;
    Ok(start..end)
}

/// Writes values, and padding up to `len` of them.
///
/// # Errors
/// The buffer is smaller than `len` values, or `len` smaller than their number.
pub fn write_padded(buffer: &mut [u8], values: &[i32], len: u64, padding: i32) -> Result<()> {
    let len = usize::try_from(len)?;
    let room = buffer.len() / size_of::<i32>();
    ensure!(values.len() <= len && len <= room, "{} values padded to {len}, room for {room}", values.len());
    let padded = values.iter().copied().chain(std::iter::repeat(padding)).take(len);
    for (bytes, value) in buffer.chunks_exact_mut(size_of::<i32>()).zip(padded) {
        bytes.copy_from_slice(&value.to_ne_bytes());
    }
    Ok(())
}

/// A slot's row of the block table.
///
/// # Errors
/// A page beyond the limits.
pub fn page_row(limits: &Limits, slot: u32, pages: &[u32]) -> Result<Vec<i32>> {
    let limit = limits.pages();
    if let Some(page) = pages.iter().find(|page| u64::from(**page) >= limit) {
        bail!("page {page} for slot {slot}, of {limit} pages");
    }
    pages.iter().map(|&page| Ok(i32::try_from(page)?)).collect()
}

/// The bytes of the first `columns` of a slot's row of an i32 table, in the state region.
///
/// # Errors
/// No such slot, or fewer columns.
pub fn table_row(state: &State, slot: u32, columns: usize) -> Result<Range<usize>> {
    let &[slots, width] = &state.ty.1[..] else {
        anyhow::bail!("state `{}` is no table: {:?}", state.name, state.ty);
    };
    ensure!(u64::from(slot) < slots, "slot {slot} of {slots} in state `{}`", state.name);
    ensure!(columns as u64 <= width, "{columns} columns in state `{}`, which has {width}", state.name);
    let start = usize::try_from(state.offset + u64::from(slot) * width * state.ty.0.bytes())?;
    Ok(start..start + columns * size_of::<i32>())
}
