//! The body of a semantic: slots, order of writes, operators.

use std::fmt::Display;

use super::meaning::{self, Meaning};
use super::{Faults, ops, type_bytes};
use crate::plan::{CollectiveKind, Instr, Semantic, Slot, StateRole, TensorType};

/// A temporary is scratch of an executor, outside of the pool: at most so many times the pool's size ...
pub(super) const MAX_TEMPORARY_POOLS: u64 = 16;
/// ... where that is more than this.
pub(super) const MIN_TEMPORARY_LIMIT: u64 = 1 << 24;
/// Operators of one semantic.
const MAX_BODY: usize = 1 << 12;

/// What a step has to know of its semantic.
pub(super) struct Signature {
    /// For each input, the state it has to be.
    pub(super) roles: Vec<Option<StateRole>>,
    /// For each input, true if the body updates it.
    pub(super) updates: Vec<bool>,
    /// For each input, what its integers have to be.
    pub(super) needs: Vec<Option<Meaning>>,
    /// For each output, what its integers are.
    pub(super) gives: Vec<Option<Meaning>>,
    /// For each output, the input whose integers it has, if it has those of one.
    pub(super) keeps: Vec<Option<u32>>,
}

/// Checks a semantic; its signature, if there is no fault. A temporary may have up to `scratch` bytes.
pub(super) fn check(semantic: &Semantic, scratch: u64, at: &dyn Display, faults: &mut Faults) -> Option<Signature> {
    let before = faults.count();
    let at = format!("{at} ({})", semantic.name);
    let kinds = [("input", &semantic.inputs), ("output", &semantic.outputs), ("temporary", &semantic.temps)];
    for (kind, types) in kinds {
        for (i, ty) in types.iter().enumerate() {
            let fits = type_bytes(ty).and_then(|bytes| match kind {
                "temporary" if bytes > scratch => Err(format!("expected at most {scratch} bytes, found {bytes}")),
                _ => Ok(()),
            });
            faults.note(format_args!("{at}, {kind} {i}"), fits);
        }
    }
    if semantic.body.is_empty() || semantic.body.len() > MAX_BODY {
        faults.add(&at, format!("expected 1 to {MAX_BODY} operators, found {}", semantic.body.len()));
    }
    if faults.count() > before {
        return None;
    }
    let mut body = Body::new(semantic);
    for (i, instr) in semantic.body.iter().enumerate() {
        if !faults.note(format_args!("{at}, operator {i}"), body.instr(instr)) {
            return None;
        }
    }
    faults.note(&at, body.end()).then_some(body.signature)
}

struct Body<'a> {
    semantic: &'a Semantic,
    signature: Signature,
    /// For each input, true if an operator takes it as something else than a state.
    plain: Vec<bool>,
    out_written: Vec<bool>,
    temp_written: Vec<bool>,
    temp_meanings: Vec<Option<Meaning>>,
}

impl<'a> Body<'a> {
    fn new(semantic: &'a Semantic) -> Self {
        let (inputs, outputs, temps) = (semantic.inputs.len(), semantic.outputs.len(), semantic.temps.len());
        Body {
            semantic,
            signature: Signature {
                roles: vec![None; inputs],
                updates: vec![false; inputs],
                needs: vec![None; inputs],
                gives: vec![None; outputs],
                keeps: vec![None; outputs],
            },
            plain: vec![false; inputs],
            out_written: vec![false; outputs],
            temp_written: vec![false; temps],
            temp_meanings: vec![None; temps],
        }
    }

    fn instr(&mut self, Instr(op, arguments, results): &Instr) -> Result<(), String> {
        let argument_types = arguments.iter().map(|&slot| self.argument(slot)).collect::<Result<Vec<_>, _>>()?;
        let result_types = results.iter().map(|&slot| self.result(slot)).collect::<Result<Vec<_>, _>>()?;
        let named = |fault: String| format!("{}: {fault}", op_name(op));
        ops::check(op, &argument_types, &result_types).map_err(named)?;
        let states = ops::state_arguments(op, &argument_types);
        for (i, &slot) in arguments.iter().enumerate() {
            let role = states.iter().find(|(at, _)| *at == i).map(|(_, role)| *role);
            self.state_use(slot, role, ops::updated_argument(op) == Some(i)).map_err(named)?;
        }
        let required = meaning::required(op, &argument_types);
        for (at, need) in required.into_iter().chain(meaning::required_by_results(op, &result_types)) {
            self.need(arguments[at], need).map_err(named)?;
        }
        if CollectiveKind::of(op).is_some() {
            if self.semantic.body.len() > 1 {
                return Err(named("expected it to be alone in its step".into()));
            }
            let in_order = arguments.iter().zip(0..).all(|(slot, i)| *slot == Slot::In(i))
                && results.iter().zip(0..).all(|(slot, i)| *slot == Slot::Out(i));
            if !in_order {
                return Err(named(format!(
                    "expected the step's inputs and outputs in order, found {arguments:?} and {results:?}"
                )));
            }
            for (argument, result) in arguments.iter().zip(results) {
                if let (Slot::In(from), Slot::Out(to)) = (argument, result) {
                    self.signature.keeps[*to as usize] = Some(*from);
                }
            }
        }
        for (at, meaning) in meaning::given(op, &argument_types, &result_types) {
            match results[at] {
                Slot::Out(i) => self.signature.gives[i as usize] = Some(meaning),
                Slot::Temp(i) => self.temp_meanings[i as usize] = Some(meaning),
                Slot::In(_) => {}
            }
        }
        Ok(())
    }

