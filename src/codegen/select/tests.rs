//! What tactics choose, and what they leave apart.

use super::*;
use crate::codegen::compile::Silent;
use crate::codegen::kernels::{Candidate, candidates};
use crate::codegen::{CompileOptions, Recipe, Source, compile};
use crate::ir::DType;
use crate::passes::Target;

fn program(tactics: Tactics) -> Program {
    program_of(DType::BF16, vec![1, 8], tactics)
}

fn program_of(dtype: DType, decode: Vec<u64>, tactics: Tactics) -> Program {
    let recipe = Recipe::parse(include_str!("../../../plans/synthetic.ron")).expect("the recipe is valid");
    let options = CompileOptions {
        target: Target::Sm90a,
        dtype: Some(dtype),
        prefill: Some(vec![64]),
        decode: Some(decode),
        max_sequences: Some(32),
        without_cubins: true,
        tactics,
        ..CompileOptions::default()
    };
    let compiled = compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles");
    compiled.file.manifest.ranks.into_iter().next().expect("a plan has a rank")
}

fn chosen_by(tactics: &Tactics, problem: &Problem) -> String {
    let found = Selector::new(tactics, F32::Exact, Pack::default()).choose(problem.semantic, problem.phase);
    found.expect("there is a candidate").name()
}

#[test]
fn what_lies_above_is_all_that_counts_of_its_problems() {
    fn map(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
        entries.iter().map(|(key, name)| (key.to_string(), name.to_string())).collect()
    }
    let tactics = |chosen, packed| Tactics { chosen: map(chosen), packed: map(packed), ..Tactics::default() };
    let mut known = tactics(&[("a", "1"), ("b", "1"), ("c", "1")], &[("a", "2"), ("b", "2")]);
    known.overlay(tactics(&[("b", "3"), ("c", "3")], &[("c", "4")]));
    assert_eq!(known, tactics(&[("a", "1"), ("b", "3"), ("c", "3")], &[("a", "2"), ("c", "4")]));
}

#[test]
fn a_packed_choice_goes_first_where_packed_weights_may_be_read() {
    let program = program(Tactics::default());
    let mut found = 0;
    for (_, problem) in step_problems(&program) {
        let list = admitted(&problem, Pack::Asked);
        let (packed, plain): (Vec<_>, Vec<_>) = list.iter().partition(|candidate| candidate.reads_packed());
        let (Some(packed), Some(plain)) = (packed.last(), plain.last()) else { continue };
        let key = problem_key(&problem);
        for wanted in [plain.name(), APART.to_owned()] {
            let tactics = Tactics {
                chosen: BTreeMap::from([(key.clone(), wanted)]),
                packed: BTreeMap::from([(key.clone(), packed.name())]),
                measured: BTreeMap::from([(key.clone(), vec![plain.name()])]),
                ..Tactics::default()
            };
            let by = |pack| {
                let selector = Selector::new(&tactics, F32::Exact, pack);
                selector.choose(problem.semantic, problem.phase).expect("there is a candidate").name()
            };
            assert_eq!((by(Pack::Asked), by(Pack::Never)), (packed.name(), plain.name()));
        }
        found += 1;
    }
    assert!(found > 2, "{found} problems have packed candidates");
}

#[test]
fn a_library_is_chosen_by_tactics_alone_and_only_where_it_is_allowed() {
    let program = program(Tactics::default());
    let mut found = 0;
    for (_, problem) in step_problems(&program) {
        let (kernels, all) = (admitted(&problem, Libraries::Never), admitted(&problem, Libraries::Asked));
        let names = |list: &[Way]| list.iter().map(Way::name).collect::<Vec<_>>();
        if library_call(&problem).is_none() {
            assert_eq!(names(&kernels), names(&all));
            continue;
        }
        assert_ne!(problem.phase, Phase::Decode);
        assert_eq!([names(&kernels), vec!["cublaslt".to_owned()]].concat(), names(&all), "behind all kernels");
        let key = problem_key(&problem);
        let library = BTreeMap::from([(key.clone(), "cublaslt".to_owned())]);
        let kernel = kernels.last().expect("there are kernels").name();
        let chosen = BTreeMap::from([(key.clone(), kernel.clone())]);
        let (default, first) = (Tactics::default(), kernels[0].name());
        let known = Tactics { chosen, library, ..Tactics::default() };
        let by = |tactics, libraries| {
            let selector = Selector::new(tactics, F32::Exact, libraries);
            selector.choose(problem.semantic, problem.phase).expect("there is a candidate").name()
        };
        for libraries in [Libraries::Asked, Libraries::All] {
            assert_eq!((by(&default, libraries), by(&known, libraries)), (first.clone(), "cublaslt".to_owned()));
        }
        assert_eq!((by(&default, Libraries::Never), by(&known, Libraries::Never)), (first, kernel));
        found += 1;
    }
    assert!(found > 2, "{found} problems have a library");
}

