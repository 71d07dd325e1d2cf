//! The choice of a token from logits: a pure function of logits, parameters and position, the same on every device.
//!
//! Probabilities are whole multiples of 2^-40 of the most likely token's, so that no sum depends on its order.

use std::cmp::Ordering;

use crate::runtime::SamplingParams;

/// The weight of the most likely token.
const ONE: f32 = (1u64 << 40) as f32;

/// Bits of a uniform number.
const UNIFORM_BITS: u32 = 24;

/// A uniform number in [0, 1), a multiple of 2^-24, from a counter.
pub fn uniform(seed: u64, position: u64) -> f32 {
    // The finaliser of splitmix64, at that position of the seed's stream.
    let mut z = seed.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> (u64::BITS - UNIFORM_BITS)) as f32 / (1u32 << UNIFORM_BITS) as f32
}

/// The next token of the row at `position`: the most likely if the temperature is not positive, else drawn from the
/// softmax of `logits / temperature`, of which first `top_k`, then `top_p` (of what is left), then `min_p` keep a part.
/// Equal logits count in the order of their indices; NaN counts as negative infinity. The logits must not be empty.
pub fn choose(logits: &[f32], params: &SamplingParams, position: u64) -> u32 {
    let best = argmax(logits);
    let max = number(logits[best]);
    // A temperature of NaN compares false.
    if !(params.temperature > 0.0) || !max.is_finite() {
        return best as u32;
    }
    let weight = |logit: f32| (((number(logit) - max) / params.temperature).exp() * ONE) as u64;
    let mut kept: Vec<(u64, f32, u32)> =
        (0u32..).zip(logits).map(|(i, &x)| (weight(x), number(x), i)).filter(|(w, ..)| *w > 0).collect();
    let descending = |a: &(u64, f32, u32), b: &(u64, f32, u32)| -> Ordering {
        (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.2.cmp(&b.2))
    };
    let k = params.top_k as usize;
    if k > 0 && k < kept.len() {
        kept.select_nth_unstable_by(k - 1, descending);
        kept.truncate(k);
    }
    kept.sort_unstable_by(descending);
    if params.top_p < 1.0 {
        let reach = f64::from(params.top_p) * total(&kept) as f64;
        let mut sum = 0;
        let count = kept.iter().take_while(|(w, ..)| {
            let before = sum;
            sum += w;
            (before as f64) < reach
        });
        let count = count.count().max(1);
        kept.truncate(count);
    }
    if params.min_p > 0.0 {
        let least = f64::from(params.min_p) * kept[0].0 as f64;
        kept.retain(|(w, _, i)| *i == best as u32 || *w as f64 >= least);
    }
    let drawn = (uniform(params.seed, position) * (1u32 << UNIFORM_BITS) as f32) as u128;
    let mut rest = ((drawn * u128::from(total(&kept))) >> UNIFORM_BITS) as u64;
    for (w, _, i) in &kept {
        if rest < *w {
            return *i;
        }
        rest -= w;
    }
    best as u32
}

/// The index of the largest logit, the lowest of equal ones.
pub fn argmax(logits: &[f32]) -> usize {
    let better = |best: usize, i: usize| if number(logits[i]) > number(logits[best]) { i } else { best };
    (1..logits.len()).fold(0, better)
}

fn number(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

fn total(kept: &[(u64, f32, u32)]) -> u64 {
    kept.iter().map(|(w, ..)| w).sum()
}
