//! From a scheduled and placed graph to the buckets and tables of a plan.

mod tables;

use std::collections::HashMap;

use crate::codegen::cost::cost;
use crate::codegen::kernel_table::KernelTable;
use crate::codegen::kernels::is_weight;
use crate::codegen::select::{Selector, Way};
use crate::codegen::{libraries, packed, semantic};
use crate::ir::{self, Extents, Graph, Operand, ValueId};
use crate::passes::plan_memory::Placement;
use crate::passes::schedule::{Schedule, Storage, storage};
use crate::passes::{BucketSpec, Phase};
use crate::plan::{self, ALIGNMENT, Bucket, Buffer, Collective, LibraryCall, Program, Ref, Region, Semantic, Step};

pub use self::tables::TensorTable;
use self::tables::{Tables, end, too_large};

/// One bucket's graph, ready to be lowered.
pub struct Prepared {
    /// What it is for.
    pub spec: BucketSpec,
    /// Its final graph.
    pub graph: Graph,
    /// Order and dependencies.
    pub schedule: Schedule,
    /// Offsets in the arena.
    pub placement: Placement,
    /// Position of its text among the plan's.
    pub text: u32,
}

/// Lowers all buckets of one rank. `checkpoint_dtype` gives a checkpoint tensor's element type by its weight's name; with a
/// selector, steps get launches, of kernels that `kernels` gets, or are calls of libraries, unless ranks run them together. `tensors` gets what weights are made of.
///
/// # Errors
/// Sizes beyond 64 bits, or a step that no kernel can run.
pub fn lower(
    buckets: &[Prepared],
    checkpoint_dtype: &dyn Fn(&ir::Weight) -> ir::DType,
    selector: Option<&Selector>,
    kernels: &mut KernelTable,
    tensors: &mut TensorTable,
) -> Result<Program, String> {
    let mut tables = Tables::new(selector, kernels, tensors);
    let lowered =
        buckets.iter().map(|bucket| tables.bucket(bucket, checkpoint_dtype)).collect::<Result<Vec<_>, _>>()?;
    if selector.is_some() {
        let longest = lowered.iter().map(|bucket| bucket.steps.len()).max().unwrap_or(0);
        let workspace = selector.map_or(0, |selector| libraries::workspace(selector, &tables.semantics, &lowered));
        tables.device_states(longest as u64, workspace);
    }
    let mut weights_end = match tables.weights.last() {
        Some(last) => end(last.offset, &last.ty).ok_or_else(|| too_large(&last.name))?,
        None => 0,
    };
    let packed = match selector {
        Some(selector) => packed::forms(&tables.weights, &lowered, selector, &mut weights_end)?,
        None => vec![],
    };
    let arena = lowered.iter().map(|bucket| bucket.arena_bytes).max().unwrap_or(0);
    let end = |used: Option<u64>| used.unwrap_or(0).next_multiple_of(ALIGNMENT);
    let last = |offset: u64, ty: &plan::TensorType| ty.bytes().map(|bytes| offset + bytes);
    let sizes = [weights_end, end(tables.states.last().and_then(|s| last(s.offset, &s.ty))), end(Some(arena)), 0];
    let mut offset = 0u64;
    for io in &mut tables.io {
        io.offset = offset;
        offset += io.bytes.next_multiple_of(ALIGNMENT);
    }
    let mut start = 0u64;
    let mut region = |bytes: u64| -> Result<Region, String> {
        let region = Region { offset: start, bytes };
        start = start.checked_add(bytes).ok_or("the pool exceeds 64 bits")?;
        Ok(region)
    };
    let pool = plan::Pool {
        weights: region(sizes[0])?,
        state: region(sizes[1])?,
        arena: region(sizes[2])?,
        io: region(offset)?,
    };
    Ok(Program {
        pool,
        weights: tables.weights,
        packed,
        states: tables.states,
        io: tables.io,
        semantics: tables.semantics,
        buckets: lowered,
    })
}

