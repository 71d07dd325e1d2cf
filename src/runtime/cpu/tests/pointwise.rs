//! Expressions over broadcast operands.

use proptest::prelude::*;

use super::{Case, FLOATS, close, noise, ty};
use crate::plan::{BinaryFn, DType, Expr, Op, UnaryFn};

type Unary = fn(f64) -> f64;
type Binary = fn(f64, f64) -> f64;

/// The element of a broadcast operand for an element of the result.
fn broadcast(shape: &[usize], result: &[usize], mut element: usize) -> usize {
    let (mut at, mut stride) = (0, 1);
    for axis in (0..result.len()).rev() {
        let index = element % result[axis];
        element /= result[axis];
        if let Some(axis) = (axis + shape.len()).checked_sub(result.len()) {
            at += if shape[axis] == 1 { 0 } else { index * stride };
            stride *= shape[axis];
        }
    }
    at
}

/// `tanh`-GELU of `a * b + c`, the sum rounded to a type.
fn gelu(round: DType) -> Vec<Expr> {
    use Expr::{Arg, Binary, Const, Unary};
    vec![
        Arg(0),
        Arg(1),
        Arg(2),
        Binary(BinaryFn::Mul, 0, 1),
        Binary(BinaryFn::Add, 3, 2),
        Expr::Round(4, round),
        Binary(BinaryFn::Mul, 5, 5),
        Binary(BinaryFn::Mul, 6, 5),
        Const(0.044715),
        Binary(BinaryFn::Mul, 7, 8),
        Binary(BinaryFn::Add, 5, 9),
        Const(0.797_884_6),
        Binary(BinaryFn::Mul, 10, 11),
        Unary(UnaryFn::Tanh, 12),
        Const(1.0),
        Binary(BinaryFn::Add, 13, 14),
        Binary(BinaryFn::Mul, 15, 5),
        Const(0.5),
        Binary(BinaryFn::Mul, 16, 17),
    ]
}

fn gelu_f64(x: f64) -> f64 {
    0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn broadcasts_any_operand(
        result in prop_oneof![
            proptest::collection::vec(1usize..9, 0..4),
            (1usize..4, 500usize..1200).prop_map(|(a, b)| vec![a, b]),
            Just(vec![40, 3, 170]),
        ],
        ones in proptest::collection::vec(any::<u8>(), 3),
        missing in proptest::collection::vec(0usize..4, 3),
        dtypes in proptest::collection::vec(0usize..3, 3),
    ) {
        let count: usize = result.iter().product();
        let mut case = Case::default();
        let mut operands = vec![];
        for operand in 0..3 {
            let skip = missing[operand].min(result.len());
            let shape: Vec<usize> =
                (skip..result.len()).map(|i| if ones[operand] >> i & 1 == 1 { 1 } else { result[i] }).collect();
            let dtype = FLOATS[dtypes[operand]];
            let values = noise(operand as u64, shape.iter().product(), dtype);
            case = case.floats(dtype, &shape, &values);
            operands.push((shape, values));
        }
        let found = case.run_f32(Op::Pointwise(gelu(DType::F32)), DType::F32, &result);
        let at = |operand: usize, i| f64::from(operands[operand].1[broadcast(&operands[operand].0, &result, i)]);
        let expected: Vec<f64> = (0..count).map(|i| gelu_f64(at(0, i) * at(1, i) + at(2, i))).collect();
        close(&found, &expected, 1e-6);
    }
}

#[test]
fn rounds_inside_an_expression() {
    let x = 1.0 + 3.0 / 512.0;
    let mut case =
        Case::default().floats(DType::F32, &[1], &[x]).floats(DType::F32, &[], &[1.0]).floats(DType::F32, &[], &[0.0]);
    let found = case.run_f32(Op::Pointwise(gelu(DType::BF16)), DType::F32, &[1]);
    close(&found, &[gelu_f64(1.0 + 1.0 / 128.0)], 1e-6);
}

#[test]
fn every_function_is_itself() {
    let unary: [(UnaryFn, Unary); 10] = [
        (UnaryFn::Neg, |x| -x),
        (UnaryFn::Abs, f64::abs),
        (UnaryFn::Exp, f64::exp),
        (UnaryFn::Log, f64::ln),
        (UnaryFn::Sqrt, f64::sqrt),
        (UnaryFn::Rsqrt, |x| 1.0 / x.sqrt()),
        (UnaryFn::Tanh, f64::tanh),
        (UnaryFn::Sigmoid, |x| 1.0 / (1.0 + (-x).exp())),
        (UnaryFn::Silu, |x| x / (1.0 + (-x).exp())),
        (UnaryFn::Relu, |x| x.max(0.0)),
    ];
    let x: Vec<f32> = noise(1, 1000, DType::F32).iter().map(|x| x * 4.0).collect();
    for (function, reference) in unary {
        let positive = matches!(function, UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt);
        let x: Vec<f32> = x.iter().map(|&x| if positive { x.abs() + 0.01 } else { x }).collect();
        let body = vec![Expr::Arg(0), Expr::Unary(function, 0)];
        let found = Case::default().floats(DType::F32, &[1000], &x).run_f32(Op::Pointwise(body), DType::F32, &[1000]);
        close(&found, &x.iter().map(|x| reference(f64::from(*x))).collect::<Vec<_>>(), 1e-6);
    }
    let binary: [(BinaryFn, Binary); 6] = [
        (BinaryFn::Add, |x, y| x + y),
        (BinaryFn::Sub, |x, y| x - y),
        (BinaryFn::Mul, |x, y| x * y),
        (BinaryFn::Div, |x, y| x / y),
        (BinaryFn::Max, f64::max),
        (BinaryFn::Min, f64::min),
    ];
    let y = noise(2, 1000, DType::F32);
    for (function, reference) in binary {
        let body = vec![Expr::Arg(1), Expr::Arg(0), Expr::Binary(function, 1, 0)];
        let mut case = Case::default().floats(DType::F32, &[1000], &x).floats(DType::F32, &[1000], &y);
        let found = case.run_f32(Op::Pointwise(body), DType::F32, &[1000]);
        let expected: Vec<f64> = x.iter().zip(&y).map(|(x, y)| reference(f64::from(*x), f64::from(*y))).collect();
        close(&found, &expected, 1e-6);
    }
}

#[test]
fn refuses_malformed_expressions() {
    for body in
        [vec![], vec![Expr::Arg(1)], vec![Expr::Unary(UnaryFn::Neg, 0)], vec![Expr::Arg(0), Expr::Round(1, DType::F32)]]
    {
        let mut case = Case::default().floats(DType::F32, &[2], &[1.0, 2.0]);
        assert!(case.run(Op::Pointwise(body), &[ty(DType::F32, &[2])]).is_err());
    }
    let mut case = Case::default().floats(DType::F32, &[2], &[1.0, 2.0]);
    assert!(case.run(Op::Pointwise(vec![Expr::Arg(0)]), &[ty(DType::F32, &[3])]).is_err());
}
