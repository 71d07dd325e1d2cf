//! Plans in which several ranks have the same expert: they share its rows, and the tokens are those of one rank.

use lfm2c::codegen::CompileOptions;
use lfm2c::plan::{Buffer, ExpertCounts, Manifest, Op, PlanFile, Ref, Slot, scope, turn};
use lfm2c::runtime::Options;

use crate::common::*;
use crate::expert_ranks::{semantic, spread};
use crate::several::*;

/// The plan of so many ranks with up to so many replicas each, of a model of 8 experts, by counts that differ much from expert to expert and from layer to layer.
pub fn with_replicas(
    one: &PlanFile,
    ranks: u64,
    replicas: u64,
    plan: &dyn Fn(&CompileOptions) -> PlanFile,
) -> PlanFile {
    let mut counts = ExpertCounts::new(&one.manifest.model.config_hash);
    let program = &one.manifest.ranks[0];
    for (i, step) in program.buckets[0].steps.iter().enumerate() {
        let semantic = &program.semantics[step.op as usize];
        if semantic.body.iter().any(|instr| instr.0 == Op::TopK) {
            let count = |expert: u64| 10 + 7 * (expert * (i as u64 + 3) % 8) + 90 * u64::from(expert == 3);
            counts.layers.insert(scope(&step.name).to_owned(), (0..8).map(count).collect());
        }
    }
    let (_file, options) = counted(&counts, ranks, replicas);
    plan(&options)
}

/// Options by which experts are spread by these counts, with the file that has them.
fn counted(counts: &ExpertCounts, ranks: u64, replicas: u64) -> (tempfile::NamedTempFile, CompileOptions) {
    let file = tempfile::NamedTempFile::new().expect("a file can be made");
    std::fs::write(file.path(), serde_json::to_string(counts).expect("JSON")).expect("it is written");
    let expert_counts = Some(file.path().to_owned());
    (file, CompileOptions { expert_counts, expert_replicas: replicas, ..spread(ranks) })
}

/// Of an expert that several ranks have, each runs some of the rows: all are run once, and a row's company makes no difference.
#[test]
fn replicas_share_the_rows_of_their_expert() {
    let one = demo_plan(&spread(1));
    let requests = requests(13, one.manifest.model.vocab);
    let options = Options { chunk: Some(23), ..Options::default() };
    let expected = run(&mut cpu_executor(&one, None), requests.clone(), options);
    let logits = run(&mut cpu_executor(&one, None), requests.clone(), all_logits(Some(7)));
    for (ranks, replicas) in [(2, 1), (3, 2), (4, 6)] {
        let file = with_replicas(&one, ranks, replicas, &demo_plan);
        let most = file.manifest.experts.iter().map(Vec::len).max().expect("there are ranks") as u64;
        assert!((8 / ranks + 1..=8u64.div_ceil(ranks) + replicas).contains(&most), "{:?}", file.manifest.experts);
        assert!(file.manifest.experts.iter().filter(|local| local.contains(&3)).count() > 1, "the hottest one");
        assert_eq!(run(&mut ensemble(&file, None), requests.clone(), options), expected, "{ranks} ranks");
        let together = run(&mut ensemble(&file, None), requests.clone(), all_logits(Some(7)));
        for (i, (found, expected)) in together.iter().zip(&logits).enumerate() {
            let error = relative_l2(&found.prompt_logits, &expected.prompt_logits);
            assert!(error < 1e-5, "{ranks} ranks, request {i}: relative L2 distance {error:e}");
            let alone = run(&mut ensemble(&file, None), vec![requests[i].clone()], all_logits(None)).remove(0);
            assert!(alone.prompt_logits == found.prompt_logits, "{ranks} ranks, request {i}: other bits alone");
        }
    }
}

