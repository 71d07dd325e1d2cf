use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::mesh::Mesh;
use super::watch::{Link, SILENCE};
use super::*;
use crate::plan::{Manifest, Phase};
use crate::runtime::group::LocalGroup;
use crate::runtime::mock::{Mock, bucket, manifest};
use crate::runtime::{All, Finished, Generator, Options, Request, RequestError, SamplingParams};

fn small() -> Manifest {
    let buckets = vec![bucket(Phase::Prefill, 4, 2, 2), bucket(Phase::Decode, 1, 1, 1), bucket(Phase::Decode, 2, 2, 2)];
    manifest(2, 32, 64, 8, buckets)
}

/// Requests of many lengths, one of which no plan could run.
fn requests(count: u64) -> Vec<Request> {
    let sampling = |id| SamplingParams { temperature: (id % 2) as f32, seed: id, ..SamplingParams::default() };
    let request = |id: u64| Request {
        id,
        prompt: (0..=id % 9).map(|token| if id == 5 { 99 } else { token as u32 }).collect(),
        max_new_tokens: [0, 3, 20, 1][id as usize % 4],
        eos: vec![12],
        sampling: sampling(id),
        session: None,
    };
    (0..count).map(request).collect()
}

type Results = Vec<Result<Finished, RequestError>>;

/// Runs rounds on so many ranks, each a thread: results, tokens as they were seen, and what the ranks did in the last.
fn on_ranks(size: usize, rounds: &[(u64, Mode)], options: Options) -> (Results, Vec<Vec<u32>>, Vec<Summary>) {
    in_groups(size, 1, rounds, options)
}

