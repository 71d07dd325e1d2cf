//! Steps: what they read and write, in order.

use fixedbitset::FixedBitSet;

use super::Show;
use super::bucket::Context;
use super::meaning::{Kind, Meaning};
use super::pool::LANGUAGE_RESULT;
use super::semantic::Signature;
use crate::plan::{Bucket, Cost, DType, ForcedRouting, Ref, Semantic, StateRole, Step, TensorType};

/// Each of a step's costs: sums over a bucket stay inside 64 bits.
const MAX_COST: u64 = 1 << 51;

/// What was written to a place.
pub(super) struct Content<'a> {
    pub(super) step: usize,
    ty: &'a TensorType,
    meaning: Option<Meaning>,
}

/// The steps in order, with what they have written so far.
pub(super) struct Walk<'a> {
    context: &'a Context<'a>,
    bucket: &'a Bucket,
    ancestors: &'a [FixedBitSet],
    pub(super) arena: Vec<Option<Content<'a>>>,
    io: Vec<Option<Content<'a>>>,
    /// For each buffer, the steps that touch it.
    pub(super) accesses: Vec<FixedBitSet>,
    /// For each state, the steps that use it, and whether they update it.
    pub(super) states: Vec<Vec<(usize, bool)>>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(context: &'a Context<'a>, bucket: &'a Bucket, ancestors: &'a [FixedBitSet]) -> Self {
        Walk {
            context,
            bucket,
            ancestors,
            arena: bucket.buffers.iter().map(|_| None).collect(),
            io: context.program.io.iter().map(|_| None).collect(),
            accesses: vec![FixedBitSet::with_capacity(bucket.steps.len()); bucket.buffers.len()],
            states: vec![vec![]; context.program.states.len()],
        }
    }

    pub(super) fn step(&mut self, at: usize, step: &'a Step) -> Result<(), String> {
        let semantics = &self.context.program.semantics;
        let semantic: &'a Semantic = semantics
            .get(step.op as usize)
            .ok_or_else(|| format!("`op`: expected one of {} semantics, found {}", semantics.len(), step.op))?;
        let signature = &self.context.signatures[step.op as usize];
        if step.reads.len() != semantic.inputs.len() || step.writes.len() != semantic.outputs.len() {
            return Err(format!(
                "expected {} reads and {} writes, found {} and {}",
                semantic.inputs.len(),
                semantic.outputs.len(),
                step.reads.len(),
                step.writes.len()
            ));
        }
        let Cost { bytes, bytes_per_expert, bytes_per_position, flops, link_bytes } = step.cost;
        if [bytes, bytes_per_expert, bytes_per_position, flops, link_bytes].iter().any(|&cost| cost > MAX_COST) {
            return Err(format!("`cost`: expected numbers up to {MAX_COST}, found {:?}", step.cost));
        }
        let mut found = vec![];
        for (i, (&place, ty)) in step.reads.iter().zip(&semantic.inputs).enumerate() {
            found
                .push(self.read(at, place, ty, signature, i).map_err(|fault| format!("read {i}, {place:?}: {fault}"))?);
        }
        self.updates(at, step, signature)?;
        for (i, (&place, ty)) in step.writes.iter().zip(&semantic.outputs).enumerate() {
            let kept = signature.keeps[i].and_then(|input| found[input as usize]);
            let given = signature.gives[i].map(|meaning| meaning.within(&self.context.manifest.limits));
            let content = Content { step: at, ty, meaning: given.or(kept) };
            self.write(place, content).map_err(|fault| format!("write {i}, {place:?}: {fault}"))?;
        }
        Ok(())
    }

    /// Checks one read; what is known of the integers there.
    fn read(
        &mut self,
        at: usize,
        place: Ref,
        ty: &TensorType,
        signature: &Signature,
        i: usize,
    ) -> Result<Option<Meaning>, String> {
        let program = self.context.program;
        let expect = |found: &TensorType| match found == ty {
            true => Ok(()),
            false => Err(format!("expected {}, found {}", Show(ty), Show(found))),
        };
        let (role, need) = (signature.roles[i], signature.needs[i]);
        let found: Option<Meaning> = match place {
            Ref::Arena(id) => {
                let found = written(&self.arena, id, at, self.ancestors)?;
                expect(found.ty)?;
                self.accesses[id as usize].insert(at);
                found.meaning
            }
            Ref::Weight(id) => {
                expect(&entry(&program.weights, id)?.ty)?;
                None
            }
            Ref::State(id) => {
                let state = entry(&program.states, id)?;
                expect(&state.ty)?;
                if let Some(role) = role
                    && role != state.role
                {
                    return Err(format!("expected a state for {role:?}, found {:?}", state.role));
                }
                self.states[id as usize].push((at, signature.updates[i]));
                None
            }
            Ref::Io(id) => {
                let io = entry(&program.io, id)?;
                if !io.input {
                    let found = written(&self.io, id, at, self.ancestors)?;
                    expect(found.ty)?;
                    found.meaning
                } else {
                    fits(ty, io.bytes)?;
                    match self.language_input(&io.name, at)? {
                        Some((expected, meaning)) => {
                            expect(&expected)?;
                            Some(meaning)
                        }
                        // Of a graph in text form, nothing is known of what the host writes: executors check it.
                        None => need,
                    }
                }
            }
        };
        // A graph in text form may read a cache that is its input, and any rank the pages of another's slots.
        let pages = role == Some(StateRole::BlockTable) && found.is_some_and(|found| found.kind == Kind::Page);
        if let Some(role) = role
            && !matches!(place, Ref::State(_))
            && !pages
            && (self.context.language || signature.updates[i])
        {
            return Err(format!("expected a state for {role:?}"));
        }
        match (need, found) {
            _ if pages => Ok(found),
            (Some(need), Some(found)) if !found.serves(need) => Err(format!("expected {need}, found {found}")),
            (Some(need), None) => Err(format!("expected {need}, found integers of no meaning")),
            _ => Ok(found),
        }
    }

    /// Type and meaning of a language model's input; none in a graph in text form.
    fn language_input(&self, name: &str, at: usize) -> Result<Option<(TensorType, Meaning)>, String> {
        if !self.context.language {
            return Ok(None);
        }
        let (limits, vocab) = (&self.context.manifest.limits, self.context.manifest.model.vocab);
        let (size, kind, below) = match name {
            "tokens" => (self.bucket.tokens, Kind::Token, vocab),
            "pos" => (self.bucket.tokens, Kind::Position, limits.max_context),
            "slot" => (self.bucket.tokens, Kind::Slot, limits.max_sequences),
            "rows" if at < self.bucket.head as usize => return Err("a step before the head reads `rows`".into()),
            "rows" => (self.bucket.rows, Kind::Row, self.bucket.tokens),
            _ => return self.forced_experts(name).map(Some),
        };
        Ok(Some((TensorType(DType::I32, vec![size]), Meaning::new(kind, below))))
    }

    /// Type and meaning of an input of forced routing.
    fn forced_experts(&self, name: &str) -> Result<(TensorType, Meaning), String> {
        let routing = self.context.manifest.model.forced_routing.as_ref();
        let routing = routing.filter(|r| r.layers.iter().any(|&layer| ForcedRouting::input(layer) == name));
        let routing = routing.ok_or_else(|| format!("`{name}` is no input of a language model"))?;
        let ty = TensorType(DType::I32, vec![self.bucket.tokens, routing.per_token]);
        Ok((ty, Meaning::new(Kind::Expert, routing.experts)))
    }

    fn write(&mut self, place: Ref, content: Content<'a>) -> Result<(), String> {
        let program = self.context.program;
        let (slot, room) = match place {
            Ref::Arena(id) => {
                let room = entry(&self.bucket.buffers, id)?.2;
                self.accesses[id as usize].insert(content.step);
                (&mut self.arena[id as usize], room)
            }
            Ref::Io(id) => {
                let io = entry(&program.io, id)?;
                if io.input {
                    return Err("expected a result, found an input".into());
                }
                if self.context.language && io.name == LANGUAGE_RESULT {
                    let expected = TensorType(DType::I32, vec![self.bucket.rows]);
                    let vocab = Meaning::new(Kind::Token, self.context.manifest.model.vocab);
                    if *content.ty != expected || !content.meaning.is_some_and(|meaning| meaning.serves(vocab)) {
                        return Err(format!("expected tokens {}, found {}", Show(&expected), Show(content.ty)));
                    }
                }
                (&mut self.io[id as usize], io.bytes)
            }
            Ref::Weight(_) | Ref::State(_) => return Err("expected the arena or io".into()),
        };
        fits(content.ty, room)?;
        match slot.replace(content) {
            Some(earlier) => Err(format!("step {} writes it too", earlier.step)),
            None => Ok(()),
        }
    }

    fn updates(&self, at: usize, step: &Step, signature: &Signature) -> Result<(), String> {
        let mut expected = vec![];
        for (i, &place) in step.reads.iter().enumerate().filter(|(i, _)| signature.updates[*i]) {
            let Ref::State(id) = place else { return Err(format!("read {i} is updated: expected a state")) };
            if step.reads.iter().filter(|read| **read == place).count() > 1 {
                return Err(format!("read {i} is updated, and read another time as well"));
            }
            expected.push(id);
        }
        let mut found = step.updates.clone();
        expected.sort_unstable();
        found.sort_unstable();
        if found != expected {
            return Err(format!("`updates`: expected states {expected:?}, found {found:?}"));
        }
        if at >= self.bucket.head as usize && !found.is_empty() {
            return Err("a step of the head updates a state: the head may run again".into());
        }
        Ok(())
    }

    pub(super) fn output(&self, place: Ref) -> Result<(), String> {
        let program = self.context.program;
        let written = match place {
            Ref::Arena(id) => entry(&self.arena, id)?.is_some(),
            Ref::Io(id) => entry(&program.io, id)?.input || self.io[id as usize].is_some(),
            Ref::State(id) => entry(&program.states, id).map(|_| true)?,
            Ref::Weight(_) => return Err("a graph returns no weight".into()),
        };
        if written { Ok(()) } else { Err("no step writes it".into()) }
    }

    pub(super) fn language_outputs(&self) -> Result<(), String> {
        let named = |name: &str| self.bucket.outputs.iter().find(|output| output.0 == name).map(|output| output.1);
        let next = self.context.program.io.iter().position(|io| io.name == LANGUAGE_RESULT);
        if named(LANGUAGE_RESULT) != next.map(|id| Ref::Io(id as u32)) {
            return Err(format!("expected the output `{LANGUAGE_RESULT}` at the io buffer of this name"));
        }
        let content = match named("logits") {
            Some(Ref::Arena(id)) => self.arena.get(id as usize).and_then(Option::as_ref),
            Some(Ref::Io(id)) => self.io.get(id as usize).and_then(Option::as_ref),
            _ => None,
        };
        let expected = TensorType(DType::F32, vec![self.bucket.rows, self.context.manifest.model.vocab]);
        match content {
            Some(content) if *content.ty == expected => Ok(()),
            Some(content) => Err(format!("output `logits`: expected {}, found {}", Show(&expected), Show(content.ty))),
            None => Err("expected the output `logits`".into()),
        }
    }
}

fn entry<T>(table: &[T], id: u32) -> Result<&T, String> {
    table.get(id as usize).ok_or_else(|| format!("expected one of {}, found {id}", table.len()))
}

/// What a place holds when a step reads it.
fn written<'a, 'b>(
    table: &'b [Option<Content<'a>>],
    id: u32,
    at: usize,
    ancestors: &[FixedBitSet],
) -> Result<&'b Content<'a>, String> {
    let content = entry(table, id)?.as_ref().ok_or("it is read before it is written")?;
    if !ancestors[at].contains(content.step) {
        return Err(format!("it is written by step {}, which need not be done before", content.step));
    }
    Ok(content)
}

fn fits(ty: &TensorType, room: u64) -> Result<(), String> {
    match ty.bytes() {
        Some(bytes) if bytes <= room => Ok(()),
        _ => Err(format!("{} does not fit {room} bytes", Show(ty))),
    }
}
