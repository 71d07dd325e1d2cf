use super::super::trial::{candidates, semantic, write_text};
use super::*;
use crate::plan::{BinaryFn, Expr, Instr, Op, Semantic, UnaryFn};

/// What a router may have.
#[derive(Clone, Copy)]
struct Form {
    norm: bool,
    bias: bool,
    divide: bool,
    factor: bool,
    group: bool,
}

const PLAIN: Form = Form { norm: false, bias: false, divide: false, factor: false, group: false };
const FULL: Form = Form { norm: true, bias: true, divide: true, factor: true, group: true };
const DECODE: Form = Form { factor: false, ..FULL };

fn binary(function: BinaryFn, arguments: &[Slot], number: Option<f32>, result: Slot) -> Instr {
    let second = number.map_or(Expr::Arg(1), Expr::Const);
    let exprs = vec![Expr::Arg(0), second, Expr::Binary(function, 0, 1)];
    Instr(Op::Pointwise(exprs), arguments.to_vec(), vec![result])
}

/// Inputs x, slot, gate, norm weight, bias; outputs weights, experts or groups, normed.
fn router([rows, k, experts, chosen]: [u64; 4], [x, gate]: [DType; 2], form: Form) -> Semantic {
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

const BF16: [DType; 2] = [DType::BF16; 2];
const LFM2: [u64; 3] = [2048, 32, 4];

fn lfm2(rows: u64, form: Form) -> Semantic {
    router([rows, LFM2[0], LFM2[1], LFM2[2]], BF16, form)
}

#[test]
fn every_form_has_a_candidate() {
    for bits in 0..32u32 {
        let on = |bit: u32| bits & (1 << bit) != 0;
        let form = Form { norm: on(0), bias: on(1), divide: on(2), factor: on(3), group: on(4) };
        for rows in [1, 8, 64] {
            let found = candidates(&Router, &lfm2(rows, form));
            assert!(!found.is_empty(), "{bits:b}");
            assert_eq!(found[0].launch.grid[0] % found[0].launch.cluster, 0);
        }
    }
}

#[test]
fn texts_to_compile() {
    let forced = |rows| candidates(&Router, &lfm2(rows, DECODE));
    assert_eq!(forced(1)[0].config, "cluster=8 rows=8");
    assert_eq!(forced(1)[0].prelude(), forced(8)[0].prelude(), "rows do not occur in the text");
    let prefill = Form { norm: false, group: false, ..DECODE };
    let many = |rows| candidates(&Router, &lfm2(rows, prefill));
    assert_eq!((&*many(8192)[0].config, many(8192)[0].launch.grid), ("cluster=8 rows=64", [1024, 1, 1]));
    assert_eq!(many(4096)[0].prelude(), many(8192)[0].prelude());
    write_text(&Router, &lfm2(1, Form { group: false, ..DECODE }), 0, "one");
    write_text(&Router, &lfm2(8, DECODE), 0, "decode");
    write_text(&Router, &lfm2(64, FULL), 0, "decode-64");
    write_text(&Router, &lfm2(256, FULL), 0, "decode-256");
    write_text(&Router, &lfm2(8192, prefill), 0, "prefill");
    write_text(&Router, &router([7, 128, 8, 2], [DType::F32; 2], FULL), 0, "f32");
    write_text(&Router, &router([40, 2048, 32, 4], [DType::F32; 2], FULL), 0, "f32-40");
    write_text(&Router, &router([500, 77, 5, 3], [DType::F16, DType::F32], PLAIN), 0, "odd");
    write_text(&Router, &router([20, 36, 5, 5], [DType::F16, DType::F16], FULL), 0, "odd-f16");
    write_text(&Router, &router([9, 264, 200, 32], [DType::BF16; 2], FULL), 0, "wide");
}

#[test]
fn what_does_not_fit_has_no_candidate() {
    assert!(candidates(&Router, &lfm2(100_000, FULL)).is_empty(), "one cluster cannot sort so many");
    assert!(!candidates(&Router, &lfm2(100_000, PLAIN)).is_empty());
    assert!(candidates(&Router, &router([8, 64, 64, 33], BF16, PLAIN)).is_empty(), "33 choices");
    assert!(candidates(&Router, &router([8, 65536, 256, 4], BF16, PLAIN)).is_empty(), "too much shared memory");
}

#[test]
fn other_bodies_are_not_taken() {
    let taken = |change: &dyn Fn(&mut Semantic)| {
        let mut semantic = lfm2(8, FULL);
        change(&mut semantic);
        !candidates(&Router, &semantic).is_empty()
    };
    assert!(taken(&|_| ()));
    let position =
        |semantic: &Semantic, op: &Op| semantic.body.iter().position(|instr| instr.0 == *op).expect("it is there");
    assert!(!taken(&|s| s.body[1].1[0] = Slot::In(0)), "the gate takes what is not normalised");
    assert!(!taken(&|s| {
        let pick = position(s, &Op::GatherColumns);
        let select = position(s, &Op::TopK);
        s.body[pick].1[0] = s.body[select].1[0];
    }));
    assert!(!taken(&|s| {
        let select = position(s, &Op::TopK);
        s.body[select].1[0] = Slot::Temp(1);
    }));
    assert!(!taken(&|s| s.temps[0].0 = DType::BF16), "logits are rounded");
    assert!(!taken(&|s| s.inputs[4].1 = vec![8, 32]), "a bias for each row");
    assert!(!taken(&|s| s.outputs.push(s.outputs[0].clone())));
    assert!(!taken(&|s| {
        s.body.remove(position(s, &Op::RowSum));
    }));
    assert!(!taken(&|s| {
        let last = s.body.len() - 2;
        s.body.push(s.body[last].clone());
    }));
    assert!(taken(&|s| {
        let group = s.body.pop().expect("it ends with the sort");
        let select = position(s, &Op::TopK);
        s.body.insert(select + 1, group);
    }));
}