/// As [`on_ranks`], where so many neighbours run the same steps.
fn in_groups(
    size: usize,
    group: usize,
    rounds: &[(u64, Mode)],
    options: Options,
) -> (Results, Vec<Vec<u32>>, Vec<Summary>) {
    let mut groups: Vec<Option<LocalGroup>> = match group {
        1 => (0..size).map(|_| None).collect(),
        _ => (0..size / group).flat_map(|_| LocalGroup::new(group)).map(Some).collect(),
    };
    let steps = Mutex::new(vec![vec![]; size]);
    let keep = |rank: usize, executor: &Mock| {
        steps.lock().unwrap()[rank] = executor.trace.iter().map(|(bucket, _)| *bucket).collect();
    };
    let keep = &keep;
    let mut meshes = Mesh::new(size);
    let others = meshes.split_off(1);
    let stops = |token: u32| token == 7;
    let own = groups.remove(0);
    let found = std::thread::scope(|scope| {
        for (mesh, group) in others.into_iter().zip(groups) {
            scope.spawn(move || {
                let mut ranks = Ranks::unwatched(Box::new(mesh));
                let mut executor = Mock::ahead(small(), 2, false);
                executor.group = group;
                while let Order::Round(options) = next_order(&mut ranks).unwrap() {
                    let mut generator = Generator::new(&mut executor, options).unwrap();
                    follow(&mut ranks, &mut generator, |texts| {
                        assert_eq!(texts, ["seven"]);
                        Ok(Box::new(move |token| Ok(stops(token))))
                    })
                    .unwrap();
                }
                keep(ranks.rank(), &executor);
            });
        }
        let mut ranks = Ranks::unwatched(Box::new(meshes.remove(0)));
        let mut executor = Mock::ahead(small(), 2, false);
        executor.group = own;
        let mut last = None;
        for &(count, mode) in rounds {
            let mut seen = vec![vec![]; count as usize];
            let on_token = |id: u64, token| {
                seen[id as usize].push(token);
                if stops(token) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let mut all = All::new(requests(count), on_token).stopping_at(&["seven".to_owned()]);
            let mut generator = Generator::new(&mut executor, options).unwrap();
            let summaries = lead(&mut ranks, &mut generator, &mut all, options, mode).unwrap();
            last = Some((all.results().unwrap(), seen, summaries));
        }
        ranks.leave().unwrap();
        keep(0, &executor);
        last.unwrap()
    });
    for steps in steps.into_inner().unwrap().chunks(group) {
        assert!(steps.iter().all(|other| *other == steps[0]), "ranks of a group run the same steps: {steps:?}");
    }
    found
}

#[test]
fn groups_of_ranks_run_the_same_steps_and_give_the_results_of_one() {
    let plain = Options::default();
    let captured = Options { chunk: Some(3), capture_logits: true, capture_prompt_logits: true };
    for (count, options) in [(0, plain), (1, plain), (60, plain), (60, captured)] {
        let (expected, tokens, _) = on_ranks(1, &[(count, Mode::Deal)], options);
        for (size, group) in [(2, 2), (4, 2), (3, 3), (4, 4)] {
            let (found, seen, summaries) = in_groups(size, group, &[(9, Mode::Copy), (count, Mode::Deal)], options);
            assert!(found == expected, "{size} ranks in groups of {group}, {count} requests");
            assert_eq!((seen, summaries.len()), (tokens.clone(), size));
        }
    }
}

#[test]
fn any_number_of_ranks_gives_the_results_of_one() {
    let plain = Options::default();
    let captured = Options { chunk: Some(3), capture_logits: true, capture_prompt_logits: true };
    for (count, options) in [(0, plain), (1, plain), (60, plain), (60, captured)] {
        let (expected, tokens, _) = on_ranks(1, &[(count, Mode::Deal)], options);
        for size in [2, 3, 5] {
            let (found, seen, summaries) = on_ranks(size, &[(count, Mode::Deal)], options);
            assert!(found == expected, "{size} ranks, {count} requests");
            assert_eq!(seen, tokens);
            let ran: u64 = summaries.iter().map(|summary| summary.sequences).sum();
            assert_eq!((summaries.len(), ran), (size, found.iter().flatten().count() as u64));
            let new: u64 = summaries.iter().map(|summary| summary.statistics.tokens).sum();
            assert_eq!(new, seen.iter().map(|tokens| tokens.len() as u64).sum::<u64>());
        }
    }
}

#[test]
fn to_warm_up_all_ranks_run_all() {
    let (_, _, summaries) = on_ranks(3, &[(20, Mode::Deal), (9, Mode::Copy)], Options::default());
    let ran: Vec<u64> = summaries.iter().map(|summary| summary.sequences).collect();
    assert_eq!(ran, [8, 8, 8], "one of the nine cannot run");
    let (found, _, _) = on_ranks(3, &[(9, Mode::Copy), (30, Mode::Deal)], Options::default());
    assert!(found == on_ranks(1, &[(30, Mode::Deal)], Options::default()).0);
}

#[test]
fn what_is_no_message_is_told() {
    let message = Message::Report { received: 3, remaining: 9 };
    let bytes = message.to_bytes().unwrap();
    assert_eq!(Message::from_bytes(&bytes).unwrap(), message);
    for end in 0..bytes.len() {
        Message::from_bytes(&bytes[..end]).unwrap_err();
    }
    Message::from_bytes(b"\x02\x00\x00\x00{}").unwrap_err();
    let ended = r#"{"Ended":{"number":0,"id":0,"prompt_tokens":1,"tokens":[],"reason":"Eos","counts":[2,1]}}"#;
    let bytes =
        |numbers: usize| [&(ended.len() as u32).to_le_bytes()[..], ended.as_bytes(), &vec![0; 4 * numbers]].concat();
    Message::from_bytes(&bytes(3)).unwrap();
    for numbers in [0, 2, 4] {
        Message::from_bytes(&bytes(numbers)).unwrap_err();
    }
}

#[test]
fn ranks_that_differ_are_told_apart() {
    let own = Introduction { version: "1.0".into(), plans: vec!["0123456789abcdef".into()], device: "H200".into() };
    assert_eq!(own.difference(&own), None);
    let mut other = Introduction { device: "H100".into(), ..own.clone() };
    assert!(own.difference(&other).unwrap().starts_with("device: expected H200, as on rank 0, found H100;"));
    other.plans = vec!["ff23456789abcdef".into()];
    assert!(
        own.difference(&other).unwrap().starts_with("plan: expected 0123456789ab, as on rank 0, found ff23456789ab;")
    );
    let old: Introduction = serde_json::from_str(r#"{"version": "0.9", "host": "x"}"#).unwrap();
    assert!(own.difference(&old).unwrap().contains("expected 1.0, as on rank 0, found 0.9"));
}

/// What a rank's watch did: it told a text, or it ended the process.
#[derive(Clone, PartialEq, Debug)]
enum Did {
    Told(String),
    Exit(u8),
}

struct Watched {
    watch: Watch,
    did: Receiver<Did>,
    ending: Arc<AtomicBool>,
}

fn peer(rank: usize) -> Peer {
    Peer { rank, host: "here".into(), pid: 40 + rank as u32 }
}

fn begin(rank: usize, links: Vec<Link>) -> Watched {
    let (sender, did) = channel();
    let sender = Arc::new(Mutex::new(sender));
    let send = move |done| sender.lock().unwrap().send(done).unwrap();
    let (tell, exit) = (send.clone(), send);
    let ending = Arc::new(AtomicBool::new(false));
    let give_up = watch::GiveUp {
        tell: Arc::new(move |text| tell(Did::Told(text.to_owned()))),
        exit: Arc::new(move |code| exit(Did::Exit(code))),
        ending: {
            let ending = ending.clone();
            Arc::new(move || ending.load(Ordering::Relaxed))
        },
    };
    Watched { watch: Watch::begin(peer(rank), links, give_up), did, ending }
}

/// Rank 0 with a watch, and the ends of its connections to others.
fn rank_0(others: usize) -> (Watched, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = |rank| {
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Link::new(peer(rank), listener.accept().unwrap().0).unwrap(), far)
    };
    let (links, ends): (Vec<_>, Vec<_>) = (1..=others).map(connect).unzip();
    (begin(0, links), ends)
}

fn followed(end: TcpStream, rank: usize) -> Watched {
    begin(rank, vec![Link::new(peer(0), end).unwrap()])
}

#[test]
fn a_connection_that_closes_ends_all_ranks() {
    let (lead, mut ends) = rank_0(2);
    let other = followed(ends.remove(0), 1);
    drop(ends);
    let Did::Told(text) = lead.did.recv().unwrap() else { panic!("told first") };
    assert!(text.starts_with("rank 2 (host here, pid 42): has ended before the work was done"), "{text}");
    assert_eq!(lead.did.recv(), Ok(Did::Exit(1)));
    assert_eq!(other.did.recv(), Ok(Did::Exit(1)), "rank 0 has told it");
}

#[test]
fn a_rank_that_says_nothing_ends_all_ranks() {
    let begun = Instant::now();
    let (lead, mut ends) = rank_0(2);
    let other = followed(ends.remove(0), 1);
    let Did::Told(text) = lead.did.recv().unwrap() else { panic!("told first") };
    assert!(text.starts_with("rank 2 (host here, pid 42): no sign of life for 5 s"), "{text}");
    assert!(begun.elapsed() >= SILENCE && begun.elapsed() < SILENCE + Duration::from_secs(3));
    assert_eq!((lead.did.recv(), other.did.recv()), (Ok(Did::Exit(1)), Ok(Did::Exit(1))));
}

#[test]
fn without_rank_0_the_others_tell() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let end = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = followed(end, 1);
    drop(listener.accept().unwrap());
    let Did::Told(text) = other.did.recv().unwrap() else { panic!("told first") };
    assert!(text.starts_with("rank 0 (host here, pid 40): has ended"), "{text}");
    assert_eq!(other.did.recv(), Ok(Did::Exit(1)));
}

