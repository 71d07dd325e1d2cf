//! The pool of one rank: regions, weights, states, io.

use super::{Faults, MAX_BYTES, Show, type_bytes};
use crate::plan::packed::{MAX_COLUMNS, SPAN_COLUMNS};
use crate::plan::{
    ALIGNMENT, DType, Io, Layout, Limits, Manifest, Packed, Program, Region, SAMPLING_COLUMNS, STOP_COLUMNS, State,
    StateRole, Tensor, TensorType, Weight,
};

/// Inputs of a language model, each with one element a row.
pub(super) const LANGUAGE_INPUTS: [&str; 4] = ["tokens", "pos", "slot", "rows"];
/// The result that the host reads.
pub(super) const LANGUAGE_RESULT: &str = "next";

pub(super) fn check(manifest: &Manifest, program: &Program, language: bool, at: &str, faults: &mut Faults) {
    let pool = &program.pool;
    let regions = [("weights", pool.weights), ("state", pool.state), ("arena", pool.arena), ("io", pool.io)];
    let mut end = 0;
    for (name, region) in regions {
        match region_end(region, end) {
            Ok(next) => end = next,
            Err(fault) => faults.add(format_args!("{at}, region `{name}`"), fault),
        }
    }
    faults.unique(format_args!("{at}, weights"), program.weights.iter().map(|weight| weight.name.as_str()));
    let mut places = vec![];
    for weight in &program.weights {
        let at = format_args!("{at}, weight {}", weight.name);
        match type_bytes(&weight.ty) {
            Ok(bytes) => places.push((weight.offset, bytes, weight.name.as_str())),
            Err(fault) => faults.add(at, fault),
        }
        faults.note(at, layout(manifest, weight));
    }
    places.extend(packed(program, at, faults));
    inside("weights", pool.weights, places, at, faults);

    faults.unique(format_args!("{at}, states"), program.states.iter().map(|state| state.name.as_str()));
    let mut places = vec![];
    for state in &program.states {
        let at = format_args!("{at}, state {}", state.name);
        match type_bytes(&state.ty) {
            Ok(bytes) => places.push((state.offset, bytes, state.name.as_str())),
            Err(fault) => faults.add(at, fault),
        }
        faults.note(at, check_state(state, language.then_some(&manifest.limits)));
    }
    inside("state", pool.state, places, at, faults);
    let single = [
        StateRole::BlockTable,
        StateRole::Sampling,
        StateRole::LastToken,
        StateRole::Stops,
        StateRole::StepCounter,
        StateRole::Link,
        StateRole::Claims,
        StateRole::Workspace,
    ];
    for role in single {
        let count = program.states.iter().filter(|state| state.role == role).count();
        if language && count > 1 {
            faults.add(format_args!("{at}, states"), format!("expected at most one {role:?}, found {count}"));
        }
    }

    faults.unique(format_args!("{at}, io"), program.io.iter().map(|io| io.name.as_str()));
    let places = program.io.iter().map(|io| (io.offset, io.bytes, io.name.as_str())).collect();
    inside("io", pool.io, places, at, faults);
    if language {
        language_io(&program.io, at, faults);
    }
}

/// Offset, bytes and name of the packed forms of weights, which are listed by weight and lie behind all weights.
fn packed<'a>(program: &'a Program, at: &str, faults: &mut Faults) -> Vec<(u64, u64, &'a str)> {
    let ends = program.weights.iter().filter_map(|weight| weight.offset.checked_add(weight.ty.bytes()?));
    let end = ends.max().unwrap_or(0);
    let mut places = vec![];
    let mut before = None;
    for &Packed { weight: id, offset } in &program.packed {
        let at = format_args!("{at}, packed form of weight {id}");
        if before >= Some(id) {
            faults.add(at, "expected packed forms by ascending weight");
        }
        before = Some(id);
        let Some(weight) = program.weights.get(id as usize) else {
            faults.add(at, format!("expected one of {} weights", program.weights.len()));
            continue;
        };
        let Some(bytes) = weight.packed_bytes() else {
            let what = "expected bf16 with two axes or more, of which the last is a multiple of";
            let found = Show(&weight.ty);
            faults.add(at, format!("{what} {SPAN_COLUMNS} up to {MAX_COLUMNS}, found {found}"));
            continue;
        };
        if offset < end {
            faults.add(at, format!("expected an offset from {end} on, behind all weights, found {offset}"));
        }
        places.push((offset, bytes, weight.name.as_str()));
    }
    places
}

