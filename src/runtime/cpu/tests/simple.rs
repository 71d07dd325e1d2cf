//! Rounding, products, norms, selections.

use half::{bf16, f16};
use proptest::prelude::*;

use super::super::matmul;
use super::super::tensor::{View, round};
use super::{Case, FLOATS, bits, close, floats, ints, noise, tolerance, ty};
use crate::plan::{BinaryFn, DType, Expr, Instr, Op, Slot};

fn naive_product(x: &[f32], weight: &[f32], m: usize, k: usize, n: usize) -> Vec<f64> {
    let at = |i: usize| {
        let (row, column) = (i / n, i % n);
        (0..k).map(|j| f64::from(x[row * k + j]) * f64::from(weight[column * k + j])).sum()
    };
    (0..m * n).map(at).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Rounding gives a value of the type, none of whose neighbours is nearer, and the even one of two as near.
    #[test]
    fn rounds_to_nearest_even(bits: u32) {
        let x = f32::from_bits(bits);
        let mut rounded = [x, x];
        round(&mut rounded[..1], DType::BF16);
        round(&mut rounded[1..], DType::F16);
        if x.is_nan() {
            prop_assert!(rounded.iter().all(|x| x.is_nan()));
            return Ok(());
        }
        let distance = |y: f32| (f64::from(y) - f64::from(x)).abs();
        let brain = bf16::from_f32(rounded[0]);
        prop_assert_eq!(brain.to_f32().to_bits(), rounded[0].to_bits());
        for neighbour in [brain.to_bits().wrapping_sub(1), brain.to_bits().wrapping_add(1)] {
            let y = bf16::from_bits(neighbour).to_f32();
            if y.is_finite() && rounded[0].is_finite() {
                let even = brain.to_bits().is_multiple_of(2);
                prop_assert!(distance(rounded[0]) < distance(y) || (even && distance(rounded[0]) == distance(y)));
            }
        }
        prop_assert_eq!(f16::from_f32(x).to_f32().to_bits(), rounded[1].to_bits());
    }

    #[test]
    fn matmul_matches_reference(m in 0usize..40, k in 1usize..300, n in 1usize..90, types in (0usize..3, 0usize..3)) {
        let (x_type, w_type) = (FLOATS[types.0], FLOATS[types.1]);
        let (x, w) = (noise(1, m * k, x_type), noise(2, n * k, w_type));
        let mut case = Case::default().floats(x_type, &[m, k], &x).floats(w_type, &[n, k], &w);
        let found = case.run_f32(Op::Matmul, DType::F32, &[m, n]);
        close(&found, &naive_product(&x, &w, m, k, n), 1e-4);
        let mut rounded = found;
        round(&mut rounded, DType::BF16);
        prop_assert_eq!(bits(&case.run_f32(Op::Matmul, DType::BF16, &[m, n])), bits(&rounded));
    }

    #[test]
    fn rms_norm_matches_reference(rows in 1usize..5, groups in 1usize..4, size in 1usize..70, dtype in 0usize..3) {
        let dtype = FLOATS[dtype];
        let (x, w) = (noise(3, rows * groups * size, dtype), noise(4, size, DType::F32));
        let mut case = Case::default().floats(dtype, &[rows, groups * size], &x).floats(DType::F32, &[size], &w);
        let found = case.run_f32(Op::RmsNorm { eps: 1e-5 }, dtype, &[rows, groups * size]);
        let expected: Vec<f64> = x
            .chunks(size)
            .flat_map(|x| {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / size as f64;
                x.iter().zip(&w).map(move |(x, w)| f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w))
            })
            .collect();
        close(&found, &expected, 2.0 * tolerance(dtype));
    }

    #[test]
    fn rope_matches_reference(heads in 1usize..4, half in 1usize..33, pos in proptest::collection::vec(0i32..5000, 1..5)) {
        let (rows, head) = (pos.len(), 2 * half);
        let x = noise(5, rows * heads * head, DType::F32);
        let mut case = Case::default().floats(DType::F32, &[rows, heads * head], &x).ints(&[rows], &pos);
        let found = case.run_f32(Op::Rope { theta: 1e6, head_dim: head as u64 }, DType::F32, &[rows, heads * head]);
        let expected: Vec<f64> = (0..x.len())
            .map(|i| {
                let (start, at) = (i - i % head, i % head);
                let angle = f64::from(pos[i / (heads * head)]) / 1e6f64.powf((2 * (at % half)) as f64 / head as f64);
                let (a, b) = (f64::from(x[i]), f64::from(x[start + (at + half) % head]));
                a * angle.cos() + if at < half { -b } else { b } * angle.sin()
            })
            .collect();
        // An angle in f32 is off by its rounding: position times 2^-24, a few times over.
        close(&found, &expected, 2e-3);
    }

    #[test]
    fn split_undoes_interleaving(rows in 1usize..4, parts in 1usize..4, blocks in 1usize..4, block in 1usize..5) {
        let size = blocks * block;
        let parts_of = |i: usize| -> (usize, usize) {
            let (row, column) = (i / (parts * size), i % (parts * size));
            (column / block % parts, row * size + column / (parts * block) * block + column % block)
        };
        let x: Vec<f32> = (0..rows * parts * size).map(|i| (parts_of(i).0 * 1000 + parts_of(i).1) as f32).collect();
        let outputs = vec![ty(DType::F32, &[rows, size]); parts];
        let mut case = Case::default().floats(DType::F32, &[rows, parts * size], &x);
        let found = case.run(Op::Split { block: Some(block as u64) }, &outputs).unwrap();
        for (part, found) in found.iter().enumerate() {
            let expected: Vec<f32> = (0..rows * size).map(|i| (part * 1000 + i) as f32).collect();
            prop_assert_eq!(floats(found), expected);
        }
    }

    #[test]
    fn top_k_is_a_stable_sort(scores in proptest::collection::vec(0u8..6, 12), k in 1usize..6, padding in 0usize..3) {
        let value = |x: u8| if x == 5 { f32::NAN } else { f32::from(x) - 2.0 };
        let scores: Vec<f32> = scores.into_iter().map(value).collect();
        let slots: Vec<i32> = (0..2).map(|row| if row == padding { -1 } else { 4 }).collect();
        let mut case = Case::default().floats(DType::F32, &[2, 6], &scores).ints(&[2], &slots);
        let found = ints(&case.run(Op::TopK, &[ty(DType::I32, &[2, k])]).unwrap()[0]);
        for row in 0..2 {
            let mut left: Vec<usize> = (0..6).collect();
            for &column in &found[row * k..][..k] {
                if row == padding {
                    prop_assert_eq!(column, -1);
                    continue;
                }
                let key = |i: usize| if scores[row * 6 + i].is_nan() { f32::MIN } else { scores[row * 6 + i] };
                let best = *left.iter().rev().max_by(|a, b| key(**a).total_cmp(&key(**b))).unwrap();
                prop_assert_eq!(column as usize, best);
                left.retain(|i| *i != best);
            }
        }
    }
}

