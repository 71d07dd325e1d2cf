//! Experts: ungrouped and grouped forms agree with each other and with a reference.

use proptest::prelude::*;

use super::{Case, FLOATS, bits, close, floats, ints, noise, ty};
use crate::plan::{DType, Op};

/// `experts [tokens, k]`, some tokens of which are padding.
fn experts(count: usize, k: usize) -> impl Strategy<Value = Vec<i32>> {
    let token = prop_oneof![
        4 => proptest::collection::vec(0..count as i32, k),
        1 => Just(vec![-1; k]),
    ];
    proptest::collection::vec(token, 1..30).prop_map(|tokens| tokens.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn both_forms_agree(
        (count, k, chosen) in (1usize..7, 1usize..4).prop_flat_map(|(count, k)| (Just(count), Just(k), experts(count, k))),
        inner in 1usize..40,
        n in 1usize..20,
        dtype in 0usize..3,
    ) {
        let (tokens, dtype) = (chosen.len() / k, FLOATS[dtype]);
        let x = noise(1, tokens * inner, dtype);
        let w = noise(2, count * n * inner, dtype);
        let down = noise(3, count * inner * n, dtype);
        let weights = noise(4, tokens * k, DType::F32);

        let grouped = Case::default()
            .ints(&[tokens, k], &chosen)
            .run(Op::GroupRows, &[ty(DType::I32, &[tokens * k]), ty(DType::I32, &[tokens, k]), ty(DType::I32, &[count + 1])])
            .unwrap();
        let (pairs, places, offsets) = (ints(&grouped[0]), ints(&grouped[1]), ints(&grouped[2]));
        let mut sorted: Vec<usize> = (0..chosen.len()).filter(|&pair| chosen[pair] >= 0).collect();
        sorted.sort_by_key(|&pair| chosen[pair]);
        for (place, pair) in pairs.iter().enumerate() {
            prop_assert_eq!(*pair, sorted.get(place).map_or(-1, |pair| *pair as i32));
        }
        for (pair, place) in places.iter().enumerate() {
            prop_assert_eq!(*place, sorted.iter().position(|p| *p == pair).map_or(-1, |place| place as i32));
        }
        for (expert, start) in offsets.iter().enumerate() {
            let before = chosen.iter().filter(|e| **e >= 0 && **e < expert as i32).count();
            prop_assert_eq!(*start as usize, before);
        }

        let up = Case::default().floats(dtype, &[tokens, inner], &x).floats(dtype, &[count, n, inner], &w);
        let plain_up = up.clone().ints(&[tokens, k], &chosen).run_f32(Op::ExpertMatmul, dtype, &[tokens, k, n]);
        let grouped_up = up
            .ints(&[tokens * k], &pairs)
            .ints(&[count + 1], &offsets)
            .run_f32(Op::GroupedMatmulGather { k: k as u64 }, dtype, &[tokens * k, n]);
        let plain_down = Case::default()
            .floats(dtype, &[tokens, k, n], &plain_up)
            .floats(dtype, &[count, inner, n], &down)
            .ints(&[tokens, k], &chosen)
            .run_f32(Op::ExpertMatmul, DType::F32, &[tokens, k, inner]);
        let grouped_down = Case::default()
            .floats(dtype, &[tokens * k, n], &grouped_up)
            .floats(dtype, &[count, inner, n], &down)
            .ints(&[count + 1], &offsets)
            .run_f32(Op::GroupedMatmul, DType::F32, &[tokens * k, inner]);

        for (pair, &expert) in chosen.iter().enumerate() {
            let (rows, found) = (&plain_up[pair * n..][..n], &plain_down[pair * inner..][..inner]);
            let (Ok(expert), Ok(place)) = (usize::try_from(expert), usize::try_from(places[pair])) else {
                prop_assert!(rows.iter().chain(found).all(|x| *x == 0.0));
                continue;
            };
            prop_assert_eq!(bits(rows), bits(&grouped_up[place * n..][..n]));
            prop_assert_eq!(bits(found), bits(&grouped_down[place * inner..][..inner]));
            let product = |x: &[f32], w: &[f32], width: usize| -> Vec<f64> {
                w.chunks(width).map(|w| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()).collect()
            };
            let expected = product(&x[pair / k * inner..][..inner], &w[expert * n * inner..][..n * inner], inner);
            close(rows, &expected, super::tolerance(dtype));
            close(found, &product(rows, &down[expert * n * inner..][..n * inner], n), 1e-5);
        }
        let past = sorted.len();
        prop_assert!(grouped_up[past * n..].iter().chain(&grouped_down[past * inner..]).all(|x| *x == 0.0));

        // Padding may hold anything.
        let spoil = |x: &[f32], live: &dyn Fn(usize) -> bool| -> Vec<f32> {
            x.chunks(inner).enumerate().flat_map(|(i, x)| if live(i) { x.to_vec() } else { vec![f32::NAN; inner] }).collect()
        };
        let plain = Case::default()
            .floats(DType::F32, &[tokens, k, inner], &spoil(&plain_down, &|pair| chosen[pair] >= 0))
            .floats(DType::F32, &[tokens, k], &weights)
            .ints(&[tokens, k], &chosen)
            .run_f32(Op::WeightedSum, DType::F32, &[tokens, inner]);
        let grouped = Case::default()
            .floats(DType::F32, &[tokens * k, inner], &spoil(&grouped_down, &|row| row < past))
            .floats(DType::F32, &[tokens, k], &weights)
            .ints(&[tokens, k], &places)
            .run_f32(Op::GroupedWeightedSum, DType::F32, &[tokens, inner]);
        prop_assert_eq!(bits(&plain), bits(&grouped));
        let expected: Vec<f64> = (0..tokens * inner)
            .map(|i| {
                let pairs = (i / inner * k..(i / inner + 1) * k).filter(|&pair| chosen[pair] >= 0);
                pairs.map(|pair| f64::from(weights[pair]) * f64::from(plain_down[pair * inner + i % inner])).sum()
            })
            .collect();
        close(&plain, &expected, 1e-5);
    }
}

#[test]
fn a_row_of_each_pair_and_experts_outside() {
    let x: Vec<f32> = (0..8).map(|x| x as f32).collect();
    let case = |chosen: &[i32]| {
        Case::default()
            .floats(DType::F32, &[2, 2, 2], &x)
            .floats(DType::F32, &[2, 1, 2], &[1.0, 0.0, 0.0, 1.0])
            .ints(&[2, 2], chosen)
            .run(Op::ExpertMatmul, &[ty(DType::F32, &[2, 2, 1])])
    };
    assert_eq!(floats(&case(&[1, 0, 0, -1]).unwrap()[0]), [1.0, 2.0, 4.0, 0.0]);
    let fault = format!("{:#}", case(&[1, 0, 0, 2]).unwrap_err());
    assert!(fault.contains("expert 2 of 2"), "{fault}");
}
