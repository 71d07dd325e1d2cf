//! From a scheduled and placed graph to the buckets and tables of a plan.

use std::collections::HashMap;

use crate::codegen::cost::cost;
use crate::codegen::kernel_table::KernelTable;
use crate::codegen::kernels::is_weight;
use crate::codegen::select::Selector;
use crate::codegen::types::tensor_type;
use crate::codegen::{packed, semantic, tensors};
use crate::ir::{self, Extents, Graph, Layout, OpKind, Operand, ValueId};
use crate::passes::plan_memory::Placement;
use crate::passes::schedule::{Schedule, Storage, storage};
use crate::passes::{BucketSpec, Phase};
use crate::plan::{
    self, ALIGNMENT, Bucket, Buffer, Collective, Io, Program, Ref, Region, Semantic, State, StateRole, Step,
};

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

/// The tensors that weights of all ranks are made of, each once.
#[derive(Default)]
pub struct TensorTable {
    /// As the plan lists them.
    pub tensors: Vec<plan::Tensor>,
    /// Positions, by name.
    ids: HashMap<String, u32>,
}

/// Lowers all buckets of one rank. `checkpoint_dtype` gives a checkpoint tensor's element type by its weight's name; with a
/// selector, steps get launches, of kernels that `kernels` gets, unless ranks run them together. `tensors` gets what weights are made of.
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
        tables.device_states(longest as u64);
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

/// The tables that buckets share, each entry made when it is first needed.
struct Tables<'a> {
    selector: Option<&'a Selector<'a>>,
    kernels: &'a mut KernelTable,
    tensors: &'a mut TensorTable,
    weights: Vec<plan::Weight>,
    weight_ids: HashMap<String, u32>,
    states: Vec<State>,
    state_ids: HashMap<String, u32>,
    io: Vec<Io>,
    io_ids: HashMap<String, u32>,
    semantics: Vec<Semantic>,
    semantic_ids: HashMap<String, u32>,
}

