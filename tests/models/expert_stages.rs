//! Plans whose layers are in stages, and whose experts are spread over the ranks of each: the tokens are those of one rank that has all.

use std::collections::BTreeSet;

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::passes::Target;
use lfm2c::plan::{CollectiveKind, Manifest, Op, PlanFile};
use lfm2c::runtime::Options;
use lfm2c::runtime::group::LocalGroup;

use crate::common::*;
use crate::expert_replicas::with_replicas;
use crate::several::*;

fn grid(expert_ranks: u64, pipeline_ranks: u64) -> CompileOptions {
    CompileOptions { target: Target::Cpu, expert_ranks, pipeline_ranks, ..options() }
}

const SHAPES: [(u64, u64); 4] = [(2, 2), (3, 2), (2, 3), (4, 6)];

#[test]
fn several_ranks_in_one_process_give_the_tokens_of_one() {
    let one = demo_plan(&grid(1, 1));
    let requests = requests(13, one.manifest.model.vocab);
    for chunk in [None, Some(5)] {
        let expected = run(&mut cpu_executor(&one, None), requests.clone(), all_logits(chunk));
        for (experts, stages) in SHAPES {
            let file = demo_plan(&grid(experts, stages));
            let found = run(&mut ensemble(&file, None), requests.clone(), all_logits(chunk));
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let what = format!("request {i} on {experts} ranks of {stages} stages, {chunk:?}");
                assert_eq!(found.tokens, expected.tokens, "{what}");
                let error = relative_l2(&found.prompt_logits, &expected.prompt_logits);
                assert!(error < 1e-5, "{what}: relative L2 distance {error:e}");
            }
        }
    }
}

/// Where layers are cut makes no difference to any sum.
#[test]
fn stages_give_the_bits_of_ranks_with_all_layers() {
    let spread = demo_plan(&grid(2, 1));
    let requests = requests(9, spread.manifest.model.vocab);
    let expected = run(&mut ensemble(&spread, None), requests.clone(), all_logits(Some(7)));
    for stages in [2, 4] {
        let file = demo_plan(&grid(2, stages));
        let found = run(&mut ensemble(&file, None), requests.clone(), all_logits(Some(7)));
        assert!(found == expected, "{stages} stages: other bits");
    }
}

#[test]
fn ranks_with_requests_of_their_own_give_the_tokens_of_one() {
    let one = demo_plan(&grid(1, 1));
    let requests = requests(24, one.manifest.model.vocab);
    let expected = run(&mut cpu_executor(&one, None), requests.clone(), Options::default());
    for ((experts, stages), lookahead) in [((2, 2), 1), ((3, 2), 2), ((2, 3), 3)] {
        let file = demo_plan(&grid(experts, stages));
        let found = on_threads(&file, lookahead, &requests, Options::default());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.tokens, expected.tokens, "request {i} on {experts} ranks of {stages} stages");
        }
    }
}

#[test]
fn goldens_agree_on_four_ranks() {
    for name in ["moe-base", "mixed"] {
        goldens_agree_on_ranks(name, &grid(2, 2));
    }
}

/// Each stage's experts are where its own layers' counts want them, replicas included.
#[test]
fn experts_are_placed_stage_by_stage() {
    let one = demo_plan(&grid(1, 1));
    let requests = requests(13, one.manifest.model.vocab);
    let options = Options { chunk: Some(23), ..Options::default() };
    let expected = run(&mut cpu_executor(&one, None), requests.clone(), options);
    for replicas in [0, 1] {
        let plan = |options: &CompileOptions| demo_plan(&CompileOptions { pipeline_ranks: 2, ..options.clone() });
        let file = with_replicas(&one, 2, replicas, &plan);
        let experts = &file.manifest.experts;
        assert_eq!(experts.len(), 4);
        assert_ne!(experts[..2], experts[2..], "layers count each by themselves");
        for stage in experts.chunks(2) {
            let all: BTreeSet<u64> = stage.iter().flatten().copied().collect();
            assert_eq!(all, (0..8).collect(), "{experts:?}");
            let copies = stage.iter().map(Vec::len).sum::<usize>() - 8;
            assert!(copies <= 2 * replicas as usize && (copies > 0) == (replicas > 0), "{experts:?}");
        }
        assert_eq!(run(&mut ensemble(&file, None), requests.clone(), options), expected, "{replicas} replicas");
        assert_eq!(on_threads(&file, 2, &requests, options), expected, "{replicas} replicas, on threads");
    }
}

