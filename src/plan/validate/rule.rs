//! What shape rules are made of: an operator's arguments and results, and questions about these and about single types.

use super::Show;
use crate::plan::{DType, Expr, TensorType};

/// Registers of one pointwise expression.
const MAX_REGISTERS: usize = 1 << 12;

pub(super) struct Rule<'a> {
    pub(super) arguments: &'a [&'a TensorType],
    pub(super) results: &'a [&'a TensorType],
}

impl<'a> Rule<'a> {
    pub(super) fn arguments<const N: usize>(&self) -> Result<[&'a TensorType; N], String> {
        self.arguments.try_into().map_err(|_| format!("expected {N} arguments, found {}", self.arguments.len()))
    }

    pub(super) fn results<const N: usize>(&self) -> Result<[&'a TensorType; N], String> {
        self.results.try_into().map_err(|_| format!("expected {N} results, found {}", self.results.len()))
    }

    pub(super) fn no_result(&self) -> Result<(), String> {
        self.results::<0>().map(|_| ())
    }

    /// One result of this type; of any float type if none is given.
    pub(super) fn result(&self, dtype: Option<DType>, expected: &[u64]) -> Result<(), String> {
        let [result] = self.results()?;
        shape("the result", result, expected)?;
        match dtype {
            Some(dtype) if dtype != result.0 => Err(format!("the result: expected {dtype:?}, found {}", Show(result))),
            Some(_) => Ok(()),
            None => any_float(result),
        }
    }

    pub(super) fn all_gather(&self, ranks: u64) -> Result<(), String> {
        if self.arguments.is_empty() || self.results.len() != self.arguments.len() || ranks == 0 {
            let (arguments, results) = (self.arguments.len(), self.results.len());
            return Err(format!(
                "expected a result of each argument, of one rank at least, found {arguments}, {results} and {ranks}"
            ));
        }
        self.arguments.iter().zip(self.results).try_for_each(|(x, result)| {
            let (rows, inner) = x.1.split_first().ok_or("expected rows, found a scalar")?;
            shape("a result", result, &[&[rows.saturating_mul(ranks)], inner].concat())?;
            if result.0 == x.0 { Ok(()) } else { Err(format!("a result: expected {:?}, found {}", x.0, Show(result))) }
        })
    }

    pub(super) fn last_of_result(&self, rank: usize) -> Result<u64, String> {
        let [result] = self.results()?;
        match result.1.last() {
            Some(&last) if result.1.len() == rank => Ok(last),
            _ => Err(format!("the result: expected rank {rank}, found {}", Show(result))),
        }
    }

    pub(super) fn split(&self, block: Option<u64>) -> Result<(), String> {
        let [x] = self.arguments()?;
        any_float(x)?;
        let (Some((last, outer)), Some(first)) = (x.1.split_last(), self.results.first()) else {
            return Err("expected an axis to split, and results".into());
        };
        let mut sum = 0u64;
        for result in self.results {
            let size = *result.1.last().unwrap_or(&0);
            if result.0 != x.0 || result.1.len() != x.1.len() || !result.1.starts_with(outer) {
                return Err(format!("{} is no part of {}", Show(result), Show(x)));
            }
            if let Some(block) = block
                && (block == 0 || size % block != 0 || result.1 != first.1)
            {
                return Err(format!("blocks of {block} need parts of one size that they divide, found {size}"));
            }
            sum = sum.saturating_add(size);
        }
        same("sum of the parts", sum, *last)
    }

