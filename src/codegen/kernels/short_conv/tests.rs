use super::super::testing::{dump, instr, semantic, ty};
use super::*;

const BF16: DType = DType::BF16;

fn binary(function: BinaryFn) -> Op {
    Op::Pointwise(vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(function, 0, 1)])
}

const CONV: [Slot; 5] = [Slot::Temp(3), Slot::In(1), Slot::In(2), Slot::In(3), Slot::In(4)];

/// bcx, weight, ring, pos, slot, bias; b, c, x, u, y, biased y.
fn gated(dtype: DType, rows: u64, channels: u64, taps: u64, bias: bool) -> Semantic {
    let inputs = vec![
        ty(dtype, &[rows, 3 * channels]),
        ty(BF16, &[channels, taps]),
        ty(dtype, &[5, 8, channels]),
        ty(DType::I32, &[rows]),
        ty(DType::I32, &[rows]),
        ty(BF16, &[channels]),
    ];
    let row = || ty(dtype, &[rows, channels]);
    let mut body = vec![
        instr(Op::Split { block: None }, &[Slot::In(0)], &[Slot::Temp(0), Slot::Temp(1), Slot::Temp(2)]),
        instr(binary(BinaryFn::Mul), &[Slot::Temp(0), Slot::Temp(2)], &[Slot::Temp(3)]),
        instr(Op::Conv1dCausal, &CONV, &[Slot::Temp(4)]),
    ];
    if bias {
        body.push(instr(binary(BinaryFn::Add), &[Slot::Temp(4), Slot::In(5)], &[Slot::Temp(5)]));
    }
    let last = Slot::Temp(if bias { 5 } else { 4 });
    body.push(instr(binary(BinaryFn::Mul), &[Slot::Temp(1), last], &[Slot::Out(0)]));
    semantic((inputs, vec![row()]), (0..6).map(|_| row()).collect(), body)
}

fn alone(dtype: DType, rows: u64, channels: u64, taps: u64) -> Semantic {
    let mut found = gated(dtype, rows, channels, taps, false);
    found.inputs[0] = ty(dtype, &[rows, channels]);
    found.temps.clear();
    let mut arguments = CONV;
    arguments[0] = Slot::In(0);
    found.body = vec![instr(Op::Conv1dCausal, &arguments, &[Slot::Out(0)])];
    found
}

fn candidates(semantic: &Semantic, phase: Phase) -> Vec<Specialised> {
    ShortConv.candidates(&Problem { semantic, phase })
}

#[test]
fn alone_and_between_gates_in_every_phase() {
    for semantic in [
        gated(BF16, 70, 2048, 3, false),
        gated(DType::F32, 70, 128, 3, true),
        gated(DType::F16, 70, 36, 4, true),
        gated(BF16, 70, 7, 1, false),
        gated(BF16, 70, 64, 8, false),
        alone(BF16, 70, 2048, 3),
        alone(DType::F32, 70, 5, 2),
    ] {
        for phase in [Phase::Prefill, Phase::Decode] {
            assert!(!candidates(&semantic, phase).is_empty(), "{semantic:?}");
            dump(&ShortConv, &semantic, phase);
        }
    }
}

#[test]
fn vectors_and_strips_follow_sizes() {
    let found = candidates(&gated(BF16, 8192, 2048, 3, false), Phase::Prefill);
    let configs: Vec<&str> = found.iter().map(|c| &*c.config).collect();
    assert_eq!(configs, ["vector=8", "vector=4", "vector=2", "vector=1"]);
    assert_eq!(found[0].launch.grid, [2, 328, 1], "strips of 25");
    let found = candidates(&gated(BF16, 512, 2048, 3, false), Phase::Decode);
    assert_eq!(found[0].launch.grid, [2, 512, 1], "a row each");
    let odd = candidates(&gated(BF16, 512, 7, 3, false), Phase::Decode);
    assert_eq!(odd.len(), 1);
}

#[test]
fn other_wiring_does_not_match() {
    let changed = |change: &dyn Fn(&mut Semantic)| {
        let mut semantic = gated(BF16, 8, 64, 3, true);
        change(&mut semantic);
        candidates(&semantic, Phase::Prefill).len()
    };
    assert_eq!(changed(&|_| ()), 4);
    assert_eq!(changed(&|s| s.body[1].1.reverse()), 4, "products commute");
    assert_eq!(changed(&|s| s.body[4].1.reverse()), 4, "products commute");
    assert_eq!(changed(&|s| s.body[1].1[0] = Slot::Temp(1)), 0, "a part is used twice");
    assert_eq!(changed(&|s| s.body[4].1[1] = Slot::Temp(4)), 0, "the bias is left out");
    assert_eq!(changed(&|s| s.body[3].0 = binary(BinaryFn::Sub)), 0, "no sum");
    assert_eq!(changed(&|s| s.body[0].0 = Op::Split { block: Some(8) }), 0, "interleaved");
    assert_eq!(changed(&|s| s.temps[1].0 = DType::F32), 0, "the split converts");
    assert_eq!(changed(&|s| s.inputs[5].1 = vec![1]), 0, "a bias for all");
    assert_eq!(changed(&|s| s.inputs[2].1[1] = 2), 0, "a ring shorter than the taps");
    assert_eq!(changed(&|s| s.inputs[1].0 = DType::I32), 0, "no numbers");
    assert_eq!(changed(&|s| s.body.truncate(4)), 0, "no second gate");
}

#[test]
fn buckets_share_the_kernel() {
    let text = |rows, phase| candidates(&gated(BF16, rows, 2048, 3, false), phase)[0].prelude();
    assert_eq!(text(64, Phase::Prefill), text(8192, Phase::Prefill));
    assert_eq!(text(1, Phase::Decode), text(512, Phase::Decode));
}