/// A row's bits are its own, however many rows share the product, wherever it stands, and on however many threads.
#[test]
fn a_row_of_a_product_does_not_see_its_neighbours() {
    for (k, n) in [(1, 1), (7, 5), (64, 33), (255, 17), (256, 64), (257, 8), (513, 9), (1000, 300)] {
        let x = noise(7, 70 * k, DType::F32);
        let w = noise(8, n * k, DType::F32);
        let all = bits(&matmul::product(&x, View::F32(&w), 70, k, n).unwrap());
        for m in 1..70 {
            for start in [0, (70 - m) / 2, 70 - m] {
                let some = matmul::product(&x[start * k..][..m * k], View::F32(&w), m, k, n).unwrap();
                assert_eq!(bits(&some), all[start * n..][..m * n], "{m} rows from {start}, [{n},{k}]");
            }
        }
    }
}

#[test]
fn a_product_does_not_see_threads_or_blocks() {
    let (m, k, n) = (1100, 96, 700);
    let (x, w) = (noise(9, m * k, DType::F32), noise(10, n * k, DType::F32));
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        bits(&pool.install(|| matmul::product(&x, View::F32(&w), m, k, n)).unwrap())
    };
    let one = on(1);
    assert_eq!(one, on(3));
    for row in [0, 511, 512, 1024, 1099] {
        let alone = matmul::product(&x[row * k..][..k], View::F32(&w), 1, k, n).unwrap();
        assert_eq!(bits(&alone), one[row * n..][..n], "row {row}");
    }
}

