//! What runs which step: the registry's default, or what tactics say.

mod allowed;
mod ways;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use crate::codegen::kernels::Problem;
use crate::codegen::semantic;
use crate::ir::{Extents, Graph, Op};
use crate::plan::{self, Collective, DType, Instr, Phase, Program, Semantic, Slot};

pub use self::allowed::{Allowed, Libraries, Pack};
pub use self::ways::{Way, admitted, library_call};

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
    /// The library that goes before both where steps may be calls of it.
    pub library: BTreeMap<String, String>,
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
            self.library.remove(key);
            self.measured.remove(key);
        }
        self.chosen.extend(others.chosen);
        self.packed.extend(others.packed);
        self.library.extend(others.library);
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

/// How many of a plan's problems tactics know.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Known {
    /// Different problems of the steps of all ranks.
    pub problems: usize,
    /// Those for which tactics name a candidate that there is.
    pub chosen: usize,
}

/// A name for a problem that stays the same from run to run, however many sequences and pages the plan's state has room for, and whichever
/// experts a rank has.
pub fn problem_key(problem: &Problem) -> String {
    key_of(problem, &without_arguments(problem.semantic))
}

/// A semantic whose products by expert are over so many experts, where they were over those of a rank; none if it has no such product.
fn with_experts(mut semantic: Semantic, ranks: &[Vec<u64>], count: u64) -> Option<Semantic> {
    let mut found = false;
    for Instr(op, args, _) in &semantic.body {
        // Weights by their position among the arguments, and offsets of each expert's rows.
        let (weight, offsets) = match op {
            plan::Op::ExpertMatmul => (1, None),
            plan::Op::GroupedMatmul => (1, Some(2)),
            plan::Op::GroupedMatmulGather { .. } => (1, Some(3)),
            _ => continue,
        };
        for (at, more) in std::iter::once((weight, 0)).chain(offsets.map(|at| (at, 1))) {
            let Some(Slot::In(i)) = args.get(at) else { continue };
            if let Some(size) = semantic.inputs.get_mut(*i as usize).and_then(|ty| ty.1.first_mut())
                && ranks.iter().any(|local| local.len() as u64 + more == *size)
            {
                *size = count + more;
                found = true;
            }
        }
    }
    found.then_some(semantic)
}

