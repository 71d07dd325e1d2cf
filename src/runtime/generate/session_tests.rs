//! Sessions: the results are those of each request by itself, and what runs is what is new.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::tests::{fits, reference_until, stops};
use super::*;
use crate::plan::Manifest;
use crate::runtime::SamplingParams;
use crate::runtime::mock::{Mock, RING, VOCAB, bucket, manifest};

/// How far back a sequence of the mock model may be cut: its rows look at three positions.
const REACH: usize = RING - 2;

/// What is asked next.
#[derive(Clone, Debug)]
struct Turn {
    /// The session, or a request without one.
    session: Option<u64>,
    /// Tokens cut off the conversation.
    cut: usize,
    said: Vec<u32>,
    max_new_tokens: usize,
    eos: Vec<u32>,
    sampling: SamplingParams,
}

#[derive(Clone, Debug)]
struct Case {
    manifest: Manifest,
    /// Turns that run together, then the next.
    rounds: Vec<Vec<Turn>>,
    chunk: Option<usize>,
    stop: Option<u64>,
    lookahead: usize,
    on_device: bool,
    capture: bool,
}

fn turns() -> impl Strategy<Value = Turn> {
    let token = 0u32..VOCAB as u32;
    let sampling = (any::<bool>(), any::<u64>()).prop_map(|(on, seed)| SamplingParams {
        temperature: if on { 0.7 } else { 0.0 },
        seed,
        ..SamplingParams::default()
    });
    let cut = prop_oneof![3 => Just(0usize), 3 => 0usize..8, 1 => 0usize..40];
    let said = prop::collection::vec(token.clone(), 0..10);
    (prop::option::weighted(0.8, 0u64..4), cut, said, 0usize..10, prop::collection::vec(token, 0..2), sampling)
        .prop_map(|(session, cut, said, max_new_tokens, eos, sampling)| Turn {
            session,
            cut,
            said,
            max_new_tokens,
            eos,
            sampling,
        })
}

fn cases() -> impl Strategy<Value = Case> {
    let shape = (1u64..6, 1u64..6, 30u64..90, 4u64..60);
    let rounds = prop::collection::vec(prop::collection::vec(turns(), 1..6), 1..8);
    let prefill = prop::sample::subsequence(vec![1u64, 3, 5, 16], 1..4);
    let options = (prop::option::of(1usize..7), prop::option::of(0..VOCAB), 1usize..5, any::<bool>(), any::<bool>());
    (shape, rounds, prefill, options).prop_map(|((slots, page_tokens, context, pages), rounds, prefill, options)| {
        let prefill = prefill.into_iter().map(|t| bucket(Phase::Prefill, t, t.min(3), t.min(3)));
        let buckets = prefill.chain([bucket(Phase::Decode, 2, 2, 2)]).collect();
        let (chunk, stop, lookahead, on_device, capture) = options;
        let manifest = manifest(slots, context, pages * page_tokens, page_tokens, buckets);
        Case { manifest, rounds, chunk, stop, lookahead, on_device, capture }
    })
}

/// What the pool should hold of a session.
#[derive(Clone, Default)]
struct Known {
    rows: Vec<u32>,
    /// Bounds of where positions have not been written: with one step in flight they are the same.
    written: (usize, usize),
    conversation: Vec<u32>,
}

impl Known {
    /// Checks what a request says that it kept, and follows what it did.
    fn follow(&mut self, prompt: &[u32], finished: &Finished, lookahead: usize) -> Result<(), TestCaseError> {
        let common = self.rows.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        let back = (self.written.0.saturating_sub(common), self.written.1.saturating_sub(common));
        prop_assert_eq!(finished.kept_rows + finished.lost_rows, common);
        prop_assert!(finished.kept_rows == 0 || finished.lost_rows == 0);
        if finished.kept_rows > 0 {
            prop_assert!(back.0 <= REACH, "kept {} of {:?}", finished.kept_rows, self.written);
        }
        if finished.lost_rows > 0 {
            prop_assert!(back.1 > REACH, "lost {} of {:?}", finished.lost_rows, self.written);
        }
        self.conversation = [prompt, &finished.tokens].concat();
        let rows = self.conversation.len() - usize::from(!finished.tokens.is_empty());
        self.rows = self.conversation[..rows].to_vec();
        let before = if finished.kept_rows > 0 { self.written } else { (0, 0) };
        self.written = (before.0.max(rows), before.1.max(rows + lookahead - 1));
        Ok(())
    }
}