#[test]
fn after_a_goodbye_connections_may_close() {
    let (lead, mut ends) = rank_0(1);
    let other = followed(ends.remove(0), 1);
    lead.watch.say_goodbye();
    other.watch.say_goodbye();
    sleep(Duration::from_millis(300));
    other.watch.end();
    sleep(Duration::from_millis(300));
    lead.watch.end();
    assert!(lead.did.try_recv().is_err() && other.did.try_recv().is_err(), "nothing was told");
}

/// Ctrl-C tells all ranks to end, and each does when it can.
#[test]
fn where_all_were_told_to_end_nobody_is_at_fault() {
    let (lead, mut ends) = rank_0(1);
    let other = followed(ends.remove(0), 1);
    for rank in [&lead, &other] {
        rank.ending.store(true, Ordering::Relaxed);
    }
    sleep(Duration::from_millis(300));
    other.watch.end();
    sleep(Duration::from_millis(300));
    assert!(lead.did.try_recv().is_err() && other.did.try_recv().is_err(), "nothing was told");
}

#[test]
fn a_rank_that_alone_was_told_to_end_ends_all_ranks() {
    let (lead, mut ends) = rank_0(1);
    let other = followed(ends.remove(0), 1);
    other.ending.store(true, Ordering::Relaxed);
    sleep(Duration::from_millis(300));
    assert!(lead.did.try_recv().is_err(), "it is there still");
    other.watch.end();
    let Did::Told(text) = lead.did.recv().unwrap() else { panic!("told first") };
    assert!(text.starts_with("rank 1 (host here, pid 41): was told to end by a signal (SIGTERM)"), "{text}");
    assert_eq!(lead.did.recv(), Ok(Did::Exit(1)));
}
