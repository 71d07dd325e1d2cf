//! Plans whose layers are spread over ranks: results are those of one rank that has them all, to the bit.

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::passes::Target;
use lfm2c::plan::{CollectiveKind, Manifest, Op, PlanFile, StateRole};
use lfm2c::runtime::group::LocalGroup;

use crate::common::*;
use crate::several::*;

fn staged(ranks: u64) -> CompileOptions {
    CompileOptions { target: Target::Cpu, pipeline_ranks: ranks, ..options() }
}

/// All logits too: of prompts, whole and in chunks that go on, and of the rows that new tokens were chosen from.
#[test]
fn several_ranks_in_one_process_give_the_bits_of_one() {
    let one = demo_plan(&staged(1));
    let requests = requests(13, one.manifest.model.vocab);
    for chunk in [None, Some(5)] {
        let expected = run(&mut cpu_executor(&one, None), requests.clone(), all_logits(chunk));
        for ranks in [2, 3, 4, 6] {
            let file = demo_plan(&staged(ranks));
            let found = run(&mut ensemble(&file, None), requests.clone(), all_logits(chunk));
            assert!(found == expected, "{ranks} ranks, {chunk:?}");
        }
    }
}

#[test]
fn ranks_with_requests_of_their_own_give_the_bits_of_one() {
    let one = demo_plan(&staged(1));
    let requests = requests(24, one.manifest.model.vocab);
    let expected = run(&mut cpu_executor(&one, None), requests.clone(), all_logits(None));
    for (ranks, lookahead) in [(2, 1), (3, 2), (4, 3)] {
        let file = demo_plan(&staged(ranks));
        let found = on_threads(&file, lookahead, &requests, all_logits(None));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.tokens, expected.tokens, "request {i} on {ranks} ranks");
            assert!(found.prompt_logits == expected.prompt_logits, "request {i} on {ranks} ranks: other logits");
        }
    }
}

#[test]
fn nobody_waits_for_a_rank_that_fails() {
    let file = demo_plan(&staged(2));
    let mut groups = LocalGroup::new(2);
    drop(groups.pop());
    let group = Box::new(groups.remove(0));
    let mut executor = cpu_rank(&file, 0, None).with_group(group).expect("it is one of the plan's ranks");
    let error = executor.run_steps(0).expect_err("rank 1 has ended");
    assert!(format!("{error:#}").contains("rank 1 of the group has ended"), "{error:#}");
    // Without any group, a step says what it needs.
    let error = cpu_rank(&file, 0, None).run_steps(0).expect_err("it is alone");
    assert!(format!("{error:#}").contains("expected 2 ranks, as the plan has, found one; start it with `mpirun -n 2`"));
}

#[test]
fn goldens_agree_on_several_ranks() {
    for (name, ranks) in [("moe-base", 2), ("mixed", 3), ("dense", 2)] {
        goldens_agree_on_ranks(name, &staged(ranks));
    }
}

/// A rank has the weights of its stage's layers, and the state of one rank's layers, spread over the rows of all ranks.
#[test]
fn a_rank_has_the_weights_of_its_stage_and_state_of_all_ranks_rows() {
    let (one, three) = (demo_plan(&staged(1)), demo_plan(&staged(3)));
    assert_eq!(three.manifest.stages, [(0, 2), (2, 4), (4, 6)]);
    assert!(one.manifest.stages.is_empty());
    let layer = |name: &str| -> Option<u64> { name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok() };
    let names = |program: &lfm2c::plan::Program| -> Vec<String> {
        program.weights.iter().map(|weight| weight.name.clone()).filter(|name| layer(name).is_some()).collect()
    };
    let mut all = vec![];
    for (program, stage) in three.manifest.ranks.iter().zip(&three.manifest.stages) {
        let own = names(program);
        let inside = |name: &String| layer(name).is_some_and(|layer| (stage.0..stage.1).contains(&layer));
        assert!(own.iter().all(inside), "{own:?}");
        assert!(program.weights.iter().any(|weight| weight.name == "model.embed_tokens.weight"));
        all.extend(own);
        for role in [StateRole::KvPages, StateRole::ConvRing] {
            for state in program.states.iter().filter(|state| state.role == role && !state.name.contains(".of")) {
                let copies =
                    program.states.iter().filter(|other| other.name.starts_with(&format!("{}.of", state.name)));
                assert_eq!(copies.count(), 2, "{}: one for the rows of each other rank", state.name);
            }
        }
    }
    let (mut all, mut expected) = (all, names(&one.manifest.ranks[0]));
    all.sort();
    expected.sort();
    assert_eq!(all, expected, "each on one rank");
    assert!(PlanFile::from_bytes(&three.to_bytes()).expect("a valid plan") == three);
    assert!(demo_plan(&staged(3)).to_bytes() == three.to_bytes(), "compiling twice gives the same bytes");
}

