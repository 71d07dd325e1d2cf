//! Convolution and attention: sequences in chunks, packed with others and with padding.

use proptest::prelude::*;

use super::{Case, FLOATS, bits, close, floats, noise, tolerance, ty};
use crate::plan::{DType, Instr, Op, Slot};

/// Rows of several sequences, a chunk of each at a time, in batches that end in padding.
#[derive(Clone, Debug)]
struct Feed {
    /// For each batch, for each slot, how many rows come next.
    batches: Vec<Vec<usize>>,
    padding: usize,
}

impl Feed {
    /// Position and slot of each batch's rows, padding too.
    fn rows(&self) -> Vec<(Vec<i32>, Vec<i32>)> {
        let mut next = vec![0; self.batches[0].len()];
        self.batches
            .iter()
            .map(|chunks| {
                let (mut pos, mut slots) = (vec![], vec![]);
                for (slot, &count) in chunks.iter().enumerate() {
                    pos.extend((next[slot]..next[slot] + count).map(|p| p as i32));
                    slots.extend(std::iter::repeat_n(slot as i32, count));
                    next[slot] += count;
                }
                pos.extend(vec![0; self.padding]);
                slots.extend(vec![-1; self.padding]);
                (pos, slots)
            })
            .collect()
    }

    fn lengths(&self) -> Vec<usize> {
        (0..self.batches[0].len()).map(|slot| self.batches.iter().map(|batch| batch[slot]).sum()).collect()
    }
}

fn feed(slots: usize, chunk: usize) -> impl Strategy<Value = Feed> {
    let batch = proptest::collection::vec(0..=chunk, slots);
    (proptest::collection::vec(batch, 1..6), 0usize..3).prop_map(|(batches, padding)| Feed { batches, padding })
}

/// The row of a sequence's data; padding gets data as well, which must not be seen.
fn data(all: &[Vec<f32>], width: usize, pos: &[i32], slots: &[i32]) -> Vec<f32> {
    let row = |(pos, slot): (&i32, &i32)| match usize::try_from(*slot) {
        Ok(slot) => all[slot][*pos as usize * width..][..width].to_vec(),
        Err(_) => vec![9.0; width],
    };
    pos.iter().zip(slots).flat_map(row).collect()
}

const SLOTS: usize = 3;
const CHANNELS: usize = 5;

/// Feeds convolutions and returns each slot's rows and the ring's bytes.
fn convolve(
    feed: &Feed,
    u: &[Vec<f32>],
    w: &[f32],
    taps: usize,
    ring: usize,
    dtype: DType,
) -> (Vec<Vec<f32>>, Vec<u8>) {
    let mut out = vec![vec![]; SLOTS];
    let mut case = Case::default()
        .floats(dtype, &[0], &[])
        .floats(dtype, &[CHANNELS, taps], w)
        .state(dtype, &[SLOTS, ring, CHANNELS])
        .ints(&[0], &[])
        .ints(&[0], &[]);
    for (pos, slots) in feed.rows() {
        let rows = pos.len();
        case.replace(0, Case::default().floats(dtype, &[rows, CHANNELS], &data(u, CHANNELS, &pos, &slots)));
        case.replace(3, Case::default().ints(&[rows], &pos));
        case.replace(4, Case::default().ints(&[rows], &slots));
        let found = case.run_f32(Op::Conv1dCausal, dtype, &[rows, CHANNELS]);
        for (found, slot) in found.chunks(CHANNELS).zip(&slots) {
            match usize::try_from(*slot) {
                Ok(slot) => out[slot].extend(found),
                Err(_) => assert_eq!(found, [0.0; CHANNELS]),
            }
        }
    }
    (out, case.state_bytes().to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn convolution_in_any_chunks(feed in feed(SLOTS, 11), taps in 1usize..5, more in 0usize..5, dtype in 0usize..3) {
        let (dtype, ring) = (FLOATS[dtype], taps + more);
        let lengths = feed.lengths();
        let u: Vec<Vec<f32>> =
            lengths.iter().enumerate().map(|(slot, n)| noise(slot as u64, n * CHANNELS, dtype)).collect();
        let w = noise(9, CHANNELS * taps, dtype);
        let (found, state) = convolve(&feed, &u, &w, taps, ring, dtype);
        for (slot, found) in found.iter().enumerate() {
            let expected: Vec<f64> = (0..lengths[slot] * CHANNELS)
                .map(|i| {
                    let (t, c) = (i / CHANNELS, i % CHANNELS);
                    (0..taps)
                        .filter(|j| t + j + 1 >= taps)
                        .map(|j| f64::from(w[c * taps + j]) * f64::from(u[slot][(t + j + 1 - taps) * CHANNELS + c]))
                        .sum()
                })
                .collect();
            close(found, &expected, 2.0 * tolerance(dtype));
        }
        // In one batch, bit for bit the same rows and the same ring.
        let whole = Feed { batches: vec![lengths.clone()], padding: 0 };
        let (in_one, state_in_one) = convolve(&whole, &u, &w, taps, ring, dtype);
        prop_assert_eq!(found, in_one);
        prop_assert_eq!(&state, &state_in_one);
        // Columns that no row has written keep their poison.
        let column = CHANNELS * dtype.bytes() as usize;
        for (slot, &length) in lengths.iter().enumerate() {
            for at in length..ring {
                prop_assert!(state[(slot * ring + at) * column..][..column].iter().all(|byte| *byte == 0xff));
            }
        }
    }
}

struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    page_tokens: usize,
    dtype: DType,
}