    /// The type of what an operator takes: an input, or something written before.
    fn argument(&self, slot: Slot) -> Result<&'a TensorType, String> {
        let (types, written, i) = match slot {
            Slot::In(i) => (&self.semantic.inputs, None, i as usize),
            Slot::Out(i) => (&self.semantic.outputs, Some(&self.out_written), i as usize),
            Slot::Temp(i) => (&self.semantic.temps, Some(&self.temp_written), i as usize),
        };
        let ty = types.get(i).ok_or_else(|| format!("{slot:?}: expected one of {}", types.len()))?;
        match written {
            Some(written) if !written[i] => Err(format!("{slot:?} is read before it is written")),
            _ => Ok(ty),
        }
    }

    /// The type of what an operator writes, which it has to be the first to do.
    fn result(&mut self, slot: Slot) -> Result<&'a TensorType, String> {
        let (types, written, i) = match slot {
            Slot::In(_) => return Err(format!("{slot:?} is written: a result is an output or a temporary")),
            Slot::Out(i) => (&self.semantic.outputs, &mut self.out_written, i as usize),
            Slot::Temp(i) => (&self.semantic.temps, &mut self.temp_written, i as usize),
        };
        let ty = types.get(i).ok_or_else(|| format!("{slot:?}: expected one of {}", types.len()))?;
        if std::mem::replace(&mut written[i], true) {
            return Err(format!("{slot:?} is written twice"));
        }
        Ok(ty)
    }

    fn state_use(&mut self, slot: Slot, role: Option<StateRole>, updated: bool) -> Result<(), String> {
        match (slot, role) {
            (Slot::In(i), Some(role)) => {
                let known = self.signature.roles[i as usize].get_or_insert(role);
                if *known != role {
                    return Err(format!("{slot:?} is used as {known:?} and as {role:?}"));
                }
                self.signature.updates[i as usize] |= updated;
            }
            (Slot::In(i), None) => self.plain[i as usize] = true,
            (_, Some(role)) => return Err(format!("{slot:?} is used as {role:?}, which has to be an input")),
            (_, None) => {}
        }
        Ok(())
    }

    fn need(&mut self, slot: Slot, need: Meaning) -> Result<(), String> {
        let found = match slot {
            Slot::In(i) => {
                let known = self.signature.needs[i as usize].get_or_insert(need);
                if known.kind != need.kind {
                    return Err(format!("{slot:?} is used as {known} and as {need}"));
                }
                known.below = known.below.min(need.below);
                return Ok(());
            }
            Slot::Out(i) => self.signature.gives[i as usize],
            Slot::Temp(i) => self.temp_meanings[i as usize],
        };
        match found {
            Some(found) if found.serves(need) => Ok(()),
            Some(found) => Err(format!("{slot:?}: expected {need}, found {found}")),
            None => Err(format!("{slot:?}: expected {need}, found integers of no meaning")),
        }
    }

    fn end(&self) -> Result<(), String> {
        if let Some(i) = (0..self.plain.len()).find(|&i| self.plain[i] && self.signature.roles[i].is_some()) {
            return Err(format!("{:?} is used as a state and as a value", Slot::In(i as u32)));
        }
        let unwritten = |written: &[bool]| written.iter().position(|written| !written).map(|i| i as u32);
        match unwritten(&self.out_written).map(Slot::Out).or(unwritten(&self.temp_written).map(Slot::Temp)) {
            Some(slot) => Err(format!("{slot:?} is never written")),
            None => Ok(()),
        }
    }
}

/// The operator without its attributes.
fn op_name(op: &crate::plan::Op) -> String {
    let text = format!("{op:?}");
    text.split([' ', '(']).next().unwrap_or_default().to_owned()
}
