use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::subsequence;

use super::*;
use crate::plan::Manifest;
use crate::runtime::mock::{Mock, VOCAB, bucket, choose, logits_after, manifest};
use crate::runtime::{Batch, SamplingParams};

fn request(id: u64, prompt: &[u32], max_new_tokens: usize) -> Request {
    Request { id, prompt: prompt.to_vec(), max_new_tokens, ..Request::default() }
}

fn small() -> Manifest {
    let buckets = vec![bucket(Phase::Prefill, 4, 2, 2), bucket(Phase::Decode, 1, 1, 1), bucket(Phase::Decode, 2, 2, 2)];
    manifest(2, 32, 64, 8, buckets)
}

fn go_on(_: u64, _: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// What a request gives with no scheduler at all.
fn reference(request: &Request, options: Options) -> Finished {
    reference_until(request, options, None)
}

/// Whether the caller stops a sequence after a token.
pub(super) fn stops(stop: Option<u64>, id: u64, token: u32) -> bool {
    stop.is_some_and(|stop| (id * 5 + u64::from(token)) % VOCAB == stop)
}

pub(super) fn reference_until(request: &Request, options: Options, stop: Option<u64>) -> Finished {
    let (mut all, mut logits) = (request.prompt.clone(), vec![]);
    let mut reason = FinishReason::Length;
    for _ in 0..request.max_new_tokens {
        let row = logits_after(&all);
        let token = choose(&row, request.sampling, all.len() - 1);
        logits.extend(row);
        all.push(token);
        if request.eos.contains(&token) {
            reason = FinishReason::Eos;
            break;
        }
        if stops(stop, request.id, token) {
            reason = FinishReason::Stop;
            break;
        }
    }
    let prompt_tokens = request.prompt.len();
    let prompt_logits = (1..=prompt_tokens).flat_map(|end| logits_after(&all[..end]));
    Finished {
        id: request.id,
        prompt_tokens,
        kept_rows: 0,
        lost_rows: 0,
        tokens: all[prompt_tokens..].to_vec(),
        reason,
        logits: if options.capture_logits { logits } else { vec![] },
        prompt_logits: if options.capture_prompt_logits { prompt_logits.collect() } else { vec![] },
    }
}

#[derive(Clone, Debug)]
struct Case {
    manifest: Manifest,
    requests: Vec<Request>,
    options: Options,
}

fn cases() -> impl Strategy<Value = Case> {
    let prefill = subsequence(vec![1u64, 2, 3, 5, 8, 16], 0..4);
    let decode = subsequence(vec![1u64, 2, 3, 4, 6], 0..4);
    let shape = (1u64..6, 1u64..6, 8u64..30, 1u64..20, 1u64..6, 1u64..6);
    let token = 0u32..VOCAB as u32;
    let sampling = (any::<bool>(), any::<u64>()).prop_map(|(on, seed)| SamplingParams {
        temperature: if on { 0.7 } else { 0.0 },
        seed,
        ..SamplingParams::default()
    });
    let prompt = prop::collection::vec(token.clone(), 1..16);
    let request = (prompt, 0usize..12, prop::collection::vec(token, 0..3), sampling);
    let options = (prop::option::of(1usize..7), any::<bool>(), any::<bool>());
    (prefill, decode, shape, prop::collection::vec(request, 0..14), options)
        .prop_filter("a bucket", |(prefill, decode, ..)| !(prefill.is_empty() && decode.is_empty()))
        .prop_map(|(prefill, decode, (slots, page_tokens, context, pages, sequences, rows), requests, options)| {
            let prefill = prefill.into_iter().map(|t| bucket(Phase::Prefill, t, sequences.min(t), rows.min(t)));
            let decode = decode.into_iter().map(|t| bucket(Phase::Decode, t, t, t));
            let buckets = prefill.chain(decode).collect();
            let requests = requests.into_iter().enumerate().map(|(id, (prompt, max_new_tokens, eos, sampling))| {
                Request { id: id as u64, prompt, max_new_tokens, eos, sampling, session: None }
            });
            let (chunk, capture_logits, capture_prompt_logits) = options;
            Case {
                manifest: manifest(slots, context, pages * page_tokens, page_tokens, buckets),
                requests: requests.collect(),
                options: Options { chunk, capture_logits, capture_prompt_logits },
            }
        })
}

pub(super) fn fits(manifest: &Manifest, request: &Request) -> bool {
    let positions = (request.prompt.len() + request.max_new_tokens) as u64;
    positions <= manifest.limits.max_context && positions <= manifest.limits.pages() * manifest.limits.page_tokens
}

type Results = Vec<Result<Finished, RequestError>>;

fn run(case: &Case, executor: &mut Mock) -> (Results, BTreeMap<u64, Vec<u32>>, Statistics) {
    run_until(case, executor, None)
}

fn run_until(case: &Case, executor: &mut Mock, stop: Option<u64>) -> (Results, BTreeMap<u64, Vec<u32>>, Statistics) {
    let mut streamed: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    let mut generator = Generator::new(executor, case.options).unwrap();
    let results = generator.generate(case.requests.clone(), |id, token| {
        streamed.entry(id).or_default().push(token);
        if stops(stop, id, token) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    (results.unwrap(), streamed, generator.statistics().clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Neighbours, packing, chunks, the queue and reused slots change nothing, and a second run has the same steps.
    #[test]
    fn together_as_alone(case in cases()) {
        let mut executor = Mock::new(case.manifest.clone());
        let (results, streamed, statistics) = run(&case, &mut executor);
        let mut expected = Statistics::default();
        prop_assert_eq!(results.len(), case.requests.len());
        for (request, result) in case.requests.iter().zip(&results) {
            prop_assert_eq!(result.is_ok(), fits(&case.manifest, request));
            let Ok(finished) = result else { continue };
            prop_assert_eq!(finished, &reference(request, case.options));
            prop_assert_eq!(streamed.get(&request.id).map_or(&[][..], |tokens| tokens), &finished.tokens);
            let new = finished.tokens.len() as u64;
            if new > 0 || case.options.capture_prompt_logits {
                expected.prefill.rows += request.prompt.len() as u64;
            }
            expected.decode.rows += new.saturating_sub(1);
            expected.tokens += new;
        }
        prop_assert_eq!(statistics.prefill.rows, expected.prefill.rows, "each prompt row runs once");
        prop_assert_eq!(statistics.decode.rows, expected.decode.rows, "each new token but the last runs once");
        prop_assert_eq!(statistics.tokens, expected.tokens);
        prop_assert_eq!(statistics.prefill.steps + statistics.decode.steps, executor.trace.len() as u64);
        let padding: u64 = executor
            .trace
            .iter()
            .map(|(bucket, batch)| case.manifest.ranks[0].buckets[*bucket].tokens - batch.tokens.len() as u64)
            .sum();
        prop_assert_eq!(statistics.buckets.iter().map(|bucket| bucket.padding).sum::<u64>(), padding);
        if let Some(chunk) = case.options.chunk {
            for (_, batch) in &executor.trace {
                let longest = batch.slots.chunk_by(|a, b| a == b).map(<[i32]>::len).max();
                prop_assert!(longest <= Some(chunk), "{:?}", batch);
            }
        }

        let trace = executor.trace.clone();
        let mut again = Mock::new(case.manifest.clone());
        prop_assert_eq!(&run(&case, &mut again).0, &results);
        prop_assert_eq!(&again.trace, &trace, "the same steps");

        // Alone, over the state that the others left.
        for (request, result) in case.requests.iter().zip(results) {
            let alone = Case { requests: vec![request.clone()], ..case.clone() };
            prop_assert_eq!(&run(&alone, &mut again).0, &[result]);
        }
    }

    /// Neither how many steps are in flight nor whether the device stops sequences itself changes a result.
    #[test]
    fn steps_in_flight_change_nothing(case in cases(), stop in prop::option::of(0..VOCAB)) {
        let case = Case { options: Options { chunk: case.options.chunk, ..Options::default() }, ..case };
        let finished: Vec<Finished> = case
            .requests
            .iter()
            .filter(|request| fits(&case.manifest, request))
            .map(|request| reference_until(request, case.options, stop))
            .collect();
        for (lookahead, on_device) in (1..=5).flat_map(|lookahead| [(lookahead, false), (lookahead, true)]) {
            let mut executor = Mock::ahead(case.manifest.clone(), lookahead, on_device);
            let (results, streamed, statistics) = run_until(&case, &mut executor, stop);
            prop_assert_eq!(results.iter().flatten().collect::<Vec<_>>(), finished.iter().collect::<Vec<_>>());
            for finished in &finished {
                prop_assert_eq!(streamed.get(&finished.id).map_or(&[][..], |tokens| tokens), &finished.tokens);
            }
            let ran = finished.iter().filter(|finished| !finished.tokens.is_empty());
            let prompt_rows: u64 = ran.clone().map(|finished| finished.prompt_tokens as u64).sum();
            let tokens: u64 = ran.clone().map(|finished| finished.tokens.len() as u64).sum();
            let (prefill, decode) = (&statistics.prefill, &statistics.decode);
            prop_assert_eq!(prefill.rows, prompt_rows, "each prompt row runs once");
            prop_assert_eq!(decode.rows, tokens - ran.count() as u64, "rows that were dropped count as padding");
            prop_assert_eq!(statistics.tokens, tokens);
            prop_assert_eq!(prefill.steps + decode.steps, executor.trace.len() as u64, "every step is collected");
            let capacity: u64 =
                executor.trace.iter().map(|(bucket, _)| case.manifest.ranks[0].buckets[*bucket].tokens).sum();
            prop_assert_eq!(prefill.rows + prefill.padding + decode.rows + decode.padding, capacity);
            let mut again = Mock::ahead(case.manifest.clone(), lookahead, on_device);
            run_until(&case, &mut again, stop);
            prop_assert_eq!((&again.trace, &again.events), (&executor.trace, &executor.events), "the same steps");
        }
    }
}

#[test]
fn the_executor_is_kept_busy() {
    let events = |lookahead, options| {
        let mut executor = Mock::ahead(small(), lookahead, false);
        let mut generator = Generator::new(&mut executor, options).unwrap();
        generator.generate(vec![request(0, &[3, 1], 6)], go_on).unwrap().remove(0).unwrap();
        executor.events
    };
    assert_eq!(events(1, Options::default()), "ecececececec");
    assert_eq!(events(3, Options::default()), "eeececececcc");
    assert_eq!(events(9, Options::default()), "eeeeeecccccc");
    let kept = Options { capture_logits: true, ..Options::default() };
    assert_eq!(events(3, kept), events(1, kept), "logits are those of the last step alone");
}

#[test]
fn reasons_and_stopping() {
    let mut executor = Mock::new(small());
    let tokens = reference(&request(0, &[3, 1], 6), Options::default()).tokens;
    let first_at = |token| tokens.iter().position(|&other| other == token).unwrap();
    let eos = Request { eos: vec![tokens[3]], ..request(2, &[3, 1], 6) };
    let mut generator = Generator::new(&mut executor, Options::default()).unwrap();
    let stop =
        |id, token| if id == 1 && token == tokens[4] { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let requests = vec![request(0, &[3, 1], 6), request(1, &[3, 1], 6), eos, request(3, &[3, 1], 0)];
    let results: Vec<Finished> = generator.generate(requests, stop).unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(results[0].tokens, tokens);
    assert_eq!(results[1].tokens, tokens[..=first_at(tokens[4])]);
    assert_eq!(results[2].tokens, tokens[..=first_at(tokens[3])]);
    assert!(results[3].tokens.is_empty());
    let reasons: Vec<String> = results.iter().map(|finished| finished.reason.to_string()).collect();
    assert_eq!(reasons, ["length", "stop", "eos", "length"]);
    assert_eq!(results.iter().map(|finished| finished.id).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn a_bad_request_leaves_the_others_alone() {
    let mut executor = Mock::new(small());
    let mut generator = Generator::new(&mut executor, Options::default()).unwrap();
    let requests = vec![request(0, &[], 2), request(1, &[2], 3), request(2, &[99], 0), request(3, &[1; 30], 3)];
    let results = generator.generate(requests, go_on).unwrap();
    assert_eq!(results[0], Err(RequestError::EmptyPrompt { id: 0 }));
    assert_eq!(results[1], Ok(reference(&request(1, &[2], 3), Options::default())));
    assert_eq!(results[2], Err(RequestError::UnknownToken { id: 2, index: 0, token: 99, vocab: 13 }));
    assert_eq!(results[3], Err(RequestError::TooLong { id: 3, prompt: 30, new: 3, max_context: 32 }));
}

#[test]
fn prompt_logits_without_new_tokens() {
    let options = Options { capture_prompt_logits: true, ..Options::default() };
    let prompt: Vec<u32> = (0..11).collect();
    let mut executor = Mock::new(small());
    let mut generator = Generator::new(&mut executor, options).unwrap();
    let results = generator.generate(vec![request(0, &prompt, 0)], go_on).unwrap();
    assert_eq!(results, [Ok(reference(&request(0, &prompt, 0), options))]);
    assert_eq!(generator.statistics().prefill.steps, 3);
    assert!(executor.trace.iter().all(|(_, Batch { rows, .. })| rows.is_empty()), "nothing is chosen");
}

#[test]
fn a_failed_executor_ends_the_run_and_frees_everything() {
    for lookahead in [1, 3] {
        fail(Mock::ahead(small(), lookahead, false));
    }
}

fn fail(mut executor: Mock) {
    executor.fails_at = Some(2);
    let mut generator = Generator::new(&mut executor, Options::default()).unwrap();
    let requests: Vec<Request> = (0..5).map(|id| request(id, &[id as u32, 1], 4)).collect();
    let error = generator.generate(requests.clone(), go_on).unwrap_err();
    assert_eq!(error.to_string(), "the device is gone");
    let results = generator.generate(requests.clone(), go_on).unwrap();
    for (request, result) in requests.iter().zip(results) {
        assert_eq!(result, Ok(reference(request, Options::default())));
    }
    executor.token_offset = 1000;
    let mut generator = Generator::new(&mut executor, Options::default()).unwrap();
    let error = generator.generate(requests, go_on).unwrap_err().to_string();
    assert!(error.contains("expected tokens below 13, found 1"), "{error}");
}

#[test]
fn the_table_of_logits_ends_in_nan_and_a_refused_sequence_is_all_nan() {
    let finished = |logits: Vec<f32>| Finished {
        id: 0,
        prompt_tokens: 1,
        kept_rows: 0,
        lost_rows: 0,
        tokens: vec![],
        reason: FinishReason::Eos,
        logits,
        prompt_logits: vec![],
    };
    let sequences = [finished(vec![1.0, 2.0]), finished(vec![3.0, 4.0, 5.0, 6.0]), finished(vec![])];
    let table = logits_table(sequences.iter().map(Some).chain([None]), 2, 2);
    assert_eq!(table.len(), 16);
    assert_eq!(table[..2], [1.0, 2.0]);
    assert!(table[2..4].iter().all(|x| x.is_nan()));
    assert_eq!(table[4..8], [3.0, 4.0, 5.0, 6.0]);
    assert!(table[8..].iter().all(|x| x.is_nan()));
}

#[test]
fn statistics_name_the_buckets() {
    let mut executor = Mock::new(small());
    let mut generator = Generator::new(&mut executor, Options::default()).unwrap();
    generator.generate(vec![request(0, &[1, 2, 3], 3)], go_on).unwrap().remove(0).unwrap();
    let statistics = generator.statistics();
    let rows: Vec<_> = statistics.buckets.iter().map(|b| (b.name.as_str(), b.steps, b.rows, b.padding)).collect();
    assert_eq!(rows, [("prefill_4", 1, 3, 1), ("decode_1", 2, 2, 0), ("decode_2", 0, 0, 0)]);
    assert_eq!((statistics.prefill.padding, statistics.tokens), (1, 3));
}

/// Requests one by one; remembers how far ahead they were asked for, and the order in which they ended.
struct Stepwise {
    requests: std::vec::IntoIter<Request>,
    asked: usize,
    ended: Vec<(usize, usize)>,
    fails_at: usize,
}

impl Work for Stepwise {
    fn next(&mut self) -> Result<Option<Request>> {
        self.asked += 1;
        ensure!(self.asked != self.fails_at, "the input is gone");
        Ok(self.requests.next())
    }

    fn token(&mut self, _: u64, _: u32) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn finished(&mut self, index: usize, result: Result<Finished, RequestError>) -> Result<()> {
        assert_eq!(result.map(|finished| finished.id).ok(), Some(index as u64));
        self.ended.push((index, self.asked));
        Ok(())
    }
}

#[test]
fn requests_are_asked_for_as_places_become_free() {
    let requests: Vec<Request> = (0..9).map(|id| request(id, &[1, 2], if id == 0 { 8 } else { 2 })).collect();
    let mut work = Stepwise { requests: requests.clone().into_iter(), asked: 0, ended: vec![], fails_at: 0 };
    let mut executor = Mock::new(small());
    Generator::new(&mut executor, Options::default()).unwrap().run(&mut work).unwrap();
    // Two slots: so two at work and one that waits, besides those that have ended.
    for (count, &(_, asked)) in work.ended.iter().enumerate() {
        assert!(asked <= count + 3, "{:?}", work.ended);
    }
    assert_eq!(work.ended.len(), 9);
    assert_eq!(work.ended[0].0, 1, "a long sequence holds no other back");
    let mut all = Mock::new(small());
    Generator::new(&mut all, Options::default()).unwrap().generate(requests.clone(), go_on).unwrap();
    assert_eq!(all.trace, executor.trace, "the same steps as with all requests at once");

    // Input that fails ends the run, and the generator is as new.
    let mut work = Stepwise { requests: requests.clone().into_iter(), asked: 0, ended: vec![], fails_at: 5 };
    let mut generator = Generator::new(&mut all, Options::default()).unwrap();
    assert_eq!(generator.run(&mut work).unwrap_err().to_string(), "the input is gone");
    assert_eq!(generator.generate(requests, go_on).unwrap().len(), 9);
}