impl Tables<'_> {
    fn bucket(
        &mut self,
        prepared: &Prepared,
        checkpoint_dtype: &dyn Fn(&ir::Weight) -> ir::DType,
    ) -> Result<Bucket, String> {
        let Prepared { spec, graph, schedule, placement, text } = prepared;
        let extents = &spec.extents;
        let roots = graph.state_roots();
        let places = self.places(graph, placement, extents)?;
        let mut steps = Vec::with_capacity(schedule.steps.len());
        let mut names: HashMap<String, u32> = HashMap::new();
        let mut last_call = None;
        for scheduled in &schedule.steps {
            let op = &graph.ops[scheduled.op];
            let lowered = semantic::lower(graph, op, &roots, extents)?;
            let mut reads = vec![];
            for operand in &lowered.inputs {
                reads.push(match operand {
                    Operand::Value(value) => place(&places, graph, *value)?,
                    Operand::Weight(id) => Ref::Weight(self.weight(graph, graph.weight(*id), checkpoint_dtype)?),
                    Operand::Const(_) => return Err("a constant is no step input".into()),
                });
            }
            let writes = lowered.outputs.iter().map(|&value| place(&places, graph, value)).collect::<Result<_, _>>()?;
            let updates = lowered
                .updates
                .iter()
                .map(|&state| match place(&places, graph, state)? {
                    Ref::State(id) => Ok(id),
                    other => Err(format!("%{} is updated but lies at {other:?}", graph.value(state).name)),
                })
                .collect::<Result<_, _>>()?;
            let mut name = step_name(&op.scope, &lowered.semantic.name);
            let uses = names.entry(name.clone()).or_default();
            *uses += 1;
            if *uses > 1 {
                name = format!("{name}.{uses}");
            }
            let collective = Collective::of(&lowered.semantic);
            let phase = plan_phase(spec.phase);
            let run = match collective {
                Some(_) => Ok((None, None)),
                None => self.run(&lowered.semantic, phase, &reads),
            };
            let (mut launch, library) = run.map_err(|fault| format!("{name}: {fault}"))?;
            let in_turn = self
                .selector
                .is_some_and(|selector| library.is_some() || libraries::might_be(selector, &lowered.semantic, phase));
            if let Some(launch) = &mut launch {
                launch.dependent &= weights_are_constant(&lowered.semantic, &reads);
                for arg in &mut launch.args {
                    if let plan::Arg::Claim(counter) = arg {
                        *counter = steps.len() as u32;
                    }
                }
            }
            steps.push(Step {
                name,
                op: self.semantic(lowered.semantic),
                reads,
                writes,
                updates,
                after: scheduled.after.iter().map(|&step| step as u32).collect(),
                cost: cost(graph, op, extents),
                launch,
                collective,
                library,
            });
            if in_turn {
                libraries::follow(&mut steps, &mut last_call);
            }
            read_in_time(&mut steps);
        }
        let mut outputs = vec![];
        for &output in &graph.outputs {
            if !roots.contains_key(&output) {
                outputs.push((graph.value(output).name.clone(), place(&places, graph, output)?));
            }
        }
        Ok(Bucket {
            name: spec.name(),
            phase: plan_phase(spec.phase),
            tokens: extents.tokens,
            sequences: extents.sequences,
            rows: extents.rows,
            arena_bytes: placement.bytes,
            arena_lower_bound: placement.lower_bound,
            buffers: placement
                .buffers
                .iter()
                .map(|buffer| Buffer(graph.value(buffer.value).name.clone(), buffer.offset, buffer.bytes))
                .collect(),
            steps,
            head: schedule.head as u32,
            outputs,
            text: *text,
        })
    }

    /// How a step runs on the device, if it is lowered for one.
    fn run(
        &mut self,
        semantic: &Semantic,
        phase: plan::Phase,
        reads: &[Ref],
    ) -> Result<(Option<plan::Launch>, Option<LibraryCall>), String> {
        let Some(selector) = self.selector else { return Ok((None, None)) };
        let mut chosen = selector.choose(semantic, phase).ok_or(NO_KERNEL)?;
        if let Some(candidate) = chosen.kernel()
            && !packed::fits(&candidate.specialised.launch, reads, &self.weights, selector)
        {
            chosen = selector.choose_unpacked(semantic, phase).ok_or(NO_KERNEL)?;
        }
        Ok(match &*chosen {
            Way::Kernel(candidate) => {
                let id = self.kernels.add(candidate);
                (Some(candidate.launch(id)), None)
            }
            Way::Library(call) => (None, Some(*call)),
        })
    }

    /// Where each value that is no weight lies.
    fn places(
        &mut self,
        graph: &Graph,
        placement: &Placement,
        extents: &Extents,
    ) -> Result<HashMap<ValueId, Ref>, String> {
        let mut places: HashMap<ValueId, Ref> = HashMap::new();
        for (i, buffer) in placement.buffers.iter().enumerate() {
            places.insert(buffer.value, Ref::Arena(i as u32));
        }
        let kinds = storage(graph);
        for &state in &graph.states {
            let id = self.state(graph, state, extents)?;
            places.insert(state, Ref::State(id));
        }
        for value in graph.inputs.iter().chain(&graph.outputs) {
            let input = matches!(kinds.get(value), Some(Storage::Input));
            if input || matches!(kinds.get(value), Some(Storage::Io)) {
                let id = self.io(graph, *value, input, extents)?;
                places.insert(*value, Ref::Io(id));
            }
        }
        Ok(places)
    }
}