fn region_end(region: Region, start: u64) -> Result<u64, String> {
    if !region.offset.is_multiple_of(ALIGNMENT) {
        return Err(format!("expected an offset aligned to {ALIGNMENT}, found {}", region.offset));
    }
    if region.offset < start {
        return Err(format!("expected an offset from {start} on, behind the region before, found {}", region.offset));
    }
    region
        .offset
        .checked_add(region.bytes)
        .filter(|&end| end <= MAX_BYTES)
        .ok_or_else(|| format!("expected an end up to {MAX_BYTES}, found {} + {}", region.offset, region.bytes))
}

/// Checks that (offset, bytes, name) are aligned, inside the region and apart.
fn inside(kind: &str, region: Region, mut places: Vec<(u64, u64, &str)>, at: &str, faults: &mut Faults) {
    places.sort_unstable();
    let mut before = (0, "");
    for (offset, bytes, name) in places {
        let fault = place(offset, bytes, region.bytes).err().or_else(|| {
            (offset < before.0)
                .then(|| format!("expected an offset from {} on, behind `{}`, found {offset}", before.0, before.1))
        });
        match fault {
            Some(fault) => faults.add(format_args!("{at}, {kind} `{name}`"), fault),
            None => before = (offset + bytes, name),
        }
    }
}

/// Checks that a range is aligned and inside so many bytes.
pub(super) fn place(offset: u64, bytes: u64, room: u64) -> Result<(), String> {
    if !offset.is_multiple_of(ALIGNMENT) {
        return Err(format!("expected an offset aligned to {ALIGNMENT}, found {offset}"));
    }
    match offset.checked_add(bytes) {
        Some(end) if end <= room && bytes > 0 => Ok(()),
        _ => Err(format!("expected a place inside of {room} bytes, found offset {offset} and {bytes} bytes")),
    }
}

fn layout(manifest: &Manifest, weight: &Weight) -> Result<(), String> {
    let tensor = |id: u32| {
        let found = manifest.tensors.get(id as usize);
        found.ok_or_else(|| format!("expected one of {} tensors, found {id}", manifest.tensors.len()))
    };
    let whole = whole_shape(weight, tensor)?;
    let shape = &whole;
    let expect_kind = |dtype: DType, name: &str| {
        let same = (dtype == DType::I32) == (weight.ty.0 == DType::I32);
        same.then_some(()).ok_or_else(|| format!("{:?} cannot be made of `{name}`, which is {dtype:?}", weight.ty.0))
    };
    let (axis, block, tensors) = match &weight.layout {
        Layout::Copy(id) => {
            let tensor = tensor(*id)?;
            expect_kind(tensor.dtype, &tensor.name)?;
            if tensor.shape != *shape {
                return Err(format!("expected the shape of `{}`, {:?}, found {shape:?}", tensor.name, tensor.shape));
            }
            return Ok(());
        }
        Layout::Concat { axis, block, tensors } => (*axis as usize, *block, tensors),
    };
    let Some(&size) = shape.get(axis) else {
        return Err(format!("expected an axis of {shape:?}, found {axis}"));
    };
    let mut sum = 0u64;
    let mut first = None;
    for &id in tensors {
        let tensor = tensor(id)?;
        expect_kind(tensor.dtype, &tensor.name)?;
        let fits = |(i, (part, whole)): (usize, (&u64, &u64))| i == axis || part == whole;
        if tensor.shape.len() != shape.len() || !tensor.shape.iter().zip(shape).enumerate().all(fits) {
            return Err(format!("`{}` {:?} is no part of {shape:?} along axis {axis}", tensor.name, tensor.shape));
        }
        let part = tensor.shape[axis];
        sum = sum.saturating_add(part);
        if let Some(block) = block
            && (block == 0 || part % block != 0 || *first.get_or_insert(part) != part)
        {
            return Err(format!("blocks of {block} need parts of one size that they divide, found {part}"));
        }
    }
    if sum != size {
        return Err(format!("axis {axis}: expected parts that add up to {size}, found {sum}"));
    }
    Ok(())
}

