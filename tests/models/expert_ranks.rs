//! Plans whose experts are spread over ranks: the tokens are those of one rank that has them all.

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::passes::Target;
use lfm2c::plan::{CollectiveKind, DType, Manifest, Op, PlanFile, Semantic};

use lfm2c::runtime::Options;
use lfm2c::runtime::group::LocalGroup;

use crate::common::*;
use crate::expert_replicas::with_replicas;
use crate::several::*;

pub fn spread(ranks: u64) -> CompileOptions {
    CompileOptions { target: Target::Cpu, expert_ranks: ranks, ..options() }
}

#[test]
fn several_ranks_in_one_process_give_the_tokens_of_one() {
    let one = demo_plan(&spread(1));
    let requests = requests(13, one.manifest.model.vocab);
    for chunk in [None, Some(5)] {
        let options = Options { chunk, ..Options::default() };
        let expected = run(&mut cpu_executor(&one, None), requests.clone(), options);
        for ranks in [2, 3, 8] {
            let file = demo_plan(&spread(ranks));
            assert_eq!(
                run(&mut ensemble(&file, None), requests.clone(), options),
                expected,
                "{ranks} ranks, {chunk:?}"
            );
        }
    }
}

#[test]
fn logits_of_prompts_differ_by_the_order_of_sums_alone() {
    let (one, four) = (demo_plan(&spread(1)), demo_plan(&spread(4)));
    let requests = requests(6, one.manifest.model.vocab);
    let expected = run(&mut cpu_executor(&one, None), requests.clone(), all_logits(Some(7)));
    let found = run(&mut ensemble(&four, None), requests.clone(), all_logits(Some(7)));
    for (found, expected) in found.iter().zip(&expected) {
        let error = relative_l2(&found.prompt_logits, &expected.prompt_logits);
        assert!(error < 1e-5, "relative L2 distance {error:e}");
    }
    let again = run(&mut ensemble(&four, None), requests, all_logits(Some(7)));
    assert!(found == again, "the same bits in every run");
}

#[test]
fn ranks_with_requests_of_their_own_give_the_tokens_of_one() {
    let one = demo_plan(&spread(1));
    let requests = requests(24, one.manifest.model.vocab);
    let expected = run(&mut cpu_executor(&one, None), requests.clone(), Options::default());
    for (ranks, lookahead) in [(2, 1), (4, 3)] {
        let file = demo_plan(&spread(ranks));
        let found = on_threads(&file, lookahead, &requests, Options::default());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.tokens, expected.tokens, "request {i} on {ranks} ranks");
        }
    }
}

#[test]
fn nobody_waits_for_a_rank_that_fails() {
    let file = demo_plan(&spread(2));
    let mut groups = LocalGroup::new(2);
    drop(groups.pop());
    let group = Box::new(groups.remove(0));
    let mut executor = cpu_rank(&file, 0, None).with_group(group).expect("it is one of the plan's ranks");
    let mut generator = lfm2c::runtime::Generator::new(&mut executor, Options::default()).expect("a language model");
    let error = generator.generate(vec![request(&[1, 2], 3)], |_, _| std::ops::ControlFlow::Continue(()));
    let text = format!("{:#}", error.expect_err("it has ended"));
    assert!(text.contains("rank 1 of the group has ended"), "{text}");
    // Without any group, a step says what it needs.
    let error = cpu_rank(&file, 0, None).run_steps(0).expect_err("it is alone");
    assert!(format!("{error:#}").contains("expected 2 ranks, as the plan has, found one; start it with `mpirun -n 2`"));
    let error = cpu_rank(&file, 0, None).with_group(Box::new(LocalGroup::new(3).remove(0))).err().expect("of three");
    assert!(error.to_string().contains("expected rank 0 of 2, as the plan has, found rank 0 of 3"), "{error}");
}