/// Why a step cannot be lowered.
const NO_KERNEL: &str = "no kernel can run it";

/// Whether everything that the step's kernel may load before it waits for the steps before is a weight. In a graph in text form
/// it may be a value that one of them makes.
fn weights_are_constant(semantic: &Semantic, reads: &[Ref]) -> bool {
    let mut inputs = reads.iter().zip(0..);
    inputs.all(|(place, i)| matches!(place, Ref::Weight(_)) || !is_weight(semantic, plan::Slot::In(i)))
}

/// The last step reads nothing early that may not be there.
fn read_in_time(steps: &mut [Step]) {
    let launch = |step: &Step| step.launch.as_ref().map(|launch| launch.early.clone());
    let early = steps.last().and_then(launch).unwrap_or_default();
    if !plan::settled(steps, &early)
        && let Some(launch) = steps.last_mut().and_then(|step| step.launch.as_mut())
    {
        launch.early.clear();
    }
}

/// The plan's word for a phase.
pub fn plan_phase(phase: Phase) -> plan::Phase {
    match phase {
        Phase::Prefill => plan::Phase::Prefill,
        Phase::Decode => plan::Phase::Decode,
        Phase::Fixed => plan::Phase::Fixed,
    }
}

fn place(places: &HashMap<ValueId, Ref>, graph: &Graph, value: ValueId) -> Result<Ref, String> {
    places.get(&value).copied().ok_or_else(|| format!("%{} has no place in the pool", graph.value(value).name))
}

fn step_name(scope: &str, label: &str) -> String {
    if scope.is_empty() { label.to_owned() } else { format!("{scope}.{label}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::{CompileOptions, Recipe, Source, compile};

    fn program() -> Program {
        let recipe = Recipe::parse(include_str!("../../plans/synthetic.ron")).expect("the recipe is valid");
        let options = CompileOptions { prefill: Some(vec![8, 32]), decode: Some(vec![1]), ..CompileOptions::default() };
        let compiled = compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles");
        compiled.file.manifest.ranks.into_iter().next().expect("a plan has a rank")
    }

    #[test]
    fn buckets_share_one_pool_of_the_largest() {
        let program = program();
        let largest = program.buckets.iter().map(|bucket| bucket.arena_bytes).max().expect("there are buckets");
        assert_eq!(program.pool.arena.bytes, largest);
        let io: Vec<(&str, u64, bool)> = program.io.iter().map(|io| (&*io.name, io.bytes, io.input)).collect();
        // 32 rows; up to 16 of them get logits, one for each slot.
        let expected =
            [("tokens", 128, true), ("pos", 128, true), ("slot", 128, true), ("rows", 64, true), ("next", 64, false)];
        assert_eq!(io, expected);
    }

    #[test]
    fn layers_alike_share_their_semantics_and_steps_have_names_of_their_own() {
        let program = program();
        let bucket = program.buckets.last().expect("there are buckets");
        let named = |name: &str| bucket.steps.iter().find(|step| step.name == name).map(|step| step.op);
        let (first, second) = (named("layers.0.conv.norm+matmul"), named("layers.1.conv.norm+matmul"));
        assert!(first.is_some() && first == second, "{first:?} {second:?}");
        let names: std::collections::BTreeSet<&str> = bucket.steps.iter().map(|step| &*step.name).collect();
        assert_eq!(names.len(), bucket.steps.len());
        assert!(program.semantics.len() < bucket.steps.len() * program.buckets.len());
    }

    #[test]
    fn merged_projections_are_a_layout_of_three_tensors() {
        let program = program();
        let joined: Vec<usize> = program
            .weights
            .iter()
            .filter_map(|weight| match &weight.layout {
                plan::Layout::Concat { tensors, .. } if weight.name.contains("self_attn") => Some(tensors.len()),
                _ => None,
            })
            .collect();
        assert_eq!(joined, [3, 3], "q, k and v of two layers");
    }
}