/// The rest of a turn's prompt comes from the conversation as it is when the turn's round begins.
fn request(turn: &Turn, id: u64, known: &BTreeMap<u64, Known>) -> Request {
    let conversation =
        turn.session.and_then(|session| known.get(&session)).map_or(&[][..], |known| &known.conversation);
    let mut prompt = conversation[..conversation.len().saturating_sub(turn.cut)].to_vec();
    prompt.extend(&turn.said);
    if prompt.is_empty() {
        prompt.push(1);
    }
    Request {
        id,
        prompt,
        max_new_tokens: turn.max_new_tokens,
        eos: turn.eos.clone(),
        sampling: turn.sampling,
        session: turn.session.map(Session),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_conversation_continued_is_one_computed_from_scratch(case in cases()) {
        let options = Options { chunk: case.chunk, capture_logits: case.capture, capture_prompt_logits: false };
        let mut executor = Mock::ahead(case.manifest.clone(), case.lookahead, case.on_device);
        let mut generator = Generator::new(&mut executor, options).unwrap();
        let all = generator.free();
        let lookahead = if case.capture { 1 } else { case.lookahead };
        let mut known: BTreeMap<u64, Known> = BTreeMap::new();
        for round in &case.rounds {
            let requests: Vec<Request> =
                round.iter().enumerate().map(|(id, turn)| request(turn, id as u64, &known)).collect();
            let before = generator.statistics().clone();
            let on_token = |id, token| {
                if stops(case.stop, id, token) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let results = generator.generate(requests.clone(), on_token).unwrap();
            let (mut prefill, mut decode) = (0, 0);
            for (request, result) in requests.iter().zip(results) {
                let finished = match result {
                    Ok(finished) => finished,
                    Err(RequestError::NoRoom { .. }) => {
                        prop_assert!(!known.is_empty() && fits(&case.manifest, request));
                        continue;
                    }
                    Err(_) => {
                        prop_assert!(!fits(&case.manifest, request));
                        continue;
                    }
                };
                let mut expected = reference_until(request, options, case.stop);
                (expected.kept_rows, expected.lost_rows) = (finished.kept_rows, finished.lost_rows);
                prop_assert_eq!(&finished, &expected);
                if request.max_new_tokens > 0 {
                    prefill += request.prompt.len() - finished.kept_rows;
                    decode += finished.tokens.len() - 1;
                    match request.session {
                        Some(Session(session)) => known.entry(session).or_default().follow(&request.prompt, &finished, lookahead)?,
                        None => prop_assert_eq!((finished.kept_rows, finished.lost_rows), (0, 0)),
                    }
                }
            }
            let after = generator.statistics();
            prop_assert_eq!(after.prefill.rows - before.prefill.rows, prefill as u64, "new rows run, once");
            prop_assert_eq!(after.decode.rows - before.decode.rows, decode as u64);
            let page_tokens = case.manifest.limits.page_tokens as usize;
            let pages: usize = known.values().map(|known| known.rows.len().div_ceil(page_tokens)).sum();
            prop_assert_eq!(generator.free(), (all.0 - known.len(), all.1 - pages), "sessions hold their rows' pages");
        }
        for &session in known.keys() {
            generator.forget(Session(session));
        }
        prop_assert_eq!(generator.free(), all);
    }
}

#[test]
fn a_failed_executor_forgets_sessions() {
    let buckets = vec![bucket(Phase::Prefill, 4, 2, 2), bucket(Phase::Decode, 2, 2, 2)];
    let mut executor = Mock::new(manifest(2, 32, 64, 8, buckets));
    executor.fails_at = Some(4);
    let mut generator = Generator::new(&mut executor, Options::default()).unwrap();
    let request = |prompt: &[u32]| Request {
        prompt: prompt.to_vec(),
        max_new_tokens: 3,
        session: Some(Session(0)),
        ..Request::default()
    };
    let go_on = |_, _| ControlFlow::Continue(());
    let first = generator.generate(vec![request(&[1, 2])], go_on).unwrap().remove(0).unwrap();
    let next = [&[1, 2][..], &first.tokens, &[3]].concat();
    generator.generate(vec![request(&next)], go_on).unwrap_err();
    assert_eq!(generator.free(), (2, 8));
    let again = generator.generate(vec![request(&next)], go_on).unwrap().remove(0).unwrap();
    assert_eq!((again.kept_rows, again.lost_rows), (0, 0));
    assert_eq!(again.tokens, reference_until(&request(&next), Options::default(), None).tokens);
}
