//! Kernels, and the launches of steps.

use std::collections::HashSet;

use super::Faults;
use super::bucket::Context;
use super::library;
use crate::plan::{
    Arg, DType, EXCHANGE_PARTS, EXCHANGE_RANKS, Kernel, Launch, Manifest, Param, ParamType, Program, Ref, Semantic,
    StateRole, Step, Target, TensorMap, TensorType, settled,
};

const MAX_KERNELS: usize = 1 << 12;
const MAX_PARAMS: usize = 32;
/// Threads of a block, blocks of a portable cluster, and dynamic shared memory of a block.
const MAX_BLOCK: u32 = 1024;
const MAX_CLUSTER: u32 = 8;
const MAX_SHARED: u32 = 227 << 10;
/// Blocks along y and z.
const MAX_GRID_YZ: u32 = 65535;
/// What the copy engine takes: elements along an axis, bytes of a stride, elements of a box along an axis; and what divides
/// strides and the bytes of a box's row.
const MAX_MAP_SIZE: u64 = 1 << 32;
const MAX_MAP_STRIDE: u64 = 1 << 40;
const MAX_MAP_TILE: u32 = 256;
const MAP_ALIGNMENT: u64 = 16;

/// Checks the tables of kernels and services.
pub(super) fn check_kernels(manifest: &Manifest, cubins: usize, faults: &mut Faults) {
    let kernels = &manifest.kernels;
    if kernels.len() > MAX_KERNELS || (manifest.target == Target::Cpu && !kernels.is_empty()) {
        faults.add("kernels", format!("expected at most {MAX_KERNELS}, none for the CPU, found {}", kernels.len()));
        return;
    }
    for (i, kernel) in kernels.iter().enumerate() {
        faults.note(format_args!("kernel {i}"), check_kernel(kernel, cubins));
    }
    let compiled = kernels.iter().filter(|kernel| kernel.cubin.is_some()).count();
    if compiled != 0 && compiled != kernels.len() {
        faults.add("kernels", format!("expected machine code of all {} or of none, found {compiled}", kernels.len()));
    }
    for (i, service) in manifest.services.iter().enumerate() {
        if !service.0.is_possible() {
            faults.add(
                "services",
                format!("{:?}: expected {EXCHANGE_RANKS:?} ranks and {EXCHANGE_PARTS:?} parts", service.0),
            );
        }
        match kernels.get(service.1 as usize) {
            None => faults.add("services", format!("{service:?}: expected one of {} kernels", kernels.len())),
            Some(kernel) => {
                let (expected, found) = (service.0.params(), kernel.params.iter().map(|param| param.1));
                if !found.clone().eq(expected.iter().copied()) {
                    let found: Vec<ParamType> = found.collect();
                    faults.add("services", format!("{service:?}: expected parameters {expected:?}, found {found:?}"));
                }
            }
        }
        if manifest.services[..i].iter().any(|other| other.0 == service.0) {
            faults.add("services", format!("{:?} is there more than once", service.0));
        }
    }
}

fn check_kernel(kernel: &Kernel, cubins: usize) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if kernel.name.is_empty() || !kernel.name.chars().all(plain) {
        return Err(format!("expected a C identifier as its name, found `{}`", kernel.name.escape_default()));
    }
    if kernel.params.len() > MAX_PARAMS {
        return Err(format!("expected at most {MAX_PARAMS} parameters, found {}", kernel.params.len()));
    }
    match kernel.cubin {
        Some(cubin) if cubin as usize >= cubins => {
            Err(format!("`cubin`: expected one of {cubins} sections with machine code, found {cubin}"))
        }
        _ => Ok(()),
    }
}

