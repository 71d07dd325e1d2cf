//! Routers to test twins with.

use super::super::trial::semantic;
use crate::plan::{BinaryFn, DType, Expr, Instr, Op, Semantic, Slot, UnaryFn};

/// What a router may have.
#[derive(Clone, Copy)]
pub struct Form {
    pub norm: bool,
    pub bias: bool,
    pub divide: bool,
    pub factor: bool,
    pub group: bool,
}

/// Gate, scores, choice.
pub const PLAIN: Form = Form { norm: false, bias: false, divide: false, factor: false, group: false };
/// All that there is.
pub const FULL: Form = Form { norm: true, bias: true, divide: true, factor: true, group: true };
/// What LFM2 has, for few rows.
pub const DECODE: Form = Form { factor: false, ..FULL };

fn binary(function: BinaryFn, arguments: &[Slot], number: Option<f32>, result: Slot) -> Instr {
    let second = number.map_or(Expr::Arg(1), Expr::Const);
    let exprs = vec![Expr::Arg(0), second, Expr::Binary(function, 0, 1)];
    Instr(Op::Pointwise(exprs), arguments.to_vec(), vec![result])
}

/// Inputs x, slot, gate, norm weight, bias; outputs weights, experts or groups, normed.
pub fn router([rows, k, experts, chosen]: [u64; 4], [x, gate]: [DType; 2], form: Form) -> Semantic {
    let (f, i) = (DType::F32, DType::I32);
    let inputs = [(x, vec![rows, k]), (i, vec![rows]), (gate, vec![experts, k]), (x, vec![k]), (f, vec![experts])];
    let mut outputs = vec![(f, vec![rows, chosen])];
    let mut temps = vec![];
    let mut temp = |dtype: DType, width: u64| {
        temps.push((dtype, vec![rows, width]));
        Slot::Temp(temps.len() as u32 - 1)
    };
    let mut body = vec![];
    let (logits, scores) = (temp(f, experts), temp(f, experts));
    let chosen_slot = if form.group { temp(i, chosen) } else { Slot::Out(1) };
    if form.group {
        outputs.extend([vec![rows * chosen], vec![rows, chosen], vec![experts + 1]].map(|shape| (i, shape)));
    } else {
        outputs.push((i, vec![rows, chosen]));
    }
    let mut input = Slot::In(0);
    if form.norm {
        input = Slot::Out(outputs.len() as u32);
        outputs.push((x, vec![rows, k]));
        body.push(Instr(Op::RmsNorm { eps: 1e-5 }, vec![Slot::In(0), Slot::In(3)], vec![input]));
    }
    body.push(Instr(Op::Matmul, vec![input, Slot::In(2)], vec![logits]));
    let sigmoid = vec![Expr::Arg(0), Expr::Unary(UnaryFn::Sigmoid, 0)];
    body.push(Instr(Op::Pointwise(sigmoid), vec![logits], vec![scores]));
    let mut selection = scores;
    if form.bias {
        selection = temp(f, experts);
        body.push(binary(BinaryFn::Add, &[scores, Slot::In(4)], None, selection));
    }
    body.push(Instr(Op::TopK, vec![selection, Slot::In(1)], vec![chosen_slot]));
    let mut last = if form.divide || form.factor { temp(f, chosen) } else { Slot::Out(0) };
    body.push(Instr(Op::GatherColumns, vec![scores, chosen_slot], vec![last]));
    if form.divide {
        let (sum, more) = (temp(f, 1), temp(f, 1));
        let quotient = if form.factor { temp(f, chosen) } else { Slot::Out(0) };
        body.push(Instr(Op::RowSum, vec![last], vec![sum]));
        body.push(binary(BinaryFn::Add, &[sum], Some(1e-6), more));
        body.push(binary(BinaryFn::Div, &[last, more], None, quotient));
        last = quotient;
    }
    if form.factor {
        body.push(binary(BinaryFn::Mul, &[last], Some(2.5), Slot::Out(0)));
    }
    if form.group {
        body.push(Instr(Op::GroupRows, vec![chosen_slot], (1..4).map(Slot::Out).collect()));
    }
    semantic(&inputs, &outputs, &temps, body)
}

/// Types of x and gate.
pub const BF16: [DType; 2] = [DType::BF16; 2];
/// Elements of a row, experts, choices.
const LFM2: [u64; 3] = [2048, 32, 4];

/// The router of LFM2-8B-A1B.
pub fn lfm2(rows: u64, form: Form) -> Semantic {
    router([rows, LFM2[0], LFM2[1], LFM2[2]], BF16, form)
}