/// A rank has its experts' weights of its stage's layers; exchanges rows of experts within the stage, and all rows with its neighbours.
#[test]
fn a_rank_has_its_experts_of_its_stage() {
    let file = demo_plan(&grid(2, 3));
    assert_eq!(file.manifest.stages, [(0, 2), (2, 4), (4, 6)]);
    let [low, high] = [vec![0, 1, 2, 3], vec![4, 5, 6, 7]];
    assert_eq!(file.manifest.experts, [low.clone(), high.clone(), low.clone(), high.clone(), low, high]);
    for (rank, program) in file.manifest.ranks.iter().enumerate() {
        let (first, end) = file.manifest.stages[rank / 2];
        for weight in &program.weights {
            let layer = weight.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
            assert!(layer.is_none_or(|layer| (first..end).contains(&layer)), "rank {rank}: {}", weight.name);
            let own = if weight.name.contains(".experts.") { &file.manifest.experts[rank][..] } else { &[] };
            assert_eq!(weight.indices, own, "rank {rank}: {}", weight.name);
        }
        for bucket in &program.buckets {
            let mut together = 0;
            for step in &bucket.steps {
                let Some(collective) = &step.collective else { continue };
                match collective.kind {
                    CollectiveKind::Send(peer) | CollectiveKind::Receive(peer) => {
                        assert_eq!((collective.size, peer % 2), (6, rank as u64 % 2), "rank {rank}: {}", step.name);
                    }
                    CollectiveKind::AllGather | CollectiveKind::AllToAll => {
                        assert_eq!(collective.members(rank), rank / 2 * 2..rank / 2 * 2 + 2, "{}", step.name);
                        together += 1;
                    }
                }
            }
            // The first two layers are dense; each other one gathers and gives back once for each micro-batch.
            assert_eq!(together, if rank < 2 { 0 } else { 2 * 2 * 3 }, "rank {rank}");
        }
    }
    assert!(PlanFile::from_bytes(&file.to_bytes()).expect("a valid plan") == file);
    assert!(demo_plan(&grid(2, 3)).to_bytes() == file.to_bytes(), "compiling twice gives the same bytes");
}

#[test]
fn nobody_waits_for_a_rank_that_fails() {
    let file = demo_plan(&grid(2, 2));
    // Rank 3 is waited for by rank 2 within their stage, and by rank 1; rank 0 waits for those.
    let mut groups = LocalGroup::new(4);
    drop(groups.pop());
    std::thread::scope(|scope| {
        for (rank, group) in groups.into_iter().enumerate() {
            let file = &file;
            scope.spawn(move || {
                let executor = cpu_rank(file, rank, None).with_group(Box::new(group));
                let error =
                    executor.expect("it is one of the plan's ranks").run_steps(0).expect_err("rank 3 has ended");
                let text = format!("{error:#}");
                assert!(text.contains("of the group has ended before the work was done"), "rank {rank}: {text}");
            });
        }
    });
}