/// Checks the launches of a program's steps.
pub(super) fn check_steps(context: &Context, at: &str, faults: &mut Faults) {
    for bucket in &context.program.buckets {
        let mut claimed = HashSet::new();
        for (i, step) in bucket.steps.iter().enumerate() {
            if faults.full() {
                return;
            }
            let at = format_args!("{at}, bucket {}, step {}", bucket.name, step.name);
            let checked = check_step(context, step).and_then(|()| check_early(&bucket.steps[..=i]));
            let checked = checked.and_then(|()| check_packed(context.program, step));
            faults.note(at, checked.and_then(|()| check_claims(context.program, step, &mut claimed)));
        }
    }
}

fn check_step(context: &Context, step: &Step) -> Result<(), String> {
    let device = context.manifest.target != Target::Cpu;
    if let Some(call) = step.library {
        return library::check_call(context, step, call);
    }
    let launch = match &step.launch {
        Some(_) if step.collective.is_some() => return Err("expected no launch of what ranks do together".into()),
        None if step.collective.is_some() => return Ok(()),
        None if device => return Err("expected a launch, found none".into()),
        None => return Ok(()),
        Some(_) if !device => return Err("expected no launch in a plan for the CPU".into()),
        Some(launch) => launch,
    };
    let kernels = &context.manifest.kernels;
    let kernel = kernels
        .get(launch.kernel as usize)
        .ok_or_else(|| format!("`kernel`: expected one of {}, found {}", kernels.len(), launch.kernel))?;
    check_shape(launch)?;
    if launch.args.len() != kernel.params.len() {
        let (expected, found) = (kernel.params.len(), launch.args.len());
        return Err(format!("expected {expected} arguments for kernel {}, found {found}", kernel.name));
    }
    let semantics = &context.program.semantics;
    let semantic = semantics.get(step.op as usize).ok_or_else(|| format!("no semantic {}", step.op))?;
    for (&arg, Param(name, ty)) in launch.args.iter().zip(&kernel.params) {
        check_arg(arg, *ty, semantic).map_err(|fault| format!("argument `{name}` of {}: {fault}", kernel.name))?;
    }
    Ok(())
}

/// Checks that a step's counters are there, and that no step before it has one of them.
fn check_claims(program: &Program, step: &Step, claimed: &mut HashSet<u32>) -> Result<(), String> {
    let counters = program.states.iter().find(|state| state.role == StateRole::Claims);
    let room = counters.and_then(|state| state.ty.elements()).unwrap_or(0);
    for arg in step.launch.iter().flat_map(|launch| &launch.args) {
        if let Arg::Claim(i) = *arg {
            if u64::from(i) >= room {
                return Err(format!("{arg:?}: expected one of {room} counters"));
            }
            if !claimed.insert(i) {
                return Err(format!(
                    "{arg:?}: expected a counter of the step's own, found one that a step before it has"
                ));
            }
        }
    }
    Ok(())
}

/// Checks that what a step wants packed are weights that have a packed form.
fn check_packed(program: &Program, step: &Step) -> Result<(), String> {
    for arg in step.launch.iter().flat_map(|launch| &launch.args) {
        if let Arg::Packed(i) = *arg {
            let place = step.reads.get(i as usize);
            let place = place.ok_or_else(|| format!("{arg:?}: the step has {} reads", step.reads.len()))?;
            let is_packed = |weight: u32| program.packed.iter().any(|packed| packed.weight == weight);
            if !matches!(place, Ref::Weight(weight) if is_packed(*weight)) {
                return Err(format!("{arg:?}: expected a weight with a packed form, found {place:?}"));
            }
        }
    }
    Ok(())
}

/// Checks that what the last of some steps reads before it waits is there by then.
fn check_early(steps: &[Step]) -> Result<(), String> {
    let Some(step) = steps.last() else { return Ok(()) };
    let early = step.launch.as_ref().map_or(&[][..], |launch| &launch.early);
    if early.is_empty() {
        return Ok(());
    }
    if let Some(i) = early.iter().find(|&&i| i as usize >= step.reads.len()) {
        return Err(format!("`early`: expected one of {} reads, found {i}", step.reads.len()));
    }
    if settled(steps, early) {
        return Ok(());
    }
    Err(format!(
        "`early`: reads {early:?} are read before the kernel waits: expected what no step before writes, or a chain of steps of \
         which the one before releases late and writes none of them"
    ))
}

