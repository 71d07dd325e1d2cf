use super::super::trial::{candidates, write_text};
use super::testing::{BF16, DECODE, FULL, Form, PLAIN, lfm2, router};
use super::*;
use crate::plan::{Op, Semantic};

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