/// A rank loads its experts alone, those too that others have as well, and their numbers are those of the plan of one rank.
#[test]
fn a_rank_has_the_weights_of_its_experts() {
    let directory = project("tests/goldens/moe-base");
    for (directory, replicas) in [(None, 0), (Some(&*directory), 0), (None, 1), (Some(&*directory), 1)] {
        let plan = |options: &CompileOptions| match directory {
            None => demo_plan(options),
            Some(directory) => directory_plan(directory, options),
        };
        let one = plan(&spread(1));
        let three = match replicas {
            0 => plan(&spread(3)),
            _ => with_replicas(&one, 3, replicas, &plan),
        };
        let all = cpu_executor(&one, directory);
        let bytes = |manifest: &Manifest, rank: usize, name: &str, pool: &[u8]| {
            let program = &manifest.ranks[rank];
            let weight = program.weights.iter().find(|weight| weight.name == name).expect("it is there").clone();
            let size = weight.ty.bytes().expect("it fits") as usize;
            let start = (program.pool.weights.offset + weight.offset) as usize;
            (weight, pool[start..start + size].to_vec())
        };
        let mut seen = 0;
        for rank in 0..3 {
            let executor = cpu_rank(&three, rank, directory);
            for weight in &three.manifest.ranks[rank].weights {
                let found = bytes(&three.manifest, rank, &weight.name, executor.pool().bytes()).1;
                let of = weight.name.trim_end_matches(".local");
                let (whole, expected) = bytes(&one.manifest, 0, of, all.pool().bytes());
                if weight.indices.is_empty() {
                    assert!(found == expected && !of.contains(".experts."), "{of}");
                    continue;
                }
                assert_eq!(weight.indices, three.manifest.experts[rank], "{of}");
                let each = expected.len() / whole.ty.1[0] as usize;
                let rows = weight.indices.iter().flat_map(|&expert| &expected[expert as usize * each..][..each]);
                assert!(found.iter().eq(rows), "rank {rank}: {of}");
                seen += weight.indices.len();
            }
        }
        let experts = three.manifest.experts.iter().map(Vec::len).sum::<usize>();
        assert!(seen > 0 && seen.is_multiple_of(experts), "each rank loads its experts in all layers: {seen}");
        assert_eq!(experts > 8, replicas > 0, "each expert is on one rank, unless there are replicas");
    }
}

#[test]
fn goldens_agree_on_two_ranks() {
    for name in ["moe-base", "mixed", "moe-scale"] {
        goldens_agree_on_ranks(name, &spread(2));
    }
}

/// Every layer gathers once and exchanges once, the same on all ranks, and says how many bytes cross the link.
#[test]
fn ranks_have_the_same_collectives() {
    let file = demo_plan(&spread(3));
    assert_eq!(file.manifest.experts, [vec![0, 1], vec![2, 3, 4], vec![5, 6, 7]]);
    for program in &file.manifest.ranks {
        for bucket in &program.buckets {
            let steps: Vec<_> =
                bucket.steps.iter().filter_map(|step| Some((step, step.collective.as_ref()?))).collect();
            assert_eq!(steps.len(), 2 * 4, "four layers have experts");
            for (i, (step, collective)) in steps.into_iter().enumerate() {
                let (kind, parts) = match i % 2 {
                    0 => (
                        CollectiveKind::AllGather,
                        vec![
                            (DType::F32, bucket.tokens * 128),
                            (DType::F32, bucket.tokens * 2),
                            (DType::I32, bucket.tokens * 2),
                        ],
                    ),
                    _ => (CollectiveKind::AllToAll, vec![(DType::F32, bucket.tokens * 128)]),
                };
                assert_eq!((collective.kind, collective.size, &collective.parts), (kind, 3, &parts), "{}", step.name);
                assert_eq!(step.cost.link_bytes, 2 * collective.bytes(), "{}", step.name);
            }
        }
    }
    assert!(PlanFile::from_bytes(&file.to_bytes()).expect("a valid plan") == file);
    assert!(demo_plan(&spread(3)).to_bytes() == file.to_bytes(), "compiling twice gives the same bytes");
    // One rank with all experts is a plan without ranks.
    assert!(demo_plan(&spread(1)).manifest.experts.is_empty());
}

/// The semantic of a rank's first step that is there because experts are spread.
pub fn semantic(manifest: &mut Manifest, rank: usize, is_it: fn(&Op) -> bool) -> &mut Semantic {
    let semantics = &mut manifest.ranks[rank].semantics;
    semantics.iter_mut().find(|semantic| is_it(&semantic.body[0].0)).expect("there is one")
}