/// Of every rank's rows, each stage but the rank's own gets them from another rank, and so does the rank in the end.
#[test]
fn rows_go_through_all_stages_and_back() {
    for ranks in [2, 4] {
        let file = demo_plan(&staged(ranks));
        for bucket in 0..file.manifest.ranks[0].buckets.len() {
            let mut pairs = vec![];
            for (rank, program) in (0u64..).zip(&file.manifest.ranks) {
                let mut sent = 0;
                for step in &program.buckets[bucket].steps {
                    let Some(collective) = &step.collective else { continue };
                    assert_eq!(collective.size, ranks);
                    if let CollectiveKind::Send(to) = collective.kind {
                        pairs.push((rank, to));
                        assert_eq!(step.cost.link_bytes, collective.bytes(), "{}", step.name);
                        sent += 1;
                    }
                }
                // Rows of all ranks to the next stage or back, and its own to the first; the ends keep their own.
                let expected = if rank == 0 || rank == ranks - 1 { ranks } else { ranks + 1 };
                assert_eq!(sent, expected, "rank {rank} of {ranks}");
            }
            let next = |rank: u64| pairs.iter().filter(|pair| **pair == (rank, rank + 1)).count() as u64;
            assert!((0..ranks - 1).all(|rank| next(rank) >= ranks), "{pairs:?}");
        }
    }
}

/// The step of a rank's n-th exchange in its first bucket.
fn exchange(manifest: &Manifest, rank: usize, nth: usize) -> usize {
    let steps = manifest.ranks[rank].buckets[0].steps.iter().enumerate();
    steps.filter(|(_, step)| step.collective.is_some()).nth(nth).expect("there are as many").0
}

/// Makes a rank's exchange one with another rank.
fn redirect(manifest: &mut Manifest, rank: usize, nth: usize, with: u64) {
    let at = exchange(manifest, rank, nth);
    let program = &mut manifest.ranks[rank];
    let mut semantic = program.semantics[program.buckets[0].steps[at].op as usize].clone();
    let kind = match &mut semantic.body[0].0 {
        Op::Send { to, .. } => {
            *to = with;
            CollectiveKind::Send(with)
        }
        Op::Receive { from, .. } => {
            *from = with;
            CollectiveKind::Receive(with)
        }
        other => panic!("{other:?} is no exchange between two"),
    };
    let step = &mut program.buckets[0].steps[at];
    step.op = program.semantics.len() as u32;
    step.collective.as_mut().expect("it is an exchange").kind = kind;
    program.semantics.push(semantic);
}