/// The shape of what a weight's layout makes: the weight's, but for the first axis if the weight has only some of its indices.
fn whole_shape<'a>(weight: &Weight, tensor: impl Fn(u32) -> Result<&'a Tensor, String>) -> Result<Vec<u64>, String> {
    let (shape, indices) = (&weight.ty.1, &weight.indices);
    if indices.is_empty() {
        return Ok(shape.clone());
    }
    let first = weight.layout.tensors().first().ok_or("expected tensors to take indices of, found none")?;
    let size = tensor(*first)?.shape.first().copied().unwrap_or(0);
    let along_first = matches!(weight.layout, Layout::Concat { axis: 0, .. });
    if along_first || !indices.is_sorted_by(|a, b| a < b) || indices.last() >= Some(&size) {
        return Err(format!(
            "`indices`: expected ascending numbers below {size} of an axis that is not joined, found {indices:?}"
        ));
    }
    match shape.split_first() {
        Some((&found, rest)) if found == indices.len() as u64 => Ok([&[size], rest].concat()),
        _ => Err(format!("`indices`: expected as many as the first axis of {shape:?}, found {}", indices.len())),
    }
}

/// Checks a state against its role; against the limits too, in a language model.
fn check_state(state: &State, limits: Option<&Limits>) -> Result<(), String> {
    let TensorType(dtype, shape) = &state.ty;
    let (expected, index): (Vec<Option<u64>>, bool) = match state.role {
        StateRole::KvPages => {
            (vec![limits.map(Limits::pages), Some(2), None, limits.map(|limits| limits.page_tokens), None], false)
        }
        StateRole::ConvRing => {
            (vec![limits.map(|limits| limits.max_sequences), limits.map(|limits| limits.ring_columns), None], false)
        }
        StateRole::BlockTable => {
            (vec![limits.map(|limits| limits.max_sequences), limits.map(Limits::pages_per_sequence)], true)
        }
        StateRole::Sampling => (vec![limits.map(|limits| limits.max_sequences), Some(SAMPLING_COLUMNS)], true),
        StateRole::LastToken => (vec![limits.map(|limits| limits.max_sequences)], true),
        StateRole::Stops => (vec![limits.map(|limits| limits.max_sequences), Some(STOP_COLUMNS)], true),
        StateRole::StepCounter => (vec![Some(2)], true),
        StateRole::Link => (vec![Some(1)], true),
        StateRole::Claims | StateRole::Workspace => (vec![None], true),
    };
    let fits = shape.len() == expected.len()
        && shape.iter().zip(&expected).all(|(found, expected)| expected.is_none_or(|expected| expected == *found));
    if fits && index == (*dtype == DType::I32) {
        return Ok(());
    }
    let dims: Vec<String> = expected.iter().map(|dim| dim.map_or("_".into(), |dim| dim.to_string())).collect();
    let kind = if index { "i32" } else { "a float type" };
    Err(format!("{:?}: expected {kind} [{}], found {}", state.role, dims.join(","), Show(&state.ty)))
}

fn language_io(io: &[Io], at: &str, faults: &mut Faults) {
    let inputs = LANGUAGE_INPUTS.map(|name| (name, true));
    for (name, input) in inputs.into_iter().chain([(LANGUAGE_RESULT, false)]) {
        let kind = if input { "input" } else { "result" };
        match io.iter().find(|io| io.name == name) {
            Some(io) if io.input == input => {}
            Some(_) => faults.add(format_args!("{at}, io `{name}`"), format!("expected an {kind}")),
            None => faults.add(format_args!("{at}, io"), format!("expected the {kind} `{name}` of a language model")),
        }
    }
}
