//! Steps that are a call of a library in place of a kernel.

use serde::{Deserialize, Serialize};

use crate::plan::{BinaryFn, DType, Expr, Instr, Op, Semantic, Slot, TensorType};

/// Bytes of scratch memory that calls may use: what cuBLASLt's fastest algorithms on Hopper want at the most. Calls run one after the
/// other, so all share one ([`StateRole::Workspace`](super::StateRole::Workspace)).
pub const WORKSPACE_BYTES: u64 = 32 << 20;

/// Bytes that a matrix's rows are whole multiples of: what cuBLASLt's algorithms for tensor cores ask for.
const ROW_ALIGNMENT: u64 = 16;
/// Rows and columns of a matrix, at the most: algorithms count them in 32 bits.
const MAX_SIZE: u64 = i32::MAX as u64;

/// How a step runs by a library's function. It starts when all before it is done, and nothing after it starts before it is done.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum LibraryCall {
    /// cuBLASLt's product.
    Matmul(LibraryMatmul),
}

/// `result [rows,columns] = x [rows,depth] * weight [columns,depth]^T + residual [rows,columns]`, all dense, row by row: products are added up
/// in f32, the residual to that sum, and it is rounded once. Which of its algorithms the library takes is the first of its own choice for
/// these sizes, types and that workspace; the plan does not say.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LibraryMatmul {
    /// Element type of `x` and `weight`.
    pub dtype: DType,
    /// Element type of the result and of the residual.
    pub made: DType,
    /// Rows of `x`.
    pub rows: u64,
    /// Rows of `weight`, which are columns of the result.
    pub columns: u64,
    /// Columns of both.
    pub depth: u64,
    /// Position of `x` among the step's reads.
    pub x: u32,
    /// Position of `weight` among them.
    pub weight: u32,
    /// Position of what is added among them, if something is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residual: Option<u32>,
    /// Position of the result among the step's writes.
    pub result: u32,
    /// Bytes of the workspace that it may use.
    pub workspace: u64,
}

impl LibraryCall {
    /// The call that computes what a step does; none if no library has one.
    pub fn of(semantic: &Semantic) -> Option<LibraryCall> {
        matmul(semantic).map(LibraryCall::Matmul)
    }

    /// What the library is called, in tactics and tables.
    pub fn name(self) -> &'static str {
        match self {
            LibraryCall::Matmul(_) => "cublaslt",
        }
    }

    /// Bytes of the workspace that it may use.
    pub fn workspace(self) -> u64 {
        match self {
            LibraryCall::Matmul(LibraryMatmul { workspace, .. }) => workspace,
        }
    }
}

fn matmul(semantic: &Semantic) -> Option<LibraryMatmul> {
    let (Instr(Op::Matmul, args, made), rest) = semantic.body.split_first()? else { return None };
    let (&[Slot::In(x), Slot::In(weight)], &[product]) = (&args[..], &made[..]) else { return None };
    let residual = match (product, rest) {
        (Slot::Out(0), []) => None,
        (Slot::Temp(_), [Instr(Op::Pointwise(sum), terms, made)]) if adds(sum) && made[..] == [Slot::Out(0)] => {
            match terms[..] {
                [Slot::In(residual), other] | [other, Slot::In(residual)] if other == product => Some(residual),
                _ => return None,
            }
        }
        _ => return None,
    };
    let input = |i: u32| semantic.inputs.get(i as usize);
    let [result] = &semantic.outputs[..] else { return None };
    let (TensorType(dtype, of_x), TensorType(of_weight, weights)) = (input(x)?, input(weight)?);
    let (&[rows, depth], &[columns, inner]) = (&of_x[..], &weights[..]) else { return None };
    // The product is rounded to the result's type before the residual is added: to add it before does no harm.
    let between = match product {
        Slot::Temp(i) => semantic.temps.get(i as usize)? == result,
        _ => true,
    };
    let added = match residual {
        Some(i) => input(i)? == result,
        None => true,
    };
    let types = dtype == of_weight
        && match dtype {
            DType::BF16 | DType::F16 => result.0 == *dtype || result.0 == DType::F32,
            DType::F32 => result.0 == DType::F32,
            DType::I32 => false,
        };
    let shapes = depth == inner && result.1 == [rows, columns];
    let whole = |size: u64, dtype: DType| {
        size.checked_mul(dtype.bytes()).is_some_and(|bytes| bytes > 0 && bytes.is_multiple_of(ROW_ALIGNMENT))
    };
    let aligned = whole(depth, *dtype) && whole(columns, result.0);
    let small = [rows, columns, depth].iter().all(|size| (1..=MAX_SIZE).contains(size));
    (between && added && types && shapes && aligned && small).then_some(LibraryMatmul {
        dtype: *dtype,
        made: result.0,
        rows,
        columns,
        depth,
        x,
        weight,
        residual,
        result: 0,
        workspace: WORKSPACE_BYTES,
    })
}

