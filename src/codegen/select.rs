//! Which kernel runs which step: the registry's default, or what tactics say.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use crate::codegen::kernels::{Candidate, Problem, candidates};
use crate::codegen::semantic;
use crate::ir::{Extents, Graph, Op};
use crate::plan::{self, Arg, DType, Instr, Phase, Program, Semantic, Slot};

/// What tactics say of a problem that is better left as the steps that it was made of.
pub const APART: &str = "apart";

/// Choices among candidates, beside which the registry's first is taken.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Tactics {
    /// For a problem (see [`problem_key`]) the candidate's name, or [`APART`]. Names of problems and candidates that there are not
    /// are ignored; see [`Tactics::measured`]. A problem in f16 without an entry goes by that of the same problem in bf16.
    pub chosen: BTreeMap<String, String>,
    /// The candidate that goes before that where kernels may read packed weights, and there is such a one.
    pub packed: BTreeMap<String, String>,
    /// What was measured of a problem's candidates, fastest first: where there is no such candidate as is chosen, the first that there is
    /// is taken.
    pub measured: BTreeMap<String, Vec<String>>,
    /// Takes the candidate of this position, modulo their number, of each problem that none is chosen for: to run all of them.
    pub nth: Option<usize>,
}

impl Tactics {
    /// Of the problems that others speak of, what they say.
    pub fn overlay(&mut self, others: Tactics) {
        for key in others.chosen.keys() {
            self.packed.remove(key);
            self.measured.remove(key);
        }
        self.chosen.extend(others.chosen);
        self.packed.extend(others.packed);
        self.measured.extend(others.measured);
    }
}

/// How products of f32 are computed where tactics name no candidate.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum F32 {
    /// As such.
    #[default]
    Exact,
    /// On tensor cores, as sums of terms, where a kernel can: the first candidate of a twin that is not exact.
    Split,
}

/// Which weights get a packed form (see [`crate::plan::packed`]), and whether kernels may read it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Pack {
    /// None: kernels that read one are no candidates.
    #[default]
    Never,
    /// Those of which a step's kernel reads it.
    Asked,
    /// All that can have one, so that plans with other kernels have the same pool: for measurements.
    All,
}

/// How many of a program's problems tactics know.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Known {
    /// Different problems of the program's steps.
    pub problems: usize,
    /// Those for which tactics name a candidate that there is.
    pub chosen: usize,
}

/// A name for a problem that stays the same from run to run, however many sequences and pages the plan's state has room for.
pub fn problem_key(problem: &Problem) -> String {
    key_of(problem, &without_capacity(problem.semantic))
}

/// The name of the same problem with bf16 in place of f16. Kernels of both are the same but for the instructions that convert and
/// multiply, which take as long.
fn key_in_bf16(problem: &Problem) -> String {
    key_of(problem, &in_bf16(without_capacity(problem.semantic)))
}

fn key_of(problem: &Problem, bare: &Semantic) -> String {
    let text = format!("{:?} {bare:?}", problem.phase);
    format!("{} {}", problem.semantic.name, &blake3::hash(text.as_bytes()).to_hex()[..16])
}

/// A semantic with bf16 wherever it has f16.
fn in_bf16(mut semantic: Semantic) -> Semantic {
    let change = |dtype: &mut DType| {
        if *dtype == DType::F16 {
            *dtype = DType::BF16;
        }
    };
    let Semantic { inputs, outputs, temps, body, .. } = &mut semantic;
    [inputs, outputs, temps].into_iter().flatten().for_each(|ty| change(&mut ty.0));
    for Instr(op, ..) in body {
        if let plan::Op::Pointwise(registers) = op {
            for register in registers {
                if let plan::Expr::Round(_, dtype) = register {
                    change(dtype);
                }
            }
        }
    }
    semantic
}

/// A semantic whose states have no room: what a step does to the rows at hand does not depend on it.
fn without_capacity(semantic: &Semantic) -> Semantic {
    let mut bare = semantic.clone();
    for Instr(op, args, _) in &semantic.body {
        // States by their position among the arguments, with the sizes that are room alone.
        let states: &[(usize, usize)] = match op {
            plan::Op::Conv1dCausal => &[(2, 1)],
            plan::Op::KvWrite => &[(2, 1), (3, 2)],
            plan::Op::Attention { .. } => &[(1, 1), (2, 2)],
            plan::Op::Sample => &[(4, 1)],
            _ => &[],
        };
        for &(at, sizes) in states {
            if let Some(Slot::In(i)) = args.get(at)
                && let Some(ty) = bare.inputs.get_mut(*i as usize)
            {
                ty.1.iter_mut().take(sizes).for_each(|size| *size = 0);
            }
        }
    }
    bare
}

