//! What one rank sends another: numbers, then positions and slots of rows or neither, then the pages of slots or none. By its place, an
//! integer says what it is.

use super::Show;
use crate::plan::{DType, TensorType};

/// The position of the pages among what one rank sends another.
pub(super) fn pages(payload: &[&TensorType]) -> Option<usize> {
    payload.iter().position(|ty| ty.0 == DType::I32 && ty.1.len() == 2)
}

/// The positions of rows' positions and slots among what one rank sends another, behind `skipped` others.
pub(super) fn rows(payload: &[&TensorType], skipped: usize) -> Option<(usize, usize)> {
    let first = payload.iter().skip(skipped).position(|ty| ty.0 == DType::I32 && ty.1.len() == 1)? + skipped;
    Some((first, first + 1))
}

/// Checks the number of another rank.
pub(super) fn other(what: &str, number: u64, ranks: u64) -> Result<(), String> {
    if number < ranks { Ok(()) } else { Err(format!("`{what}`: expected a rank below {ranks}, found {number}")) }
}

/// What follows the link among the arguments of an exchange between two ranks.
pub(super) fn behind_link<'a, 'b>(arguments: &'b [&'a TensorType]) -> Result<&'b [&'a TensorType], String> {
    match arguments.split_first() {
        Some((first, rest)) if first.0 == DType::I32 && first.1 == [1] => Ok(rest),
        _ => Err("expected a link i32[1] as the first argument".into()),
    }
}

/// Checks what one rank sends another: numbers, then positions and slots of rows or neither, then pages or none.
pub(super) fn check(types: &[&TensorType]) -> Result<(), String> {
    let integers = types.iter().position(|ty| ty.0 == DType::I32).unwrap_or(types.len());
    let vector = |ty: &TensorType| ty.0 == DType::I32 && ty.1.len() == 1;
    let holds = match &types[integers..] {
        [] => integers > 0,
        [pos, slot] => vector(pos) && pos == slot,
        [pos, slot, table] => vector(pos) && pos == slot && table.0 == DType::I32 && table.1.len() == 2,
        _ => false,
    };
    let found: Vec<String> = types.iter().map(|ty| Show(ty).to_string()).collect();
    let expected = "expected numbers, then positions and slots or neither, then pages or none";
    if holds { Ok(()) } else { Err(format!("{expected}, found {}", found.join(", "))) }
}