/// Whether an expression is the sum of its two operands.
fn adds(sum: &[Expr]) -> bool {
    matches!(sum, [Expr::Arg(a), Expr::Arg(b), Expr::Binary(BinaryFn::Add, 0, 1) | Expr::Binary(BinaryFn::Add, 1, 0)] if a + b == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(dtype: DType, made: DType, [rows, columns, depth]: [u64; 3], residual: bool) -> Semantic {
        let (x, weight) = (TensorType(dtype, vec![rows, depth]), TensorType(dtype, vec![columns, depth]));
        let result = TensorType(made, vec![rows, columns]);
        let mut semantic = Semantic {
            name: "matmul".into(),
            inputs: vec![x, weight],
            outputs: vec![result.clone()],
            temps: vec![],
            body: vec![Instr(Op::Matmul, vec![Slot::In(0), Slot::In(1)], vec![Slot::Out(0)])],
        };
        if residual {
            semantic.inputs.push(result.clone());
            semantic.temps.push(result);
            semantic.body[0].2 = vec![Slot::Temp(0)];
            let sum = Op::Pointwise(vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Add, 0, 1)]);
            semantic.body.push(Instr(sum, vec![Slot::In(2), Slot::Temp(0)], vec![Slot::Out(0)]));
        }
        semantic
    }

    #[test]
    fn bare_products_and_sums_with_a_residual_are_calls() {
        use DType::{BF16, F16, F32};
        for (dtype, made) in [(BF16, BF16), (F16, F16), (BF16, F32), (F32, F32)] {
            for residual in [false, true] {
                let call = LibraryCall::of(&product(dtype, made, [80, 64, 128], residual));
                let expected = LibraryMatmul {
                    dtype,
                    made,
                    rows: 80,
                    columns: 64,
                    depth: 128,
                    x: 0,
                    weight: 1,
                    residual: residual.then_some(2),
                    result: 0,
                    workspace: WORKSPACE_BYTES,
                };
                assert_eq!(call, Some(LibraryCall::Matmul(expected)));
            }
        }
        // The other way around.
        let mut swapped = product(BF16, BF16, [80, 64, 128], true);
        swapped.body[1].1.reverse();
        assert_eq!(LibraryCall::of(&swapped), LibraryCall::of(&product(BF16, BF16, [80, 64, 128], true)));
    }

    #[test]
    fn other_steps_are_none() {
        use DType::{BF16, F16, F32};
        let none = |semantic: &Semantic| assert_eq!(LibraryCall::of(semantic), None, "{semantic:?}");
        // Types that no tensor core multiplies or makes, and rows that are no whole chunks.
        none(&product(BF16, F16, [80, 64, 128], false));
        none(&product(F32, BF16, [80, 64, 128], false));
        none(&product(BF16, BF16, [80, 60, 128], false));
        none(&product(BF16, BF16, [80, 64, 60], false));
        none(&product(F32, F32, [80, 62, 128], false));
        let change = |of: &dyn Fn(&mut Semantic)| {
            let mut semantic = product(BF16, BF16, [80, 64, 128], true);
            of(&mut semantic);
            none(&semantic);
        };
        change(&|s| s.inputs[1].0 = F16);
        change(&|s| s.inputs[2].0 = F32);
        change(&|s| s.inputs[2].1 = vec![1, 64]);
        change(&|s| s.temps[0].0 = F32);
        change(&|s| s.inputs[1].1 = vec![64, 256]);
        change(&|s| s.body[1].1 = vec![Slot::Temp(0), Slot::Temp(0)]);
        change(&|s| s.body.swap(0, 1));
        change(&|s| s.body.truncate(1));
        change(&|s| s.body[0].0 = Op::GatherRows);
        for sum in [
            vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Sub, 0, 1)],
            vec![Expr::Arg(0), Expr::Arg(0), Expr::Binary(BinaryFn::Add, 0, 1)],
            vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Add, 0, 0)],
            vec![Expr::Arg(0)],
        ] {
            change(&|s| s.body[1].0 = Op::Pointwise(sum.clone()));
        }
    }
}