#[test]
fn what_tactics_want_apart_is_not_fused() {
    let default = program(Tactics::default());
    let fused = |program: &Program| {
        let of_decode = step_problems(program).filter(|(_, problem)| problem.phase == Phase::Decode);
        let fused = of_decode.filter(|(_, problem)| may_be_apart(problem.semantic));
        fused.map(|(_, problem)| problem_key(&problem)).collect::<BTreeSet<_>>()
    };
    let keys = fused(&default);
    let (key, others) = (keys.first().expect("there are some"), keys.len() - 1);
    let chosen = BTreeMap::from([(key.clone(), APART.to_owned())]);
    let other = program(Tactics { chosen, ..Tactics::default() });
    assert!(fused(&other).len() >= others && !fused(&other).contains(key), "{key}");
    let steps = |program: &Program| program.buckets.iter().map(|bucket| bucket.steps.len()).sum::<usize>();
    assert!(steps(&other) > steps(&default));
}

#[test]
fn a_convolution_is_in_one_of_the_products_beside_it() {
    // The steps of the first layer's convolution in decode buckets.
    let steps = |dtype, rows, apart: &[String]| -> Vec<(String, String)> {
        let chosen = apart.iter().map(|key| (key.clone(), APART.to_owned())).collect();
        let program = program_of(dtype, vec![rows], Tactics { chosen, ..Tactics::default() });
        let bucket = program.buckets.iter().position(|bucket| bucket.phase == Phase::Decode).expect("one of decode");
        let keys = step_problems(&program).filter(|(at, _)| *at == bucket).map(|(_, problem)| problem_key(&problem));
        let names = program.buckets[bucket].steps.iter().map(|step| step.name.clone());
        let of_layer = |name: &str| name.strip_prefix("layers.0.conv.").map(str::to_owned);
        names.zip(keys).filter_map(|(name, key)| Some((of_layer(&name)?, key))).collect()
    };
    let names = |steps: &[(String, String)]| steps.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let behind = steps(DType::BF16, 8, &[]);
    assert_eq!(names(&behind), ["norm+matmul+shortconv", "matmul+residual"]);
    let mut apart = vec![behind[0].1.clone()];
    let before = steps(DType::BF16, 8, &apart);
    assert_eq!(names(&before), ["norm+matmul", "shortconv+matmul+residual"]);
    apart.push(before[0].1.clone());
    let bare = steps(DType::BF16, 8, &apart);
    assert_eq!(names(&bare), ["rms_norm", "matmul+shortconv", "matmul+residual"]);
    // Too many rows for the kernel that convolves behind a product.
    for (dtype, most) in [(DType::BF16, 16), (DType::F32, 4)] {
        assert_eq!(names(&steps(dtype, most, &[])), names(&behind), "{dtype:?}");
        assert_eq!(names(&steps(dtype, most + 1, &[])), names(&before), "{dtype:?}");
    }
}

/// Steps and semantics alike: the measurements of all candidates rely on it.
#[test]
fn what_is_fused_does_not_depend_on_candidates() {
    let keys = |program: &Program| -> Vec<(usize, String)> {
        step_problems(program).map(|(bucket, problem)| (bucket, problem_key(&problem))).collect()
    };
    let default = program(Tactics::default());
    for nth in [1, 2, 7] {
        let other = program(Tactics { nth: Some(nth), ..Tactics::default() });
        assert_eq!(keys(&default), keys(&other), "candidates {nth}");
    }
}

#[test]
fn problems_are_the_same_with_another_room_for_state() {
    let keys = |slots, kv_tokens| {
        let recipe = Recipe::parse(include_str!("../../../plans/synthetic.ron")).expect("the recipe is valid");
        let options = CompileOptions {
            target: Target::Sm90a,
            prefill: Some(vec![]),
            decode: Some(vec![4]),
            max_sequences: Some(slots),
            kv_tokens: Some(kv_tokens),
            without_cubins: true,
            ..CompileOptions::default()
        };
        let compiled = compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles");
        let program = compiled.file.manifest.ranks.into_iter().next().expect("a plan has a rank");
        step_problems(&program).map(|(_, problem)| problem_key(&problem)).collect::<Vec<_>>()
    };
    assert_eq!(keys(4, 4096), keys(9, 8192));
}

