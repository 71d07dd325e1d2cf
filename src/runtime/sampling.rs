//! The choice of a token from logits: a pure function of logits, parameters and position, the same on every device.
//!
//! Probabilities are whole multiples of 2^-40 of the most likely token's, so that no sum depends on its order.

use std::cmp::Ordering;

use crate::runtime::SamplingParams;

/// The weight of the most likely token.
const ONE: f32 = (1u64 << 40) as f32;

/// Bits of a uniform number.
const UNIFORM_BITS: u32 = 24;

/// A whole number below `below`, evenly distributed, from a counter; 0 if there is none.
pub fn draw(seed: u64, position: u64, below: u64) -> u64 {
    // 24 bits each: two of them, so that large numbers are covered evenly.
    let (high, low) = (uniform(seed, 2 * position), uniform(seed, 2 * position + 1));
    let number = f64::from(high) + f64::from(low) / f64::from(1u32 << UNIFORM_BITS);
    ((number * below as f64) as u64).min(below.saturating_sub(1))
}

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
    let greedy = params.temperature <= 0.0 || params.temperature.is_nan();
    if greedy || !max.is_finite() {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn params(temperature: f32) -> SamplingParams {
        SamplingParams { temperature, seed: 3, ..SamplingParams::default() }
    }

    #[test]
    fn uniform_numbers_are_even_and_differ() {
        let mut seen = std::collections::HashSet::new();
        let mut bins = [0u32; 16];
        for i in 0..16_000 {
            let x = uniform(i % 4, i / 4);
            assert!((0.0..1.0).contains(&x) && (x * 16_777_216.0).fract() == 0.0);
            bins[(x * 16.0) as usize] += 1;
            seen.insert(x.to_bits());
        }
        assert!(bins.iter().all(|count| (850..1150).contains(count)), "{bins:?}");
        assert!(seen.len() > 15_900);
    }

    #[test]
    fn greedy_takes_the_first_largest() {
        let logits = [f32::NAN, 1.0, 5.0, 5.0, f32::NEG_INFINITY];
        for temperature in [0.0, -1.0, f32::NAN] {
            assert_eq!(choose(&logits, &params(temperature), 9), 2);
        }
        assert_eq!(choose(&[f32::NAN, f32::NEG_INFINITY], &params(1.0), 0), 0);
        assert_eq!(choose(&[0.0, f32::INFINITY], &params(1.0), 0), 1);
    }

    /// Probabilities by the definition, in f64.
    fn probabilities(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut p: Vec<f64> =
            logits.iter().map(|x| (f64::from(x - max) / f64::from(params.temperature)).exp()).collect();
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        if params.top_k > 0 {
            order.drain((params.top_k as usize).min(p.len())..).for_each(|i| p[i] = 0.0);
        }
        let (sum, mut reached) = (p.iter().sum::<f64>(), 0.0);
        for &i in &order {
            let cut = reached >= f64::from(params.top_p) * sum;
            reached += p[i];
            if cut {
                p[i] = 0.0;
            }
        }
        let least = f64::from(params.min_p) * p[order[0]];
        p.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
        let sum: f64 = p.iter().sum();
        p.iter().map(|p| p / sum).collect()
    }

    #[test]
    fn draws_follow_the_filtered_distribution() {
        let logits: Vec<f32> = [0.3, 2.0, -1.0, 2.0, 1.1, 0.9, -3.0, 1.7].into();
        for (top_k, top_p, min_p) in
            [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.45), (6, 0.8, 0.4), (1, 0.1, 0.9)]
        {
            let params = SamplingParams { top_k, top_p, min_p, ..params(0.8) };
            let expected = probabilities(&logits, &params);
            let mut counts = vec![0.0; logits.len()];
            let draws = 20_000;
            (0..draws).for_each(|position| counts[choose(&logits, &params, position) as usize] += 1.0);
            for (i, (count, p)) in counts.iter().zip(&expected).enumerate() {
                let deviation = (count - p * draws as f64).abs();
                assert!(
                    if *p == 0.0 { *count == 0.0 } else { deviation < 4.5 * (draws as f64 * p).sqrt() },
                    "{i}: {counts:?}, {expected:?}"
                );
            }
        }
    }

    proptest! {
        /// The token is where the uniform number falls in the cumulative distribution, most likely first.
        #[test]
        fn inverts_the_cumulative_distribution(
            logits in proptest::collection::vec((-40i8..40).prop_map(|x| f32::from(x) / 8.0), 1..40),
            top_k in 0u32..10,
            position: u64,
        ) {
            let params = SamplingParams { top_k, ..params(1.0) };
            let p = probabilities(&logits, &params);
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            let chosen = choose(&logits, &params, position) as usize;
            let before: f64 = order.iter().take_while(|i| **i != chosen).map(|i| p[*i]).sum();
            let at = f64::from(uniform(params.seed, position));
            prop_assert!(before - 1e-5 <= at && at <= before + p[chosen] + 1e-5, "{} {} {}", before, at, p[chosen]);
        }
    }
}
