//! One step on two devices: the CPU executor starts from what the device read, and what both wrote is compared.

use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::convert::read_f32;
use super::cpu::CpuExecutor;
use super::cuda::{CudaExecutor, offset};
use crate::plan::{DType, Program, Ref, State, Step, TensorType};

/// What a step wrote to one place.
#[derive(Clone, PartialEq, Debug)]
pub struct Written {
    /// Name of the buffer, state or result.
    pub name: String,
    /// Its type.
    pub ty: TensorType,
    /// Relative L2 error of the device against the CPU; of integers, the share of elements that differ. NaN where only the
    /// device gave NaN.
    pub error: f64,
    /// Elements that differ, and the first of them with the CPU's and the device's number.
    pub different: usize,
    /// See `different`.
    pub first: Option<(usize, f64, f64)>,
}

impl Written {
    /// Whether the error is within a bound; integers must be equal.
    pub fn holds(&self, bound: f64) -> bool {
        if self.ty.0 == DType::I32 { self.different == 0 } else { self.error <= bound }
    }
}

/// The bound on the relative L2 error of one step of a plan of this type: a few roundings to that type.
pub fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 2e-3,
        _ => 1.2e-2,
    }
}

/// A step as the CPU ran it: what it read, weights left out, and what it wrote.
pub struct Example {
    reads: Vec<(Range<usize>, Vec<u8>)>,
    outputs: Vec<Place>,
}

/// Something that a step wrote.
struct Place {
    name: String,
    ty: TensorType,
    range: Range<usize>,
    /// Of a state: what was there before.
    before: Option<Vec<u8>>,
    after: Vec<u8>,
}

impl Example {
    /// Runs a step of the executor's program on the CPU, from what its pool holds.
    ///
    /// # Errors
    /// A step that fails.
    pub fn run(program: &Program, cpu: &mut CpuExecutor, bucket: usize, step: usize) -> Result<Example> {
        let found = &program.buckets[bucket].steps[step];
        let semantic = &program.semantics[found.op as usize];
        let reads = inputs(program, bucket, step)?;
        let held = |cpu: &CpuExecutor, range: &Range<usize>| cpu.pool().bytes()[range.clone()].to_vec();
        let reads = reads.into_iter().map(|range| (range.clone(), held(cpu, &range))).collect();
        let mut outputs = vec![];
        for (place, ty) in found.writes.iter().zip(&semantic.outputs) {
            let (range, name) = (range(program, bucket, *place, ty)?, place_name(program, bucket, found, *place));
            outputs.push(Place { name, ty: ty.clone(), range, before: None, after: vec![] });
        }
        for &state in &found.updates {
            let State { name, ty, .. } = &program.states[state as usize];
            let range = range(program, bucket, Ref::State(state), ty)?;
            let before = Some(held(cpu, &range));
            outputs.push(Place { name: name.clone(), ty: ty.clone(), range, before, after: vec![] });
        }
        cpu.run_step(bucket, step)?;
        for place in &mut outputs {
            place.after = held(cpu, &place.range);
        }
        Ok(Example { reads, outputs })
    }

    /// Gives a device what the step reads, and `poison` in place of what it writes.
    ///
    /// # Errors
    /// The device failed.
    pub fn pose(&self, gpu: &CudaExecutor, poison: u8) -> Result<()> {
        for Place { range, .. } in self.outputs.iter().filter(|place| place.before.is_none()) {
            gpu.pool().write(range.start, &vec![poison; range.len()], gpu.stream())?;
        }
        for (range, bytes) in &self.reads {
            gpu.pool().write(range.start, bytes, gpu.stream())?;
        }
        Ok(())
    }

    /// Runs the step on a device that holds what it reads, and compares what it wrote.
    ///
    /// # Errors
    /// The step failed.
    pub fn compare(&self, gpu: &CudaExecutor, bucket: usize, step: usize) -> Result<Vec<Written>> {
        gpu.launch_step(bucket, step)?;
        let name = || format!("step {} on the device", gpu.program().buckets[bucket].steps[step].name);
        gpu.stream().synchronize().with_context(name)?;
        let compared = self.outputs.iter().map(|place| {
            let mut bytes = vec![0; place.range.len()];
            gpu.pool().read(place.range.start, &mut bytes, gpu.stream())?;
            compare(place.name.clone(), &place.ty, &place.after, &bytes, place.before.as_deref())
        });
        compared.collect()
    }
}

/// Runs a step on both and compares what they wrote; the device's results stay. The device's pool must hold what the step
/// reads. The CPU's weights are its own; everything else it gets from the device.
///
/// # Errors
/// A step that fails on one of them.
pub fn compare_step(cpu: &mut CpuExecutor, gpu: &CudaExecutor, bucket: usize, step: usize) -> Result<Vec<Written>> {
    for range in inputs(gpu.program(), bucket, step)? {
        gpu.pool().read(range.start, &mut cpu.pool_mut().bytes_mut()[range], gpu.stream())?;
    }
    Example::run(gpu.program(), cpu, bucket, step)?.compare(gpu, bucket, step)
}