#[test]
fn temporaries_round_to_their_type() {
    let body = vec![
        Instr(
            Op::Pointwise(vec![Expr::Arg(0), Expr::Const(1.0), Expr::Binary(BinaryFn::Add, 0, 1)]),
            vec![Slot::In(0)],
            vec![Slot::Temp(0)],
        ),
        Instr(
            Op::Pointwise(vec![Expr::Arg(0), Expr::Const(1.0), Expr::Binary(BinaryFn::Sub, 0, 1)]),
            vec![Slot::Temp(0)],
            vec![Slot::Out(0)],
        ),
    ];
    // 1 + 3/512 is between the bf16 1 and 1 + 1/128, nearer to the latter; in f16 and f32 it is exact.
    for (dtype, expected) in [(DType::BF16, 1.0 / 128.0), (DType::F16, 3.0 / 512.0), (DType::F32, 3.0 / 512.0)] {
        let mut case = Case::default().floats(DType::F32, &[1], &[3.0 / 512.0]);
        let found = case.body(body.clone(), &[ty(DType::F32, &[1])], &[ty(dtype, &[1])]).unwrap();
        assert_eq!(floats(&found[0]), [expected], "{dtype:?}");
    }
}

#[test]
fn gathers_give_zeros_in_padding_and_refuse_indices_outside() {
    let table: Vec<f32> = (0..12).map(|x| x as f32).collect();
    let gather = |op: Op, rows: &[i32], table_first: bool| {
        let case = Case::default();
        let mut case = if table_first {
            case.floats(DType::BF16, &[4, 3], &table).ints(&[rows.len()], rows)
        } else {
            case.ints(&[rows.len()], rows).floats(DType::BF16, &[4, 3], &table)
        };
        case.run(op, &[ty(DType::BF16, &[rows.len(), 3])])
    };
    for (op, table_first) in [(Op::Embed, false), (Op::GatherRows, true)] {
        let found = floats(&gather(op.clone(), &[2, -1, 0], table_first).unwrap()[0]);
        assert_eq!(found, [6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0]);
        let fault = format!("{:#}", gather(op, &[4], table_first).unwrap_err());
        assert!(fault.contains("row 4 of a table of 4 rows"), "{fault}");
    }
    // Two pairs a row, of which one is padding.
    let found = floats(&gather(Op::GatherPairs { k: 2 }, &[7, -1, 0, 3], true).unwrap()[0]);
    assert_eq!(found, [9.0, 10.0, 11.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let fault = format!("{:#}", gather(Op::GatherPairs { k: 2 }, &[8], true).unwrap_err());
    assert!(fault.contains("row 4 of a table of 4 rows"), "{fault}");
    let mut case = Case::default().floats(DType::F32, &[2, 3], &table[..6]).ints(&[2, 2], &[2, -1, 0, 1]);
    assert_eq!(case.run_f32(Op::GatherColumns, DType::F32, &[2, 2]), [2.0, 0.0, 3.0, 4.0]);
    let mut case = Case::default().floats(DType::F32, &[2, 3], &table[..6]);
    assert_eq!(case.run_f32(Op::RowSum, DType::F32, &[2, 1]), [3.0, 12.0]);
}