/// Feeds attention over pages in an order that `stride` gives, and returns each slot's rows.
fn attend(shape: &Shape, feed: &Feed, qkv: &[Vec<Vec<f32>>; 3], stride: usize) -> Vec<Vec<f32>> {
    let &Shape { heads, kv_heads, head_dim, page_tokens, dtype } = shape;
    let (per_slot, pages) = (16, 53);
    let table: Vec<i32> = (0..SLOTS * per_slot).map(|i| ((i * stride + 5) % pages) as i32).collect();
    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let mut case = Case::default()
        .floats(dtype, &[0], &[])
        .floats(dtype, &[0], &[])
        .floats(dtype, &[0], &[])
        .state(dtype, &[pages, 2, kv_heads, page_tokens, head_dim])
        .table(&[SLOTS, per_slot], &table)
        .ints(&[0], &[])
        .ints(&[0], &[]);
    let inputs = |list: &[u32]| list.iter().map(|&i| Slot::In(i)).collect::<Vec<_>>();
    let attention = Op::Attention { heads: heads as u64, scale: 0.5 };
    let body = vec![
        Instr(Op::KvWrite, inputs(&[1, 2, 3, 4, 5, 6]), vec![]),
        Instr(attention, inputs(&[0, 3, 4, 5, 6]), vec![Slot::Out(0)]),
    ];
    let mut out = vec![vec![]; SLOTS];
    for (pos, slots) in feed.rows() {
        let rows = pos.len();
        for (i, width) in [width, kv_width, kv_width].into_iter().enumerate() {
            case.replace(i, Case::default().floats(dtype, &[rows, width], &data(&qkv[i], width, &pos, &slots)));
        }
        case.replace(5, Case::default().ints(&[rows], &pos));
        case.replace(6, Case::default().ints(&[rows], &slots));
        let found = floats(&case.body(body.clone(), &[ty(dtype, &[rows, width])], &[]).unwrap()[0]);
        for (found, slot) in found.chunks(width).zip(&slots) {
            match usize::try_from(*slot) {
                Ok(slot) => out[slot].extend(found),
                Err(_) => assert!(found.iter().all(|x| *x == 0.0)),
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_in_any_chunks(
        feed in feed(SLOTS, 11),
        (kv_heads, group, head_dim) in (1usize..3, 1usize..4, 1usize..20),
        page_tokens in prop_oneof![Just(4usize), Just(5), Just(64)],
        dtype in 0usize..3,
    ) {
        let shape = Shape { heads: kv_heads * group, kv_heads, head_dim, page_tokens, dtype: FLOATS[dtype] };
        let lengths = feed.lengths();
        let make = |seed: u64, width: usize| -> Vec<Vec<f32>> {
            lengths.iter().enumerate().map(|(slot, n)| noise(seed + slot as u64, n * width, shape.dtype)).collect()
        };
        let (width, kv_width) = (shape.heads * head_dim, kv_heads * head_dim);
        let qkv = [make(10, width), make(20, kv_width), make(30, kv_width)];
        let found = attend(&shape, &feed, &qkv, 1);
        for (slot, found) in found.iter().enumerate() {
            let mut expected = vec![0.0; found.len()];
            for (i, expected) in expected.chunks_mut(head_dim).enumerate() {
                let (t, head) = (i / shape.heads, i % shape.heads);
                let q = &qkv[0][slot][i * head_dim..][..head_dim];
                let row = |which: usize, p: usize| &qkv[which][slot][p * kv_width + head / group * head_dim..][..head_dim];
                let score = |p| q.iter().zip(row(1, p)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * 0.5;
                let exps: Vec<f64> = (0..=t).map(|p| f64::exp(score(p))).collect();
                let sum: f64 = exps.iter().sum();
                for (p, exp) in exps.iter().enumerate() {
                    expected.iter_mut().zip(row(2, p)).for_each(|(e, v)| *e += exp / sum * f64::from(*v));
                }
            }
            close(found, &expected, tolerance(shape.dtype));
        }
        let whole = Feed { batches: vec![lengths], padding: 0 };
        let in_one: Vec<_> = attend(&shape, &whole, &qkv, 7).iter().map(|x| bits(x)).collect();
        prop_assert_eq!(found.iter().map(|x| bits(x)).collect::<Vec<_>>(), in_one);
    }
}

#[test]
fn attention_names_a_page_that_is_not_set() {
    let mut case = Case::default()
        .floats(DType::F32, &[1, 2], &[1.0, 2.0])
        .state(DType::F32, &[2, 2, 1, 4, 2])
        .table(&[1, 2], &[0, -1])
        .ints(&[1], &[4])
        .ints(&[1], &[0]);
    let fault = case.run(Op::Attention { heads: 1, scale: 1.0 }, &[ty(DType::F32, &[1, 2])]).unwrap_err();
    assert!(format!("{fault:#}").contains("block table of slot 0: page -1 at 1"), "{fault:#}");
}
