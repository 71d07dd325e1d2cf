//! Elementwise expressions: a register program interpreted over blocks of elements.

use anyhow::{Context, Result, bail, ensure};

use super::parallel::chunks;
use super::tensor::{View, elements, round};
use crate::plan::{BinaryFn, Expr, TensorType, UnaryFn};

/// Elements of a block: all registers of an expression stay in the nearest cache.
const BLOCK: usize = 512;

/// Elements of one task.
const TASK: usize = 32 * BLOCK;

/// Evaluates `body` for every element of a result of type `out`, operands broadcast to its shape.
pub(super) fn evaluate(body: &[Expr], operands: &[(View, &TensorType)], out: &TensorType) -> Result<Vec<f32>> {
    let total = elements(out)?;
    check(body, operands.len())?;
    let mut result = vec![0.0; total];
    let grid = Grid::new(operands, out)?;
    chunks(total > TASK, &mut result, TASK, |task, mut rest| {
        let mut registers = vec![[0.0f32; BLOCK]; body.len()];
        let mut at = task * TASK;
        while !rest.is_empty() {
            // A block never crosses a row of the grid, so that each operand is a run, or one element, of memory.
            let len = rest.len().min(BLOCK).min(grid.width - at % grid.width);
            let (block, next) = rest.split_at_mut(len);
            run(body, &grid, operands, at, &mut registers, block)?;
            (rest, at) = (next, at + len);
        }
        Ok(())
    })?;
    Ok(result)
}

fn check(body: &[Expr], operands: usize) -> Result<()> {
    ensure!(!body.is_empty(), "an empty expression");
    for (i, expr) in body.iter().enumerate() {
        let fits = match *expr {
            Expr::Arg(arg) => (arg as usize) < operands,
            Expr::Const(_) => true,
            Expr::Round(x, _) | Expr::Unary(_, x) => (x as usize) < i,
            Expr::Binary(_, x, y) => (x as usize) < i && (y as usize) < i,
        };
        ensure!(fits, "register {i} of an expression over {operands} operands names what is not there: {expr:?}");
    }
    Ok(())
}

fn run(
    body: &[Expr],
    grid: &Grid,
    operands: &[(View, &TensorType)],
    at: usize,
    registers: &mut [[f32; BLOCK]],
    out: &mut [f32],
) -> Result<()> {
    let len = out.len();
    for (i, expr) in body.iter().enumerate() {
        let (earlier, rest) = registers.split_at_mut(i);
        let dest = &mut rest[0][..len];
        match *expr {
            Expr::Arg(arg) => grid.load(arg as usize, operands[arg as usize].0, at, dest)?,
            Expr::Const(value) => dest.fill(value),
            Expr::Round(x, dtype) => {
                dest.copy_from_slice(&earlier[x as usize][..len]);
                round(dest, dtype);
            }
            Expr::Unary(function, x) => unary(function, &earlier[x as usize][..len], dest),
            Expr::Binary(function, x, y) => {
                binary(function, &earlier[x as usize][..len], &earlier[y as usize][..len], dest);
            }
        }
    }
    let Some(last) = registers.last() else { bail!("an empty expression") };
    out.copy_from_slice(&last[..len]);
    Ok(())
}

fn map(x: &[f32], out: &mut [f32], function: impl Fn(f32) -> f32) {
    out.iter_mut().zip(x).for_each(|(out, &x)| *out = function(x));
}

fn unary(function: UnaryFn, x: &[f32], out: &mut [f32]) {
    match function {
        UnaryFn::Neg => map(x, out, |x| -x),
        UnaryFn::Abs => map(x, out, f32::abs),
        UnaryFn::Exp => map(x, out, f32::exp),
        UnaryFn::Log => map(x, out, f32::ln),
        UnaryFn::Sqrt => map(x, out, f32::sqrt),
        UnaryFn::Rsqrt => map(x, out, |x| 1.0 / x.sqrt()),
        UnaryFn::Tanh => map(x, out, f32::tanh),
        UnaryFn::Sigmoid => map(x, out, |x| 1.0 / (1.0 + (-x).exp())),
        UnaryFn::Silu => map(x, out, |x| x / (1.0 + (-x).exp())),
        UnaryFn::Relu => map(x, out, |x| x.max(0.0)),
    }
}