#[test]
fn the_validator_follows_all_ranks() {
    /// The first step of a rank that is one of these.
    fn step(manifest: &mut Manifest, rank: usize, kind: CollectiveKind) -> usize {
        let steps = manifest.ranks[rank].buckets[0].steps.iter();
        steps
            .map(|step| step.collective.as_ref().map(|found| found.kind))
            .position(|found| found == Some(kind))
            .expect("one")
    }
    type Change = fn(&mut Manifest);
    let cases: [(&str, Change); 7] = [
        ("stages: expected each on one of 4 ranks, or on as many as each other, found 3", |m| {
            m.stages = vec![(0, 2), (2, 3), (3, 6)];
        }),
        ("stages: expected each on one of 4 ranks, or on as many as each other, found 2", |m| m.experts.clear()),
        ("experts: expected those of each of 4 ranks, none where a rank has all, found 3", |m| m.experts.truncate(3)),
        ("experts: expected each on a rank or more of each stage", |m| m.experts.swap(1, 2)),
        ("expected a collective of a stage's ranks, of which there are 2, found 4", |m| {
            let at = step(m, 2, CollectiveKind::AllToAll);
            let program = &mut m.ranks[2];
            let found = &mut program.buckets[0].steps[at];
            found.collective.as_mut().expect("it is one").size = 4;
            found.collective.as_mut().expect("it is one").parts[0].1 /= 2;
            let op = found.op as usize;
            program.semantics[op].body[0].0 = Op::AllToAll { ranks: 4 };
        }),
        // Rank 2 has all experts, and does nothing together with rank 3.
        ("found ranks that wait for ever: ", |m| {
            let alone = CompileOptions { disabled: vec!["expert-parallel".into()], ..grid(2, 2) };
            m.ranks[2] = demo_plan(&alone).manifest.ranks.swap_remove(2);
            m.ranks[2].buckets.iter_mut().for_each(|bucket| bucket.text = 0);
        }),
        // Rank 1 sends to rank 2, which receives of rank 0 alone.
        ("rank 1 in step rank1.send to send to rank 2; rank 2 in step layers.3.ffn.all_gather for ranks 2 to 3", |m| {
            let at = step(m, 1, CollectiveKind::Send(3));
            let program = &mut m.ranks[1];
            let found = &mut program.buckets[0].steps[at];
            found.collective.as_mut().expect("it is one").kind = CollectiveKind::Send(2);
            let op = found.op as usize;
            program.semantics[op].body[0].0 = Op::Send { to: 2, ranks: 4 };
        }),
    ];
    for (expected, change) in cases {
        let mut file = demo_plan(&grid(2, 2));
        change(&mut file.manifest);
        let text = format!("{:#}", file.validate().expect_err(expected));
        assert!(text.contains(expected), "expected `{expected}`: {text}");
    }
}

/// Two ranks of a stage that are at another micro-batch each would add up rows of other layers, or wait for ever.
#[test]
fn the_validator_compares_what_ranks_of_a_stage_do() {
    let mut file = demo_plan(&grid(2, 2));
    let steps = &mut file.manifest.ranks[3].buckets[0].steps;
    let gathers: Vec<usize> = (0..steps.len())
        .filter(|&at| steps[at].collective.as_ref().is_some_and(|found| found.kind == CollectiveKind::AllGather))
        .collect();
    let (a, b) = (steps[gathers[0]].name.clone(), steps[gathers[1]].name.clone());
    steps[gathers[0]].name = b.clone();
    steps[gathers[1]].name = a.clone();
    let text = format!("{:#}", file.validate().expect_err("they are of two layers"));
    assert!(text.contains(&format!("bucket prefill_16: rank 3, step {b}: expected {a} of [")), "{text}");
}

#[test]
fn numbers_of_ranks_that_cannot_be_are_told() {
    let demo = || {
        let recipe = Recipe::read(&project("plans/synthetic.ron")).expect("the recipe is readable");
        Source::Recipe(Box::new(recipe), None)
    };
    let forced = CompileOptions { forced_routing: true, ..grid(2, 2) };
    let cases = [
        (grid(9, 2), "--ranks expert=9: expected 1 to 8 ranks"),
        (grid(2, 7), "--ranks pipeline=7: expected 1 to 6 stages"),
        (forced, "--ranks pipeline=2: expected routers that choose experts, found --forced-routing"),
    ];
    for (options, expected) in cases {
        let error = compile(&demo(), &options, &Silent).err().expect(expected).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