#[test]
fn candidates_of_a_problem_have_names_of_their_own() {
    for (_, problem) in step_problems(&program(Tactics::default())) {
        let names: Vec<String> = candidates(&problem).iter().map(Candidate::name).collect();
        let different: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
    }
}

#[test]
fn numbers_of_f32_are_taken_apart_where_that_is_asked_for() {
    let program = program_of(DType::F32, vec![1, 16], Tactics::default());
    let (mut products, tactics) = (0, Tactics::default());
    for (_, problem) in step_problems(&program) {
        let list = admitted(&problem, Pack::default());
        let choose = |tactics: &Tactics, f32| {
            let found = Selector::new(tactics, f32, Pack::default()).choose(problem.semantic, problem.phase);
            found.expect("there is a candidate")
        };
        assert!(choose(&tactics, F32::Exact).exact());
        let split = choose(&tactics, F32::Split);
        let can = list.iter().any(|found| !found.exact());
        assert_eq!(split.exact(), !can);
        products += usize::from(can);
        let named = Tactics { chosen: BTreeMap::from([(problem_key(&problem), list[0].name())]), ..Tactics::default() };
        assert_eq!(choose(&named, F32::Split).name(), list[0].name(), "a name goes before");
    }
    assert!(products > 0);
}

#[test]
fn f16_goes_by_what_is_known_of_bf16() {
    let keys = |dtype| -> Vec<String> {
        let program = program_of(dtype, vec![8], Tactics::default());
        step_problems(&program).map(|(_, problem)| key_in_bf16(&problem)).collect()
    };
    let program = program_of(DType::F16, vec![8], Tactics::default());
    assert_eq!(keys(DType::F16), keys(DType::BF16));
    let mut by_another = 0;
    for (_, problem) in step_problems(&program) {
        let list = admitted(&problem, Pack::default());
        let [first, last] = [0, list.len() - 1].map(|at| list[at].name());
        let choose = |chosen| chosen_by(&Tactics { chosen, ..Tactics::default() }, &problem);
        let mut chosen = BTreeMap::from([(key_in_bf16(&problem), last.clone())]);
        assert_eq!(choose(chosen.clone()), last);
        // A problem without numbers of 16 bits has one key.
        if chosen.insert(problem_key(&problem), first.clone()).is_none() {
            by_another += 1;
            assert_eq!(choose(chosen), first);
        }
    }
    assert!(by_another > 10);
}

#[test]
fn there_is_a_choice_whatever_tactics_say() {
    let program = program(Tactics::default());
    for (_, problem) in step_problems(&program) {
        let list = admitted(&problem, Pack::default());
        let last = list.last().expect("a step has a candidate").name();
        let name = |chosen: &str, nth| {
            chosen_by(
                &Tactics { chosen: [(problem_key(&problem), chosen.to_owned())].into(), nth, ..Tactics::default() },
                &problem,
            )
        };
        assert_eq!(name(&last, None), last);
        assert_eq!(name(&last, Some(0)), last, "a name goes before a position");
        assert_eq!(name("none such", None), list[0].name());
        assert_eq!(name("none such", Some(1)), list[1 % list.len()].name());
    }
}

/// What was measured of a product over all experts is chosen for a rank's share of them, with as many rows.
#[test]
fn a_rank_chooses_as_one_with_all_experts_does() {
    let compiled = |expert_ranks: u64, rows: u64, tactics: Tactics| {
        let recipe = Recipe::parse(include_str!("../../../plans/synthetic.ron")).expect("the recipe is valid");
        let options = CompileOptions {
            target: Target::Sm90a,
            prefill: Some(vec![]),
            decode: Some(vec![rows]),
            without_cubins: true,
            expert_ranks,
            tactics,
            ..CompileOptions::default()
        };
        compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles").file.manifest
    };
    let one = compiled(1, 6, Tactics::default());
    let is_product = |problem: &Problem| problem.semantic.name == "expert+swiglu";
    let (_, product) = step_problems(&one.ranks[0]).find(|(_, problem)| is_product(problem)).expect("there is one");
    let name = admitted(&product, Pack::Never)[1].name();
    let chosen = BTreeMap::from([(problem_key(&product), name.clone())]);
    let three = compiled(3, 2, Tactics { chosen, ..Tactics::default() });
    for program in &three.ranks {
        let mut products = 0;
        for step in &program.buckets[0].steps {
            if step.name.ends_with("expert+swiglu") {
                let kernel = &three.kernels[step.launch.as_ref().expect("it has one").kernel as usize];
                assert_eq!(format!("{} {}", kernel.name, kernel.config), name);
                products += 1;
            }
        }
        assert!(products > 0);
    }
}