/// The name of the same problem with bf16 in place of f16. Kernels of both are the same but for the instructions that convert and
/// multiply, which take as long.
fn key_in_bf16(problem: &Problem) -> String {
    key_of(problem, &in_bf16(without_arguments(problem.semantic)))
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

/// A semantic without what kernels take as arguments: states have no room, because what a step does to the rows at hand does not depend on
/// it, and a rank has as many experts, of which as many are others', too, but not certain ones.
fn without_arguments(semantic: &Semantic) -> Semantic {
    let mut bare = semantic.clone();
    for Instr(op, ..) in &mut bare.body {
        if let plan::Op::LocalExperts { experts, parts, .. } = op {
            *experts = (0..experts.len() as u64).collect();
            let shared = parts.iter().filter(|&&turns| turns != (0, plan::TURNS)).count();
            // A kernel takes them in pairs, of which it has room for a power of two.
            let pairs = if shared == 0 { 0 } else { shared.div_ceil(2).next_power_of_two() };
            *parts = vec![(0, 1); pairs];
        }
    }
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

/// The problem of each step of a program, in order, beside the position of its bucket. What ranks do together is one without candidates.
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

/// Chooses, and remembers what it chose.
pub struct Selector<'a> {
    tactics: &'a Tactics,
    f32: F32,
    allowed: Allowed,
    /// Weights that get no packed form.
    unpacked: BTreeSet<String>,
    /// The experts of each rank, if they are spread over several.
    experts: Vec<Vec<u64>>,
    known: Mutex<HashMap<String, Option<Arc<Way>>>>,
}

impl<'a> Selector<'a> {
    /// A selector that goes by these tactics.
    pub fn new(tactics: &'a Tactics, f32: F32, allowed: impl Into<Allowed>) -> Self {
        let allowed = allowed.into();
        Selector { tactics, f32, allowed, unpacked: BTreeSet::new(), experts: vec![], known: Mutex::default() }
    }

    /// For ranks that have these experts each: what tactics say of a product over all of them goes for a rank's share, too.
    #[must_use]
    pub fn with_experts(mut self, experts: &[Vec<u64>]) -> Self {
        self.experts = experts.to_vec();
        self
    }

    /// That leaves weights of these names as they are.
    #[must_use]
    pub fn leaving(mut self, unpacked: &BTreeSet<String>) -> Self {
        self.unpacked = unpacked.clone();
        self
    }

    /// Which weights get a packed form.
    pub fn pack(&self) -> Pack {
        self.allowed.pack
    }

    /// Whether steps may be calls of libraries.
    pub fn libraries(&self) -> Libraries {
        self.allowed.libraries
    }

    /// Whether a weight can have one.
    pub fn packs(&self, weight: &plan::Weight) -> bool {
        weight.packed_bytes().is_some() && !self.unpacked.contains(&weight.name)
    }

    /// The way to run a step, if any kernel can.
    pub fn choose(&self, semantic: &Semantic, phase: Phase) -> Option<Arc<Way>> {
        self.choose_by(semantic, phase, self.allowed)
    }

    /// The way to run a step whose operands have no packed form.
    pub fn choose_unpacked(&self, semantic: &Semantic, phase: Phase) -> Option<Arc<Way>> {
        self.choose_by(semantic, phase, Allowed { pack: Pack::Never, ..self.allowed })
    }

    fn choose_by(&self, semantic: &Semantic, phase: Phase, allowed: Allowed) -> Option<Arc<Way>> {
        let key = format!("{allowed:?} {phase:?} {semantic:?}");
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(&key) {
            return found.clone();
        }
        let problem = Problem { semantic, phase };
        let mut list = admitted(&problem, allowed);
        // Whatever candidate tactics name, there is a choice if there is one: what is fused must not depend on that.
        let nth = || self.tactics.nth.and_then(|nth| nth.checked_rem(list.len()));
        let split = || match self.f32 {
            F32::Exact => None,
            F32::Split => list.iter().position(|found| !found.exact()),
        };
        let at = self.chosen(&problem, &list).or_else(nth).or_else(split).unwrap_or(0);
        let chosen = (at < list.len()).then(|| Arc::new(list.swap_remove(at)));
        known().insert(key, chosen.clone());
        chosen
    }

    /// Position of the candidate that tactics name, if there is such a one.
    fn chosen(&self, problem: &Problem, list: &[Way]) -> Option<usize> {
        let (key, wanted) = self.wanted(problem)?;
        let measured = self.tactics.measured.get(&key).into_iter().flatten();
        let first = [&self.tactics.library, &self.tactics.packed].map(|names| names.get(&key));
        let mut names = first.into_iter().flatten().chain([wanted]).chain(measured);
        names.find_map(|name| list.iter().position(|found| found.name() == *name))
    }

    /// What tactics say of a problem, and under which name.
    fn wanted(&self, problem: &Problem) -> Option<(String, &String)> {
        let chosen = &self.tactics.chosen;
        if chosen.is_empty() {
            return None;
        }
        // A rank has about as many rows of each of its experts as another, or as one that has all of them, out of as many rows.
        let all = self.experts.iter().flatten().max().map_or(0, |last| last + 1);
        let counts: BTreeSet<u64> = self.experts.iter().map(|local| local.len() as u64).collect();
        let counts = counts.into_iter().chain([all]);
        let others: Vec<Semantic> =
            counts.filter_map(|count| with_experts(problem.semantic.clone(), &self.experts, count)).collect();
        let others = others.iter().map(|semantic| Problem { semantic, phase: problem.phase });
        let keys =
            std::iter::once(*problem).chain(others).flat_map(|problem| [problem_key(&problem), key_in_bf16(&problem)]);
        keys.filter_map(|key| chosen.get(&key).map(|wanted| (key, wanted))).next()
    }

    /// Counts the problems of all ranks' programs, and those that tactics know.
    pub fn known(&self, programs: &[Program]) -> Known {
        let mut problems: BTreeMap<String, bool> = BTreeMap::new();
        let steps = programs.iter().flat_map(step_problems);
        for (_, problem) in steps.filter(|(_, problem)| Collective::of(problem.semantic).is_none()) {
            problems
                .entry(problem_key(&problem))
                .or_insert_with(|| self.chosen(&problem, &admitted(&problem, self.allowed)).is_some());
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
            name.is_some_and(|name| admitted(&problem, self.allowed).iter().any(|found| found.name() == *name))
        };
        let apart = self.wanted(&problem).is_some_and(|(key, wanted)| wanted == APART && !packed(&key));
        optional.insert(problem_key(&problem));
        !apart
    }

    /// Takes apart each fused operator that no kernel can run. What ranks compute together needs none.
    ///
    /// # Errors
    /// A primitive that no kernel can run.
    pub fn dissolve(&self, graph: &mut Graph, phase: Phase, extents: &Extents) -> Result<(), String> {
        let roots = graph.state_roots();
        let runs = |op: &Op| -> Result<bool, String> {
            let semantic = semantic::lower(graph, op, &roots, extents)?.semantic;
            Ok(Collective::of(&semantic).is_some() || self.choose(&semantic, phase).is_some())
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
mod tests;
