//! The tables that a rank's buckets share, each entry made when it is first needed: weights with the tensors that they are made
//! of, states, io, and what steps compute.

use std::collections::HashMap;

use crate::codegen::kernel_table::KernelTable;
use crate::codegen::select::Selector;
use crate::codegen::tensors;
use crate::codegen::types::tensor_type;
use crate::ir::{self, Extents, Graph, Layout, OpKind, Operand, ValueId};
use crate::plan::{self, ALIGNMENT, Io, Semantic, State, StateRole};

/// The tensors that weights of all ranks are made of, each once.
#[derive(Default)]
pub struct TensorTable {
    /// As the plan lists them.
    pub tensors: Vec<plan::Tensor>,
    /// Positions, by name.
    ids: HashMap<String, u32>,
}

/// The tables that buckets share, each entry made when it is first needed.
pub(super) struct Tables<'a> {
    pub(super) selector: Option<&'a Selector<'a>>,
    pub(super) kernels: &'a mut KernelTable,
    tensors: &'a mut TensorTable,
    pub(super) weights: Vec<plan::Weight>,
    weight_ids: HashMap<String, u32>,
    pub(super) states: Vec<State>,
    state_ids: HashMap<String, u32>,
    pub(super) io: Vec<Io>,
    io_ids: HashMap<String, u32>,
    pub(super) semantics: Vec<Semantic>,
    semantic_ids: HashMap<String, u32>,
}

impl<'a> Tables<'a> {
    pub(super) fn new(
        selector: Option<&'a Selector<'a>>,
        kernels: &'a mut KernelTable,
        tensors: &'a mut TensorTable,
    ) -> Self {
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

    /// Adds what a device keeps by itself: counters for buckets of up to so many steps and, if the graph is a language model's,
    /// the state of sequences; and so many bytes for libraries to work in.
    pub(super) fn device_states(&mut self, longest: u64, workspace: u64) {
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
        if workspace > 0 {
            let elements = workspace.div_ceil(plan::DType::I32.bytes());
            added.push(("workspace", StateRole::Workspace, vec![elements]));
        }
        for (name, role, shape) in added {
            let last = self.states.last();
            let offset = last.and_then(|state| end(state.offset, &state.ty)).unwrap_or(0);
            let ty = plan::TensorType(plan::DType::I32, shape);
            self.states.push(State { name: name.into(), ty, offset, role });
        }
    }

    pub(super) fn io(&mut self, graph: &Graph, value: ValueId, input: bool, extents: &Extents) -> Result<u32, String> {
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

    pub(super) fn state(&mut self, graph: &Graph, id: ValueId, extents: &Extents) -> Result<u32, String> {
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

    pub(super) fn weight(
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

    pub(super) fn semantic(&mut self, semantic: Semantic) -> u32 {
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

pub(super) fn end(offset: u64, ty: &plan::TensorType) -> Option<u64> {
    offset.checked_add(ty.bytes()?)?.checked_next_multiple_of(ALIGNMENT)
}

pub(super) fn too_large(name: &str) -> String {
    format!("`{name}` is too large: its bytes exceed 64 bits")
}