fn check_shape(launch: &Launch) -> Result<(), String> {
    let [x, y, z] = launch.grid;
    let shape = x >= 1
        && x <= i32::MAX as u32
        && (1..=MAX_GRID_YZ).contains(&y)
        && (1..=MAX_GRID_YZ).contains(&z)
        && (1..=MAX_BLOCK).contains(&launch.block)
        && (1..=MAX_CLUSTER).contains(&launch.cluster)
        && x % launch.cluster == 0
        && launch.shared <= MAX_SHARED;
    let Launch { grid, block, cluster, shared, .. } = launch;
    let found = format!("grid {grid:?}, block {block}, cluster {cluster}, {shared} bytes of shared memory");
    if shape { Ok(()) } else { Err(format!("a launch beyond the device's limits: {found}")) }
}

fn check_arg(arg: Arg, ty: ParamType, semantic: &Semantic) -> Result<(), String> {
    let place = |list: &[crate::plan::TensorType], i: u32| -> Result<DType, String> {
        let found = list.get(i as usize).map(|ty| ty.0);
        found.ok_or_else(|| format!("{arg:?}: the step has {} of them", list.len()))
    };
    let fits = match (arg, ty) {
        (Arg::Read(i), ParamType::In(dtype) | ParamType::Out(dtype)) => place(&semantic.inputs, i)? == dtype,
        (Arg::Write(i), ParamType::Out(dtype)) => place(&semantic.outputs, i)? == dtype,
        (Arg::Map(map), ParamType::Map(dtype)) => {
            let ty = semantic.inputs.get(map.read as usize);
            let ty = ty.ok_or_else(|| format!("{arg:?}: the step has {} reads", semantic.inputs.len()))?;
            check_map(&map, ty)?;
            ty.0 == dtype
        }
        (Arg::Claim(_), ParamType::Out(dtype)) | (Arg::Packed(_), ParamType::In(dtype)) => dtype == DType::I32,
        (Arg::Int(_) | Arg::Early, ParamType::Int)
        | (Arg::Long(_), ParamType::Long)
        | (Arg::Float(_), ParamType::Float) => true,
        _ => false,
    };
    if fits { Ok(()) } else { Err(format!("expected {ty:?}, found {arg:?}")) }
}

/// Checks that a tensor map is one that the copy engine takes, and that it stays inside of its tensor. Buffers are aligned to
/// more than it asks for.
fn check_map(map: &TensorMap, ty: &TensorType) -> Result<(), String> {
    let TensorMap { sizes, strides, tile, swizzle, .. } = *map;
    let element = ty.0.bytes();
    let row = u64::from(tile[0]) * element;
    let rows = sizes.iter().all(|&size| (1..=MAX_MAP_SIZE).contains(&size));
    let steps = strides.iter().all(|&stride| stride.is_multiple_of(MAP_ALIGNMENT) && stride < MAX_MAP_STRIDE);
    let boxes = tile.iter().all(|&size| (1..=MAX_MAP_TILE).contains(&size)) && row.is_multiple_of(MAP_ALIGNMENT);
    let span = swizzle.span().is_none_or(|span| row <= span);
    if !(rows && steps && boxes && span) {
        return Err(format!("{map:?}: the copy engine takes no such map"));
    }
    // All factors are bounded by now: no sum exceeds 2^74.
    let [first, second, third] = sizes.map(u128::from);
    let [row_stride, matrix_stride] = strides.map(u128::from);
    let end = first * u128::from(element) + (second - 1) * row_stride + (third - 1) * matrix_stride;
    match ty.bytes() {
        Some(bytes) if end <= u128::from(bytes) => Ok(()),
        bytes => Err(format!("{map:?}: it ends at byte {end} of a tensor of {}", bytes.unwrap_or(0))),
    }
}