/// Of the rows that were counted, each rank runs about as many as the others, because turns come up about as often as each other.
#[test]
fn turns_make_ranks_even() {
    let disabled = ["plan-memory", "group-experts"].map(str::to_owned).to_vec();
    let one = demo_plan(&CompileOptions { disabled, ..spread(1) });
    let mut executor = cpu_executor(&one, None);
    run(&mut executor, vec![request(&tokens(3, 250, one.manifest.model.vocab), 1)], Options::default());
    let program = &one.manifest.ranks[0];
    let bucket = program.buckets.iter().find(|bucket| bucket.name == "prefill_256").expect("it is there");
    let (mut counts, mut layers) = (ExpertCounts::new(&one.manifest.model.config_hash), vec![]);
    for step in &bucket.steps {
        let body = &program.semantics[step.op as usize].body;
        let Some(sum) = body.iter().find(|instr| instr.0 == Op::WeightedSum) else { continue };
        let words = |argument: usize| {
            let Slot::In(input) = sum.1[argument] else { panic!("{}: it is made there", step.name) };
            let Ref::Arena(buffer) = step.reads[input as usize] else { panic!("{}: it is made before", step.name) };
            let Buffer(_, offset, bytes) = bucket.buffers[buffer as usize];
            executor.pool().arena()[offset as usize..][..bytes as usize].as_chunks::<4>().0.to_vec()
        };
        let weights: Vec<f32> = words(1).into_iter().map(f32::from_le_bytes).take(500).collect();
        let chosen: Vec<i32> = words(2).into_iter().map(i32::from_le_bytes).take(500).collect();
        counts.add(scope(&step.name), 8, &chosen);
        layers.push((weights, chosen));
    }
    assert_eq!(layers.len(), 4);
    let busiest = |replicas: u64| {
        let (_file, options) = counted(&counts, 8, replicas);
        let Manifest { ranks, experts, .. } = demo_plan(&options).manifest;
        let mut sum = 0;
        for (layer, (weights, chosen)) in layers.iter().enumerate() {
            let rows = ranks.iter().zip(&experts).map(|(program, local)| {
                let steps = program.buckets[0].steps.iter().flat_map(|step| &program.semantics[step.op as usize].body);
                let mut parts = steps.filter_map(|instr| match &instr.0 {
                    Op::LocalExperts { parts, .. } => Some(parts),
                    _ => None,
                });
                let parts = parts.nth(layer).expect("each layer looks up experts");
                let runs = |(pair, &expert): (usize, &i32)| {
                    let turn = turn(&weights[pair / 2 * 2..][..2]);
                    let at = local.iter().position(|&own| own == expert as u64);
                    at.is_some_and(|at| parts.get(at).is_none_or(|&(from, to)| (from..to).contains(&turn)))
                };
                chosen.iter().enumerate().filter(|&choice| runs(choice)).count()
            });
            let rows: Vec<usize> = rows.collect();
            assert_eq!(rows.iter().sum::<usize>(), 500, "layer {layer}: each choice is run once: {rows:?}");
            sum += rows.into_iter().max().unwrap_or(0);
        }
        sum as f64 / (4.0 * 62.5)
    };
    let (placed, replicated) = (busiest(0), busiest(2));
    println!("busiest rank: {placed} of the mean as placed, {replicated} with replicas");
    assert!(replicated < 1.25 && replicated < placed - 0.1, "{replicated} of the mean, without replicas {placed}");
}

/// Ranks that have the same expert run each row once together.
#[test]
fn the_validator_compares_turns() {
    fn parts(manifest: &mut Manifest, rank: usize) -> &mut Vec<(u64, u64)> {
        let op = &mut semantic(manifest, rank, |op| matches!(op, Op::LocalExperts { .. })).body[0].0;
        let Op::LocalExperts { parts, .. } = op else { panic!("it is one") };
        parts
    }
    let file = with_replicas(&demo_plan(&spread(1)), 2, 1, &demo_plan);
    let shared = file.manifest.experts[0].iter().position(|expert| file.manifest.experts[1].contains(expert));
    let at = shared.expect("an expert is on both ranks");
    let (expert, part) = (file.manifest.experts[0][at], parts(&mut file.manifest.clone(), 0)[at]);
    assert!(part.0 == 0 && (1..1024).contains(&part.1), "{part:?}");
    let end = part.1;
    let each_once = |found: &str| format!("expert {expert}: expected each of 1024 turns on one rank, found [{found}]");
    type Change<'a> = Box<dyn Fn(&mut Manifest) + 'a>;
    let cases: [(String, Change); 6] = [
        // Twice, not at all, at all turns by each of both, an expert that no other rank has, and what is no part.
        (each_once(&format!("(0, {}), ({end}, 1024)", end + 1)), Box::new(|m| parts(m, 0)[at].1 += 1)),
        (each_once(&format!("(0, {}), ({end}, 1024)", end - 1)), Box::new(|m| parts(m, 0)[at].1 -= 1)),
        (each_once(&format!("(0, {end}), (0, 1024)")), Box::new(|m| parts(m, 1).fill((0, 1024)))),
        ("turns on one rank, found [(0, 1023)]".into(), Box::new(|m| parts(m, 0)[usize::from(at == 0)].1 -= 1)),
        ("expected 4 parts of 1024 turns, or none, found 1".into(), Box::new(|m| parts(m, 0).truncate(1))),
        ("parts of 1024 turns, or none, found 4, of them Some((9, 8))".into(), Box::new(|m| parts(m, 0)[at] = (9, 8))),
    ];
    assert!(file.validate().is_ok());
    for (expected, change) in cases {
        let mut file = file.clone();
        change(&mut file.manifest);
        let text = format!("{:#}", file.validate().expect_err(&expected));
        assert!(text.contains(&expected), "expected `{expected}`: {text}");
    }
}