/// The problem of each step of a program, in order, beside the position of its bucket.
pub fn step_problems(program: &Program) -> impl Iterator<Item = (usize, Problem<'_>)> {
    program.buckets.iter().enumerate().flat_map(|(i, bucket)| {
        let semantics = bucket.steps.iter().filter_map(|step| program.semantics.get(step.op as usize));
        semantics.map(move |semantic| (i, Problem { semantic, phase: bucket.phase }))
    })
}

/// Whether a fused operator competes with its parts, so that it pays for few rows alone: rows that are prepared for a product, which
/// each block of the product's kernel repeats, and a router that sorts all rows, which blocks that work together must do; or with
/// another fusion: a convolution that is in the epilogue of one product could be in the prologue of the next.
fn may_be_apart(semantic: &Semantic) -> bool {
    let product = |Instr(op, ..): &Instr| matches!(op, plan::Op::Matmul);
    let convolution = |Instr(op, ..): &Instr| matches!(op, plan::Op::Conv1dCausal);
    match semantic.body.last() {
        Some(Instr(plan::Op::Matmul | plan::Op::GroupRows, ..)) => semantic.body.len() > 1,
        _ => semantic.body.iter().any(product) && semantic.body.iter().any(convolution),
    }
}

/// The candidates for a step that may be chosen, the default first.
pub fn admitted(problem: &Problem, pack: Pack) -> Vec<Candidate> {
    let mut list = candidates(problem);
    if pack == Pack::Never {
        list.retain(|found| !reads_packed(found));
    }
    list
}

/// Whether a candidate reads the packed form of a weight.
pub fn reads_packed(candidate: &Candidate) -> bool {
    candidate.specialised.launch.args.iter().any(|arg| matches!(arg, Arg::Packed(_)))
}

/// Chooses, and remembers what it chose.
pub struct Selector<'a> {
    tactics: &'a Tactics,
    f32: F32,
    pack: Pack,
    known: Mutex<HashMap<String, Option<Arc<Candidate>>>>,
}

impl<'a> Selector<'a> {
    /// A selector that goes by these tactics.
    pub fn new(tactics: &'a Tactics, f32: F32, pack: Pack) -> Self {
        Selector { tactics, f32, pack, known: Mutex::default() }
    }

    /// Which weights get a packed form.
    pub fn pack(&self) -> Pack {
        self.pack
    }

    /// The candidate for a step, if any kernel can run it.
    pub fn choose(&self, semantic: &Semantic, phase: Phase) -> Option<Arc<Candidate>> {
        self.choose_by(semantic, phase, self.pack)
    }

    /// The candidate for a step whose operands have no packed form.
    pub fn choose_unpacked(&self, semantic: &Semantic, phase: Phase) -> Option<Arc<Candidate>> {
        self.choose_by(semantic, phase, Pack::Never)
    }

    fn choose_by(&self, semantic: &Semantic, phase: Phase, pack: Pack) -> Option<Arc<Candidate>> {
        let key = format!("{pack:?} {phase:?} {semantic:?}");
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(&key) {
            return found.clone();
        }
        let problem = Problem { semantic, phase };
        let mut list = admitted(&problem, pack);
        // Whatever candidate tactics name, there is a choice if there is one: what is fused must not depend on that.
        let nth = || self.tactics.nth.and_then(|nth| nth.checked_rem(list.len()));
        let split = || match self.f32 {
            F32::Exact => None,
            F32::Split => list.iter().position(|found| !found.twin.exact()),
        };
        let at = self.chosen(&problem, &list).or_else(nth).or_else(split).unwrap_or(0);
        let chosen = (at < list.len()).then(|| Arc::new(list.swap_remove(at)));
        known().insert(key, chosen.clone());
        chosen
    }

    /// Position of the candidate that tactics name, if there is such a one.
    fn chosen(&self, problem: &Problem, list: &[Candidate]) -> Option<usize> {
        let (key, wanted) = self.wanted(problem)?;
        let measured = self.tactics.measured.get(&key).into_iter().flatten();
        let mut names = self.tactics.packed.get(&key).into_iter().chain([wanted]).chain(measured);
        names.find_map(|name| list.iter().position(|found| found.name() == *name))
    }