#[test]
fn the_validator_finds_ranks_that_would_wait_for_ever() {
    type Change = fn(&mut Manifest);
    let cases: [(&str, Change); 9] = [
        ("stages: expected each on one of 3 ranks, or on as many as each other, found 2", |m| m.stages.truncate(2)),
        ("stages: expected layers from 0 on, each in one stage", |m| m.stages[1].0 = 1),
        ("stages: expected layers from 0 on, each in one stage", |m| m.stages[2].1 = m.stages[2].0),
        ("experts: expected those of each of 3 ranks, none where a rank has all", |m| m.experts = vec![vec![0]; 3]),
        // Rank 0 sends its rows, and rank 1 gets them of rank 2.
        (
            "bucket prefill_16: expected an order of all exchanges that every rank's agrees with, found ranks that wait for ever: rank 0 \
          in step rank0.send to send to rank 1; rank 1 in step rank0.receive to receive of rank 2; rank 2",
            |m| redirect(m, 1, 0, 2),
        ),
        ("`collective`: expected Some(Collective { kind: Send(1)", |m| {
            let at = exchange(m, 0, 0);
            m.ranks[0].buckets[0].steps[at].collective.as_mut().expect("it is one").kind = CollectiveKind::Send(2);
        }),
        ("Send: `to`: expected a rank below 3, found 3", |m| redirect(m, 0, 0, 3)),
        // Less than what is sent.
        ("rank 0, semantic", |m| {
            let at = exchange(m, 0, 0);
            let op = m.ranks[0].buckets[0].steps[at].op as usize;
            m.ranks[0].semantics[op].inputs.remove(1);
        }),
        // The third rank has no part in it any more.
        ("stages: expected each on one of 2 ranks, or on as many as each other, found 3", |m| m.ranks.truncate(2)),
    ];
    for (expected, change) in cases {
        let mut file = demo_plan(&staged(3));
        change(&mut file.manifest);
        let text = format!("{:#}", file.validate().expect_err(expected));
        assert!(text.contains(expected), "expected `{expected}`: {text}");
    }
}

/// Two ranks that send at the same time: each end has its other one, and still neither goes on.
#[test]
fn the_validator_finds_a_circle() {
    let mut file = demo_plan(&staged(2));
    // Rank 1 sends its rows to rank 0 before it receives those of rank 0, which sends them first.
    let (program, bucket) = (1, 0);
    let (first, second) = (exchange(&file.manifest, 1, 0), exchange(&file.manifest, 1, 1));
    let steps = &mut file.manifest.ranks[program].buckets[bucket].steps;
    assert!(
        second == first + 1
            && matches!(steps[first].collective.as_ref().expect("one").kind, CollectiveKind::Receive(0))
    );
    steps.swap(first, second);
    let (a, b) = (steps[first].after.clone(), steps[second].after.clone());
    (steps[first].after, steps[second].after) =
        (b.iter().map(|_| first as u32 - 1).collect(), a.iter().map(|_| first as u32).collect());
    let text = format!("{:#}", file.validate().expect_err("they wait for each other"));
    assert!(
        text.contains("bucket prefill_16: expected an order of all exchanges that every rank's agrees with, found ranks that wait for ever: \
                       rank 0 in step rank0.send to send to rank 1; rank 1 in step rank1.send to send to rank 0"),
        "{text}"
    );
}

/// What one rank sends and what another receives differ.
#[test]
fn the_validator_compares_what_is_sent_and_received() {
    let mut file = demo_plan(&staged(2));
    let other = demo_plan(&CompileOptions { dtype: Some(lfm2c::ir::DType::BF16), ..staged(2) });
    file.manifest.ranks[1] = other.manifest.ranks[1].clone();
    file.manifest.tensors.extend(
        other.manifest.tensors.iter().filter(|t| !file.manifest.tensors.contains(t)).cloned().collect::<Vec<_>>(),
    );
    let text = format!("{:#}", file.validate().expect_err("f32 and bf16"));
    assert!(text.contains("rank 1, step rank0.receive: expected to receive [(F32, "), "{text}");
}

#[test]
fn numbers_of_ranks_that_cannot_be_are_told() {
    let demo = || {
        let recipe = Recipe::read(&project("plans/synthetic.ron")).expect("the recipe is readable");
        Source::Recipe(Box::new(recipe), None)
    };
    let text = "graph @g (%x: f32[4]) {\n%y = exp %x : f32[4]\nreturn %y\n}";
    let graph = Source::Graph("g".into(), Box::new(lfm2c::ir::parse(text).expect("a graph").graph));
    let forced = CompileOptions { forced_routing: true, ..staged(2) };
    let cases = [
        (demo(), staged(0), "--ranks pipeline=0: expected 1 to 6 stages, as many as the model has layers, found 0"),
        (demo(), staged(7), "--ranks pipeline=7: expected 1 to 6 stages"),
        (demo(), forced, "--ranks pipeline=2: expected routers that choose experts, found --forced-routing"),
        (graph, staged(2), "--ranks pipeline=2: expected a model, found a graph in text form"),
    ];
    for (source, options, expected) in cases {
        let error = compile(&source, &options, &Silent).err().expect(expected).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
