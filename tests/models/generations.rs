//! Generations of random lengths through random slots with refill, on the demo model, equal to solo runs, with one step or
//! several in flight.
//!
//! `LFM2C_GENERATIONS=10000 cargo test --release generations` runs that many; the default is small, for every day.

use lfm2c::runtime::{Executor, FinishReason, Options, Request};

use crate::common::*;

#[test]
fn generations_equal_their_solo_runs() {
    let count: usize = match std::env::var("LFM2C_GENERATIONS") {
        Ok(text) => text.parse().expect("LFM2C_GENERATIONS is a number"),
        Err(_) => 150,
    };
    let mut compile = options();
    compile.max_sequences = Some(7);
    compile.decode = Some(vec![1, 2, 4, 7]);
    if on_gpu() {
        // Other buckets have other kernels, and tokens near a tie would be others.
        compile.prefill = Some(vec![64]);
        compile.decode = Some(vec![7]);
    }
    compile.kv_tokens = Some(640);
    let file = demo_plan(&compile);
    let unpoisoned = |lookahead: usize| -> Box<dyn Executor> {
        if on_gpu() { executor(&file, None) } else { Box::new(cpu_executor(&file, None).with_lookahead(lookahead)) }
    };
    let (mut batched, mut ahead, mut solo) = (unpoisoned(1), unpoisoned(4), unpoisoned(1));
    let vocab = vocab(&*batched);
    let requests: Vec<_> = (0..count as u64)
        .map(|i| {
            let [length, new] = tokens(i ^ 0xA5A5, 2, 1 << 20)[..] else { unreachable!("two were asked for") };
            // Mostly short, some longer than the middle prefill bucket.
            let length = if length % 16 == 0 { 65 + length as usize % 60 } else { 1 + length as usize % 24 };
            let request = request(&tokens(i, length, vocab), 1 + new as usize % 20);
            // Some may end before.
            if i % 3 == 0 { Request { eos: (0..vocab as u32 / 8).collect(), ..request } } else { request }
        })
        .collect();
    let found = run(&mut *batched, requests.clone(), Options::default());
    assert_eq!(found.len(), count);
    assert!(found.iter().any(|found| found.reason == FinishReason::Eos) || count < 20, "none ended before");
    assert_eq!(run(&mut *ahead, requests.clone(), Options::default()), found, "with several steps in flight");
    for (i, (request, found)) in requests.into_iter().zip(found).enumerate() {
        let expected = run(&mut *solo, vec![request], Options::default()).remove(0);
        assert_eq!(found.tokens, expected.tokens, "generation {i}");
    }
    println!("{count} generations equal their solo runs");
}