    /// What tactics say of a problem, and under which name.
    fn wanted(&self, problem: &Problem) -> Option<(String, &String)> {
        let chosen = &self.tactics.chosen;
        if chosen.is_empty() {
            return None;
        }
        let keys = [problem_key, key_in_bf16].into_iter().map(|key| key(problem));
        keys.filter_map(|key| chosen.get(&key).map(|wanted| (key, wanted))).next()
    }

    /// Counts the problems of a program, and those that tactics know.
    pub fn known(&self, program: &Program) -> Known {
        let mut problems: BTreeMap<String, bool> = BTreeMap::new();
        for (_, problem) in step_problems(program) {
            problems
                .entry(problem_key(&problem))
                .or_insert_with(|| self.chosen(&problem, &admitted(&problem, self.pack)).is_some());
        }
        Known { problems: problems.len(), chosen: problems.values().filter(|&&chosen| chosen).count() }
    }

    /// Whether a fused operator of a graph is one that a kernel can run, and that tactics do not want apart. Those that might be
    /// either are added to `optional`.
    pub fn admits(
        &self,
        graph: &Graph,
        op: &Op,
        phase: Phase,
        extents: &Extents,
        optional: &mut BTreeSet<String>,
    ) -> bool {
        let Ok(lowered) = semantic::lower(graph, op, &graph.state_roots(), extents) else { return false };
        let semantic = lowered.semantic;
        if self.choose(&semantic, phase).is_none() {
            return false;
        }
        if !may_be_apart(&semantic) {
            return true;
        }
        let problem = Problem { semantic: &semantic, phase };
        let packed = |key: &str| {
            let name = self.tactics.packed.get(key);
            name.is_some_and(|name| admitted(&problem, self.pack).iter().any(|found| found.name() == *name))
        };
        let apart = self.wanted(&problem).is_some_and(|(key, wanted)| wanted == APART && !packed(&key));
        optional.insert(problem_key(&problem));
        !apart
    }

    /// Takes apart each fused operator that no kernel can run.
    ///
    /// # Errors
    /// A primitive that no kernel can run.
    pub fn dissolve(&self, graph: &mut Graph, phase: Phase, extents: &Extents) -> Result<(), String> {
        let roots = graph.state_roots();
        let runs = |op: &Op| -> Result<bool, String> {
            Ok(self.choose(&semantic::lower(graph, op, &roots, extents)?.semantic, phase).is_some())
        };
        let mut ops = vec![];
        for op in &graph.ops {
            if runs(op)? {
                ops.push(op.clone());
                continue;
            }
            for inner in op.primitives() {
                if !runs(inner)? {
                    return Err(format!("no kernel for\n{}on this target", graph.print_op(inner, "  ")));
                }
                ops.push(inner.clone());
            }
        }
        graph.ops = ops;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::{CompileOptions, Recipe, Source, compile};
    use crate::ir::DType;
    use crate::passes::Target;

    fn program(tactics: Tactics) -> Program {
        program_of(DType::BF16, vec![1, 8], tactics)
    }

    fn program_of(dtype: DType, decode: Vec<u64>, tactics: Tactics) -> Program {
        let recipe = Recipe::parse(include_str!("../../plans/synthetic.ron")).expect("the recipe is valid");
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
            let (packed, plain): (Vec<_>, Vec<_>) = list.iter().partition(|candidate| reads_packed(candidate));
            let (Some(packed), Some(plain)) = (packed.last(), plain.last()) else { continue };
            let key = problem_key(&problem);
            for wanted in [plain.name(), APART.to_owned()] {
                let tactics = Tactics {
                    chosen: BTreeMap::from([(key.clone(), wanted)]),
                    packed: BTreeMap::from([(key.clone(), packed.name())]),
                    measured: BTreeMap::from([(key.clone(), vec![plain.name()])]),
                    nth: None,
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
            let bucket =
                program.buckets.iter().position(|bucket| bucket.phase == Phase::Decode).expect("one of decode");
            let keys =
                step_problems(&program).filter(|(at, _)| *at == bucket).map(|(_, problem)| problem_key(&problem));
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
            let recipe = Recipe::parse(include_str!("../../plans/synthetic.ron")).expect("the recipe is valid");
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
            assert!(choose(&tactics, F32::Exact).twin.exact());
            let split = choose(&tactics, F32::Split);
            let can = list.iter().any(|found| !found.twin.exact());
            assert_eq!(split.twin.exact(), !can);
            products += usize::from(can);
            let named =
                Tactics { chosen: BTreeMap::from([(problem_key(&problem), list[0].name())]), ..Tactics::default() };
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
}