/// Where a step's inputs lie, weights left out.
fn inputs(program: &Program, bucket: usize, step: usize) -> Result<Vec<Range<usize>>> {
    let found = &program.buckets[bucket].steps[step];
    let reads = found.reads.iter().zip(&program.semantics[found.op as usize].inputs);
    let beside_weights = reads.filter(|(place, _)| !matches!(place, Ref::Weight(_)));
    beside_weights.map(|(place, ty)| range(program, bucket, *place, ty)).collect()
}

fn range(program: &Program, bucket: usize, place: Ref, ty: &TensorType) -> Result<Range<usize>> {
    let start = usize::try_from(offset(program, bucket, place)?)?;
    Ok(start..start + usize::try_from(ty.bytes().context("a type that overflows")?)?)
}

fn place_name(program: &Program, bucket: usize, step: &Step, place: Ref) -> String {
    let found = match place {
        Ref::Arena(i) => program.buckets[bucket].buffers.get(i as usize).map(|buffer| buffer.0.clone()),
        Ref::Io(i) => program.io.get(i as usize).map(|io| io.name.clone()),
        Ref::State(i) => program.states.get(i as usize).map(|state| state.name.clone()),
        Ref::Weight(i) => program.weights.get(i as usize).map(|weight| weight.name.clone()),
    };
    found.unwrap_or_else(|| step.name.clone())
}

/// Compares elements; with `before`, those alone that one of the two changed.
pub(super) fn compare(
    name: String,
    ty: &TensorType,
    expected: &[u8],
    found: &[u8],
    before: Option<&[u8]>,
) -> Result<Written> {
    ensure!(expected.len() == found.len(), "{} bytes against {}", expected.len(), found.len());
    let size = ty.0.bytes() as usize;
    let changed = |i: usize| {
        let at = i * size..(i + 1) * size;
        before.is_none_or(|before| before[at.clone()] != expected[at.clone()] || before[at.clone()] != found[at])
    };
    let number = |bytes: &[u8], i: usize| -> f64 {
        let at = &bytes[i * size..(i + 1) * size];
        if ty.0 == DType::I32 {
            return f64::from(i32::from_ne_bytes([at[0], at[1], at[2], at[3]]));
        }
        let mut value = [0.0];
        read_f32(ty.0, at, &mut value);
        f64::from(value[0])
    };
    let (mut distance, mut norm, mut different, mut first, mut count) = (0.0, 0.0, 0, None, 0usize);
    for i in (0..expected.len() / size).filter(|&i| changed(i)) {
        let (a, b) = (number(expected, i), number(found, i));
        count += 1;
        if a == b || (a.is_nan() && b.is_nan()) {
            norm += if a.is_finite() { a * a } else { 0.0 };
            continue;
        }
        different += 1;
        first.get_or_insert((i, a, b));
        distance += (a - b) * (a - b);
        norm += a * a;
    }
    let error = match ty.0 {
        DType::I32 => different as f64 / count.max(1) as f64,
        _ if distance == 0.0 => 0.0,
        _ => (distance / norm).sqrt(),
    };
    Ok(Written { name, ty: ty.clone(), error, different, first })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_ne_bytes()).collect()
    }

    #[test]
    fn errors_are_relative_and_nan_never_holds() {
        let ty = TensorType(DType::F32, vec![3]);
        let compared = |a: &[f32], b: &[f32]| compare("x".into(), &ty, &bytes(a), &bytes(b), None).expect("same size");
        assert_eq!(compared(&[3.0, 4.0, 0.0], &[3.0, 4.0, 0.0]).error, 0.0);
        let found = compared(&[3.0, 4.0, 0.0], &[3.0, 4.0, 0.5]);
        assert!((found.error - 0.1).abs() < 1e-12 && found.first == Some((2, 0.0, 0.5)), "{found:?}");
        assert!(!compared(&[3.0, 4.0, 0.0], &[f32::NAN, 4.0, 0.0]).holds(1e9));
        assert!(!compared(&[0.0; 3], &[0.0, 1e-30, 0.0]).holds(1e9), "anything is infinitely more than nothing");
    }

    #[test]
    fn of_a_state_only_what_changed_counts() {
        let ty = TensorType(DType::F32, vec![3]);
        let (before, cpu, gpu) = (bytes(&[100.0, 1.0, 1.0]), bytes(&[100.0, 2.0, 1.0]), bytes(&[100.0, 3.0, 1.0]));
        let found = compare("s".into(), &ty, &cpu, &gpu, Some(&before)).expect("same size");
        assert_eq!((found.error, found.different), (0.5, 1));
    }
}