    pub(super) fn pointwise(&self, registers: &[Expr]) -> Result<(), String> {
        let [result] = self.results()?;
        any_float(result)?;
        if registers.is_empty() || registers.len() > MAX_REGISTERS {
            return Err(format!("expected 1 to {MAX_REGISTERS} registers, found {}", registers.len()));
        }
        for argument in self.arguments {
            any_float(argument)?;
            let skipped = result.1.len().checked_sub(argument.1.len());
            let fits = |skipped: usize| argument.1.iter().zip(&result.1[skipped..]).all(|(a, r)| *a == 1 || a == r);
            if !skipped.is_some_and(fits) {
                return Err(format!("{} does not broadcast to {}", Show(argument), Show(result)));
            }
        }
        for (i, expr) in registers.iter().enumerate() {
            let earlier = |register: u32| (register as usize) < i;
            let holds = match *expr {
                Expr::Arg(argument) => (argument as usize) < self.arguments.len(),
                Expr::Const(_) => true,
                Expr::Round(x, dtype) => earlier(x) && dtype != DType::I32,
                Expr::Unary(_, x) => earlier(x),
                Expr::Binary(_, x, y) => earlier(x) && earlier(y),
            };
            if !holds {
                let count = self.arguments.len();
                return Err(format!("register {i}: expected earlier registers and {count} arguments, found {expr:?}"));
            }
        }
        Ok(())
    }

    pub(super) fn grouped(
        &self,
        inner: u64,
        weight: &TensorType,
        offsets: &TensorType,
        rows: u64,
    ) -> Result<(), String> {
        let [experts, columns, weight_inner] = float(weight)?;
        same("inner dimension", weight_inner, inner)?;
        index_shape("offsets", offsets, &[experts + 1])?;
        self.result(None, &[rows, columns])
    }
}

/// The rows of one of so many blocks.
pub(super) fn whole_blocks(rows: u64, blocks: u64) -> Result<u64, String> {
    match rows.checked_div(blocks) {
        Some(each) if each * blocks == rows => Ok(each),
        _ => Err(format!("expected rows of {blocks} equal blocks, found {rows}")),
    }
}

fn dims<const N: usize>(ty: &TensorType) -> Result<[u64; N], String> {
    ty.1[..].try_into().map_err(|_| format!("expected rank {N}, found {}", Show(ty)))
}

/// The dimensions of a tensor of integers.
pub(super) fn index<const N: usize>(ty: &TensorType) -> Result<[u64; N], String> {
    if ty.0 != DType::I32 {
        return Err(format!("expected i32, found {}", Show(ty)));
    }
    dims(ty)
}

/// The dimensions of a tensor of numbers.
pub(super) fn float<const N: usize>(ty: &TensorType) -> Result<[u64; N], String> {
    any_float(ty)?;
    dims(ty)
}

pub(super) fn any_float(ty: &TensorType) -> Result<(), String> {
    if ty.0 == DType::I32 { Err(format!("expected a float type, found {}", Show(ty))) } else { Ok(()) }
}

pub(super) fn shape(what: &str, ty: &TensorType, expected: &[u64]) -> Result<(), String> {
    if ty.1 == expected { Ok(()) } else { Err(format!("{what}: expected shape {expected:?}, found {}", Show(ty))) }
}

pub(super) fn index_shape(what: &str, ty: &TensorType, expected: &[u64]) -> Result<(), String> {
    if ty.0 == DType::I32 {
        shape(what, ty, expected)
    } else {
        Err(format!("{what}: expected i32, found {}", Show(ty)))
    }
}

pub(super) fn row_data(rows: u64, types: &[&TensorType]) -> Result<(), String> {
    types.iter().try_for_each(|ty| index_shape("row data", ty, &[rows]))
}

/// KV heads and head size of a cache with its block table.
pub(super) fn cache(kv: &TensorType, table: &TensorType) -> Result<(u64, u64), String> {
    let [_, halves, heads, _, head_dim] = float(kv)?;
    let [_, _] = index(table)?;
    same("halves of the cache", halves, 2)?;
    Ok((heads, head_dim))
}

pub(super) fn same(what: &str, found: u64, expected: u64) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{what}: expected {expected}, found {found}")) }
}

pub(super) fn number(what: &str, value: f64, holds: bool) -> Result<(), String> {
    if value.is_finite() && holds { Ok(()) } else { Err(format!("`{what}` cannot be {value}")) }
}