#[test]
fn the_validator_compares_ranks() {
    type Change = fn(&mut Manifest);
    let cases: [(&str, Change); 11] = [
        ("expected a collective of the plan's ranks, of which there are 3, found 2", |m| {
            m.ranks.push(m.ranks[0].clone());
            m.experts = vec![m.experts[0].clone(), vec![4, 5], vec![6, 7]];
        }),
        ("experts: expected each on a rank or more", |m| m.experts[1][0] = 0),
        ("expected those of each of 2 ranks", |m| m.experts.clear()),
        ("rank 1, bucket prefill_16, step layers.2.ffn.all_gather: `collective`: expected Some", |m| {
            let step = m.ranks[1].buckets[0].steps.iter_mut().find(|step| step.collective.is_some());
            step.expect("there is one").collective = None;
        }),
        ("rank 1: bucket 0: expected (\"prefill_16\", Prefill, 16, ", |m| {
            m.ranks[1].buckets.remove(0);
        }),
        ("rank 0: weight model.layers.2.feed_forward.experts.w1+w3.weight.local: expected experts [4, 5, 6, 7]", |m| {
            m.experts.swap(0, 1);
        }),
        ("(local+group): expected experts [4, 5, 6, 7] of 8, found [0, 1, 2, 3] of 8", |m| {
            let semantic = semantic(m, 1, |op| matches!(op, Op::LocalExperts { .. }));
            semantic.body[0].0 = Op::LocalExperts { of: 8, experts: vec![0, 1, 2, 3], parts: vec![] };
        }),
        ("AllGather: expected it to be alone in its step", |m| {
            let semantic = semantic(m, 0, |op| matches!(op, Op::AllGather { .. }));
            semantic.body.push(semantic.body[0].clone());
        }),
        ("AllToAll: expected rows of 3 equal blocks, found 32", |m| {
            semantic(m, 0, |op| matches!(op, Op::AllToAll { .. })).body[0].0 = Op::AllToAll { ranks: 3 };
        }),
        (
            "bucket prefill_16: expected an order of all exchanges that every rank's agrees with, found ranks that wait for ever: rank 0 in step \
          layers.2.ffn.all_gather for ranks 0 to 1",
            |m| {
                let apart = CompileOptions { disabled: vec!["expert-parallel".into()], ..spread(2) };
                m.ranks[1] = demo_plan(&apart).manifest.ranks[1].clone();
            },
        ),
        ("step layers.5.ffn.all_to_all: a collective of the head, which a rank may run again alone", |m| {
            let bucket = &mut m.ranks[0].buckets[0];
            let last = bucket.steps.iter().rposition(|step| step.collective.is_some());
            bucket.head = last.expect("there is one") as u32;
        }),
    ];
    for (expected, change) in cases {
        let mut file = demo_plan(&spread(2));
        change(&mut file.manifest);
        let text = format!("{:#}", file.validate().expect_err(expected));
        assert!(text.contains(expected), "expected `{expected}`: {text}");
    }
}

/// In a plan of one rank, nobody is there to exchange anything with.
#[test]
fn one_rank_has_no_collectives() {
    let text = "graph @g (%x: f32[4,2]) {\n%y = all_gather %x {ranks = 1} : f32[4,2]\nreturn %y\n}";
    let graph = Source::Graph("g".into(), Box::new(lfm2c::ir::parse(text).expect("a graph").graph));
    let error = compile(&graph, &spread(1), &Silent).err().expect("it is refused");
    let text = format!("{error:#}");
    assert!(
        text.contains("step all_gather: expected a collective of the plan's ranks, of which there are 1"),
        "{text}"
    );
}

/// Between collectives, ranks may have other steps: here one whose operators are not fused. A rank left out of the pass has all experts.
#[test]
fn ranks_need_the_same_collectives_alone() {
    let fusions = ["fuse-residual", "fuse-norm-matmul", "group-experts"].map(str::to_owned).to_vec();
    let (mut file, other) = (demo_plan(&spread(2)), demo_plan(&CompileOptions { disabled: fusions, ..spread(2) }));
    file.manifest.ranks[1] = other.manifest.ranks[1].clone();
    let steps = |rank: usize| file.manifest.ranks[rank].buckets[0].steps.len();
    assert!(steps(0) < steps(1), "{} and {} steps", steps(0), steps(1));
    let whole = demo_plan(&CompileOptions { disabled: vec!["expert-parallel".into()], ..spread(2) });
    let requests = requests(5, file.manifest.model.vocab);
    let expected = run(&mut cpu_executor(&demo_plan(&spread(1)), None), requests.clone(), Options::default());
    for file in [file, whole] {
        assert_eq!(run(&mut ensemble(&file, None), requests.clone(), Options::default()), expected);
    }
}

#[test]
fn numbers_of_ranks_that_cannot_be_are_told() {
    let demo = || {
        let recipe = Recipe::read(&project("plans/synthetic.ron")).expect("the recipe is readable");
        Source::Recipe(Box::new(recipe), None)
    };
    let dense = Source::Recipe(Box::new(Recipe::for_directory(&project("tests/goldens/dense"))), None);
    let text = "graph @g (%x: f32[4]) {\n%y = exp %x : f32[4]\nreturn %y\n}";
    let graph = Source::Graph("g".into(), Box::new(lfm2c::ir::parse(text).expect("a graph").graph));
    let cases = [
        (demo(), spread(0), "--ranks expert=0: expected 1 to 8 ranks, as many as the model has experts, found 0"),
        (demo(), spread(9), "--ranks expert=9: expected 1 to 8 ranks"),
        (dense, spread(2), "--ranks expert=2: expected a model with experts, found none"),
        (graph, spread(2), "--ranks expert=2: expected a model, found a graph in text form"),
    ];
    for (source, options, expected) in cases {
        let error = compile(&source, &options, &Silent).err().expect(expected).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