impl<'a> Tables<'a> {
    fn new(selector: Option<&'a Selector<'a>>, kernels: &'a mut KernelTable, tensors: &'a mut TensorTable) -> Self {
        Tables {
            selector,
            kernels,
            tensors,
            weights: vec![],
            weight_ids: HashMap::new(),
            states: vec![],
            state_ids: HashMap::new(),
            io: vec![],
            io_ids: HashMap::new(),
            semantics: vec![],
            semantic_ids: HashMap::new(),
        }
    }

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
            let launch = match collective {
                Some(_) => Ok(None),
                None => self.launch(&lowered.semantic, plan_phase(spec.phase), &reads),
            };
            let mut launch = launch.map_err(|fault| format!("{name}: {fault}"))?;
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
            });
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
    fn launch(
        &mut self,
        semantic: &Semantic,
        phase: plan::Phase,
        reads: &[Ref],
    ) -> Result<Option<plan::Launch>, String> {
        let Some(selector) = self.selector else { return Ok(None) };
        let chosen = selector.choose(semantic, phase);
        let chosen = match chosen {
            Some(found) if !packed::fits(&found.specialised.launch, reads, &self.weights, selector) => {
                selector.choose_unpacked(semantic, phase)
            }
            chosen => chosen,
        };
        let candidate = chosen.ok_or("no kernel can run it")?;
        let id = self.kernels.add(&candidate);
        Ok(Some(candidate.launch(id)))
    }

    /// Adds what a device keeps by itself: counters for buckets of up to so many steps and, if the graph is a language model's,
    /// the state of sequences.
    fn device_states(&mut self, longest: u64) {
        let sampling = self.states.iter().find(|state| state.role == StateRole::Sampling);
        let slots = sampling.map(|state| state.ty.1[0]);
        let mut added = vec![("claims", StateRole::Claims, vec![longest.max(1)])];
        if let Some(slots) = slots {
            added.extend([
                ("last", StateRole::LastToken, vec![slots]),
                ("stops", StateRole::Stops, vec![slots, plan::STOP_COLUMNS]),
                ("steps", StateRole::StepCounter, vec![2]),
            ]);
        }
        for (name, role, shape) in added {
            let last = self.states.last();
            let offset = last.and_then(|state| end(state.offset, &state.ty)).unwrap_or(0);
            let ty = plan::TensorType(plan::DType::I32, shape);
            self.states.push(State { name: name.into(), ty, offset, role });
        }
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

    fn io(&mut self, graph: &Graph, value: ValueId, input: bool, extents: &Extents) -> Result<u32, String> {
        let value = graph.value(value);
        let bytes = value.ty.bytes(extents).ok_or_else(|| too_large(&value.name))?;
        let next = self.io.len() as u32;
        let id = *self.io_ids.entry(value.name.clone()).or_insert(next);
        if id == next {
            self.io.push(Io { name: value.name.clone(), offset: 0, bytes, input });
        }
        let io = &mut self.io[id as usize];
        io.bytes = io.bytes.max(bytes);
        Ok(id)
    }

    fn state(&mut self, graph: &Graph, id: ValueId, extents: &Extents) -> Result<u32, String> {
        let value = graph.value(id);
        if let Some(&known) = self.state_ids.get(&value.name) {
            return Ok(known);
        }
        let offset = match self.states.last() {
            None => 0,
            Some(state) => end(state.offset, &state.ty).ok_or_else(|| too_large(&value.name))?,
        };
        let role = role(graph, id).ok_or_else(|| format!("no operator says what the state %{} is for", value.name))?;
        let ty = tensor_type(&value.ty, extents)?;
        let next = self.states.len() as u32;
        self.states.push(State { name: value.name.clone(), ty, offset, role });
        self.state_ids.insert(value.name.clone(), next);
        Ok(next)
    }

    fn weight(
        &mut self,
        graph: &Graph,
        weight: &ir::Weight,
        checkpoint_dtype: &dyn Fn(&ir::Weight) -> ir::DType,
    ) -> Result<u32, String> {
        if let Some(&known) = self.weight_ids.get(&weight.name) {
            return Ok(known);
        }
        let mut tensor = |part: &ir::Weight| -> Result<u32, String> {
            let TensorTable { tensors, ids } = &mut *self.tensors;
            if let Some(&known) = ids.get(&part.name) {
                return Ok(known);
            }
            tensors.push(tensors::tensor(part, checkpoint_dtype(part))?);
            let id = (tensors.len() - 1) as u32;
            ids.insert(part.name.clone(), id);
            Ok(id)
        };
        let (source, indices) = match &weight.layout {
            Layout::Take { of, indices } => (graph.weight(*of), indices.clone()),
            _ => (weight, vec![]),
        };
        let layout = match &source.layout {
            Layout::Take { .. } => return Err(format!("@{} takes indices of what takes indices", weight.name)),
            Layout::Tensor => plan::Layout::Copy(tensor(source)?),
            Layout::Concat { axis, block, parts } => plan::Layout::Concat {
                axis: *axis as u32,
                block: *block,
                tensors: parts.iter().map(|&part| tensor(graph.weight(part))).collect::<Result<_, _>>()?,
            },
        };
        let offset = match self.weights.last() {
            None => 0,
            Some(last) => end(last.offset, &last.ty).ok_or_else(|| too_large(&weight.name))?,
        };
        let unbound = Extents { tokens: 1, sequences: 1, rows: 1 };
        let ty = tensor_type(&weight.ty, &unbound)?;
        let id = self.weights.len() as u32;
        self.weights.push(plan::Weight { name: weight.name.clone(), ty, offset, layout, indices });
        self.weight_ids.insert(weight.name.clone(), id);
        Ok(id)
    }

    fn semantic(&mut self, semantic: Semantic) -> u32 {
        let next = self.semantics.len() as u32;
        let id = *self.semantic_ids.entry(format!("{semantic:?}")).or_insert(next);
        if id == next {
            self.semantics.push(semantic);
        }
        id
    }
}

/// What a state is for, by the operator that uses it.
fn role(graph: &Graph, state: ValueId) -> Option<StateRole> {
    let is = |operand: Option<&Operand>| operand.and_then(|o| o.value()) == Some(state);
    graph.ops.iter().flat_map(|op| op.primitives()).find_map(|op| match op.kind {
        OpKind::KvWrite if is(op.operands.get(2)) => Some(StateRole::KvPages),
        OpKind::KvWrite if is(op.operands.get(3)) => Some(StateRole::BlockTable),
        OpKind::Attention { .. } if is(op.operands.get(1)) => Some(StateRole::KvPages),
        OpKind::Attention { .. } if is(op.operands.get(2)) => Some(StateRole::BlockTable),
        OpKind::Conv1dCausal if is(op.operands.get(2)) => Some(StateRole::ConvRing),
        OpKind::Sample if is(op.operands.get(4)) => Some(StateRole::Sampling),
        OpKind::Send { .. } | OpKind::Receive { .. } if is(op.operands.first()) => Some(StateRole::Link),
        // The one state that is sent.
        OpKind::Send { .. } if op.uses().any(|value| value == state) => Some(StateRole::BlockTable),
        _ => None,
    })
}

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

fn end(offset: u64, ty: &plan::TensorType) -> Option<u64> {
    offset.checked_add(ty.bytes()?)?.checked_next_multiple_of(ALIGNMENT)
}

fn too_large(name: &str) -> String {
    format!("`{name}` is too large: its bytes exceed 64 bits")
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
