//! Conversations on the GPU whose history stays in the pool.
//!
//! All rows of a plan with one bucket run in the same kernels, so a conversation that goes on gives the bits of one computed from
//! its beginning. With a prefill and a decode bucket answers have run in the one and run in the other when computed anew:
//! then the tokens are the same, and rows of logits are close.

use std::ops::ControlFlow;

use lfm2c::ir::DType;
use lfm2c::plan::PlanFile;
use lfm2c::runtime::cuda::{CudaExecutor, Graphs};
use lfm2c::runtime::{Finished, Generator, Options, Request, SamplingParams, Session};
use libtest_mimic::{Failed, Trial};

use crate::models::{SHAPES, fail, gpu, plan, small};

/// Largest relative L2 distance of rows of logits in f32 from kernels of different buckets.
const BUCKETS_APART: f64 = 2e-5;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    for (i, shape) in SHAPES.iter().enumerate() {
        for (what, prefill, decode) in [
            ("one prefill bucket", &[64][..], &[][..]),
            ("one decode bucket", &[], &[8]),
            ("both buckets", &[64], &[8]),
        ] {
            for dtype in [DType::F32, DType::BF16] {
                let exact = prefill.is_empty() || decode.is_empty();
                if !exact && dtype != DType::F32 {
                    continue;
                }
                trials.push(Trial::test(format!("sessions {what} {} {dtype}", shape.name), move || {
                    conversations(&plan(&SHAPES[i], &small(prefill, decode, dtype)), exact)
                }));
            }
        }
    }
    trials
}

/// One turn of a conversation.
struct Turn {
    cut: usize,
    said: usize,
    new: usize,
    /// Tokens after which the caller stops it; the device does not know, and runs on.
    stop: usize,
}

const TURNS: &[Turn] = &[
    Turn { cut: 0, said: 9, new: 8, stop: usize::MAX },
    Turn { cut: 0, said: 1, new: 12, stop: 5 },
    Turn { cut: 1, said: 3, new: 12, stop: 7 },
    Turn { cut: 2, said: 20, new: 1, stop: usize::MAX },
    Turn { cut: 0, said: 2, new: 15, stop: usize::MAX },
    Turn { cut: 14, said: 5, new: 6, stop: usize::MAX },
    Turn { cut: 3, said: 4, new: 6, stop: 3 },
    Turn { cut: 0, said: 70, new: 9, stop: usize::MAX },
    Turn { cut: 1, said: 1, new: 9, stop: usize::MAX },
];

fn conversations(file: &PlanFile, exact: bool) -> Result<(), Failed> {
    for capture_logits in [true, false] {
        for temperature in [0.0, 0.8] {
            if temperature == 0.0 || exact {
                conversation(file, exact, capture_logits, temperature)?;
            }
        }
    }
    Ok(())
}

fn conversation(file: &PlanFile, exact: bool, capture_logits: bool, temperature: f32) -> Result<(), Failed> {
    let options = Options { capture_logits, ..Options::default() };
    let (mut talking, mut alone) = (gpu(file, Graphs::Required), gpu(file, Graphs::Required));
    let vocab = file.manifest.model.vocab as u32;
    let mut generator = Generator::new(&mut talking, options).map_err(fail)?;
    let mut conversation: Vec<u32> = vec![];
    let mut continued = 0;
    for (at, turn) in TURNS.iter().enumerate() {
        conversation.truncate(conversation.len().saturating_sub(turn.cut));
        conversation.extend((0..turn.said as u32).map(|i| (at as u32 * 7919 + i * 104_729 + i * i * 31) % vocab));
        let sampling = SamplingParams { temperature, top_k: 40, seed: 11, ..SamplingParams::default() };
        let request = Request {
            prompt: conversation.clone(),
            max_new_tokens: turn.new,
            // The device ends some by itself.
            eos: if at % 4 == 3 { (0..vocab / 6).collect() } else { vec![] },
            sampling,
            session: Some(Session(1)),
            ..Request::default()
        };
        // Another conversation and other requests beside it.
        let beside = |id: u64, session| Request {
            id,
            prompt: (0..3 + at as u32).map(|i| (i * 37 + id as u32) % vocab).collect(),
            max_new_tokens: 6,
            session,
            ..Request::default()
        };
        let company = vec![beside(1, Some(Session(2))), request.clone(), beside(2, None)];
        let found = run(&mut generator, company, 0, turn.stop)?.remove(1);
        let mut scratch = Generator::new(&mut alone, options).map_err(fail)?;
        let expected = run(&mut scratch, vec![Request { session: None, ..request }], 0, turn.stop)?.remove(0);
        same(&found, &expected, exact).map_err(|what| format!("turn {at}, kept {}: {what}", found.kept_rows))?;
        continued += usize::from(found.kept_rows > 0);
        conversation.extend(&found.tokens);
    }
    if continued < 5 {
        return Err(format!("went on {continued} times only").into());
    }
    Ok(())
}

fn run(
    generator: &mut Generator<'_, CudaExecutor>,
    requests: Vec<Request>,
    stopped: u64,
    stop: usize,
) -> Result<Vec<Finished>, Failed> {
    let mut seen = 0;
    let count = |id, _| {
        seen += usize::from(id == stopped);
        if id == stopped && seen == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let results = generator.generate(requests, count).map_err(fail)?;
    results.into_iter().map(|result| result.map_err(|fault| fault.to_string().into())).collect()
}

fn same(found: &Finished, expected: &Finished, exact: bool) -> Result<(), String> {
    if found.tokens != expected.tokens || found.reason != expected.reason {
        return Err(format!("expected the tokens {:?}, found {:?}", expected.tokens, found.tokens));
    }
    let pairs = || found.logits.iter().zip(&expected.logits).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    if exact && pairs().any(|(a, b)| a.to_bits() != b.to_bits()) {
        return Err("logits of other bits".into());
    }
    let distance: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    let error = (distance / pairs().map(|(_, b)| b * b).sum::<f64>().max(1e-30)).sqrt();
    if error.is_nan() || error > BUCKETS_APART {
        return Err(format!("logits at a relative L2 distance of {error:e}"));
    }
    Ok(())
}