fn zip(x: &[f32], y: &[f32], out: &mut [f32], function: impl Fn(f32, f32) -> f32) {
    out.iter_mut().zip(x.iter().zip(y)).for_each(|(out, (&x, &y))| *out = function(x, y));
}

fn binary(function: BinaryFn, x: &[f32], y: &[f32], out: &mut [f32]) {
    match function {
        BinaryFn::Add => zip(x, y, out, |x, y| x + y),
        BinaryFn::Sub => zip(x, y, out, |x, y| x - y),
        BinaryFn::Mul => zip(x, y, out, |x, y| x * y),
        BinaryFn::Div => zip(x, y, out, |x, y| x / y),
        BinaryFn::Max => zip(x, y, out, f32::max),
        BinaryFn::Min => zip(x, y, out, f32::min),
    }
}

/// The result's shape with neighbouring axes joined where every operand allows it: rows of `width` elements, along which an
/// operand either advances by one or stands still.
struct Grid {
    width: usize,
    /// Sizes of the axes before the last.
    outer: Vec<usize>,
    /// For each operand, the strides of those axes, and whether it advances along the last.
    operands: Vec<(Vec<usize>, bool)>,
}

impl Grid {
    fn new(operands: &[(View, &TensorType)], out: &TensorType) -> Result<Self> {
        let shape = sizes(&out.1)?;
        let strides = operands
            .iter()
            .map(|(view, ty)| {
                ensure!(view.len() == elements(ty)?, "an operand of {} elements is declared {ty:?}", view.len());
                broadcast_strides(&sizes(&ty.1)?, &shape)
                    .with_context(|| format!("an operand of shape {:?} does not broadcast to {shape:?}", ty.1))
            })
            .collect::<Result<Vec<_>>>()?;
        // Axes from the innermost out, each joined with the one inside it if all operands continue.
        let mut joined: Vec<(usize, Vec<usize>)> = vec![];
        for (axis, &size) in shape.iter().enumerate().rev().filter(|(_, size)| **size != 1) {
            let at: Vec<usize> = strides.iter().map(|s| s[axis]).collect();
            match joined.last_mut() {
                Some((inner, inner_at)) if at.iter().zip(&*inner_at).all(|(&a, &b)| a == b * *inner) => *inner *= size,
                _ => joined.push((size, at)),
            }
        }
        let mut axes = joined.into_iter();
        let (width, inner) = axes.next().unwrap_or((1, vec![0; operands.len()]));
        let axes: Vec<_> = axes.rev().collect();
        let operands = inner
            .iter()
            .enumerate()
            .map(|(i, &stride)| (axes.iter().map(|(_, at)| at[i]).collect(), stride != 0))
            .collect();
        Ok(Grid { width, outer: axes.iter().map(|(size, _)| *size).collect(), operands })
    }

    /// Reads an operand for the result's elements from `at` on, all in one row of the grid.
    fn load(&self, operand: usize, view: View, at: usize, out: &mut [f32]) -> Result<()> {
        let (strides, advances) = &self.operands[operand];
        let (mut row, column) = (at / self.width, at % self.width);
        let mut start = 0;
        for (size, stride) in self.outer.iter().zip(strides).rev() {
            start += row % size * stride;
            row /= size;
        }
        if *advances {
            return view.read(start + column, out);
        }
        let mut value = [0.0];
        view.read(start, &mut value)?;
        out.fill(value[0]);
        Ok(())
    }
}

fn sizes(shape: &[u64]) -> Result<Vec<usize>> {
    shape.iter().map(|&n| Ok(usize::try_from(n)?)).collect()
}

/// Strides of a dense operand along the result's axes, zero where it is broadcast; `None` if the shapes do not fit.
fn broadcast_strides(shape: &[usize], result: &[usize]) -> Option<Vec<usize>> {
    let missing = result.len().checked_sub(shape.len())?;
    let mut strides = vec![0; result.len()];
    let mut stride = 1;
    for (axis, &size) in shape.iter().enumerate().rev() {
        match size {
            1 => {}
            size if size == result[missing + axis] => strides[missing + axis] = stride,
            _ => return None,
        }
        stride *= size;
    }
    Some(strides)
}
