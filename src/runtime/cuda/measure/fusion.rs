//! One graph as several plans: with every operator a step of its own, fused, and captured.

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::inputs::{Inputs, random_inputs};
use super::timing::{Marks, Times, clocked};
use crate::plan::TensorType;
use crate::runtime::compare;
use crate::runtime::cpu::CpuExecutor;
use crate::runtime::cuda::CudaExecutor;

/// How long one way of running a bucket takes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Variant {
    /// What is different about it.
    pub name: String,
    /// Launches that the host makes.
    pub launches: usize,
    /// Kernels that run.
    pub kernels: usize,
    /// By the host's clock, one run at a time: from the first launch until the device is done.
    pub host: Times,
    /// On the device, one run at a time: from its begin to its end, with what the device waits for the host.
    pub device: Times,
}

/// Times a bucket as a graph or launch by launch, over the same inputs each time.
///
/// # Errors
/// The device failed, or the bucket cannot be captured.
pub fn measure_variant(
    executor: &mut CudaExecutor,
    bucket: usize,
    inputs: &Inputs,
    graph: bool,
    name: &str,
    runs: usize,
) -> Result<Variant> {
    let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    // A language model's step ends with one kernel more.
    let kernels = at.steps.len() + usize::from(executor.flight.is_some());
    if graph {
        executor.capture(bucket)?;
    }
    let mut host = vec![];
    let mut device = vec![];
    for _ in 0..runs {
        // Not timed: brings inputs that a step has moved on back.
        inputs.upload(executor, bucket)?;
        executor.stream().synchronize()?;
        host.push(clocked(|| {
            executor.replay(bucket, graph)?;
            Ok(executor.stream().synchronize()?)
        })?);
        inputs.upload(executor, bucket)?;
        executor.stream().synchronize()?;
        let mut marks = Marks::new(executor.gpu(), 1)?;
        marks.record(executor.stream())?;
        executor.replay(bucket, graph)?;
        marks.record(executor.stream())?;
        device.extend(marks.spans(executor.stream())?);
    }
    let launches = if graph { 1 } else { kernels };
    Ok(Variant { name: name.into(), launches, kernels, host: Times::of(host), device: Times::of(device) })
}

/// A result of a bucket.
#[derive(Clone, PartialEq, Debug)]
pub struct Output {
    /// Its name in the graph.
    pub name: String,
    /// Its type.
    pub ty: TensorType,
    /// Its elements.
    pub bytes: Vec<u8>,
}

/// Runs a bucket launch by launch and reads its results.
///
/// # Errors
/// The device failed.
pub fn device_outputs(executor: &mut CudaExecutor, bucket: usize, inputs: &Inputs) -> Result<Vec<Output>> {
    let at = executor.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let names: Vec<String> = at.outputs.iter().map(|(name, _)| name.clone()).collect();
    inputs.upload(executor, bucket)?;
    executor.launch_steps(bucket)?;
    let read = names.into_iter().map(|name| {
        let ty = executor.output_place(bucket, &name)?.1.clone();
        let bytes = executor.output(bucket, &name)?;
        Ok(Output { name, ty, bytes })
    });
    read.collect()
}

/// Runs a bucket of a graph that is no language model on the CPU, over the same random inputs, for the results that the
/// device gave.
///
/// # Errors
/// A step that fails there.
pub fn cpu_outputs(cpu: &mut CpuExecutor, bucket: usize, seed: u64, like: &[Output]) -> Result<Vec<Output>> {
    for (name, bytes) in random_inputs(cpu.program(), bucket, seed)? {
        cpu.set_input(&name, &bytes)?;
    }
    cpu.run_steps(bucket)?;
    let read = like.iter().map(|output| Ok(Output { bytes: cpu.output(bucket, &output.name)?, ..output.clone() }));
    read.collect()
}

/// How far one result is from another.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Difference {
    /// The result's name.
    pub name: String,
    /// Relative L2 error; of integers, the share of elements that differ.
    pub error: f64,
    /// Elements that differ.
    pub different: usize,
}

/// Compares results with the expected ones, which come in the same order.
///
/// # Errors
/// They are not the same results.
pub fn differences(expected: &[Output], found: &[Output]) -> Result<Vec<Difference>> {
    let names = |list: &[Output]| list.iter().map(|output| output.name.clone()).collect::<Vec<_>>();
    ensure!(names(expected) == names(found), "results {:?} against {:?}", names(expected), names(found));
    let compared = expected.iter().zip(found).map(|(expected, found)| {
        let written = compare::compare(found.name.clone(), &found.ty, &expected.bytes, &found.bytes, None)?;
        Ok(Difference { name: written.name, error: written.error, different: written.different })
    });
    compared.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::DType;

    #[test]
    fn differences_are_relative() {
        let output = |values: &[f32]| Output {
            name: "y".into(),
            ty: TensorType(DType::F32, vec![values.len() as u64]),
            bytes: values.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        };
        let found = differences(&[output(&[3.0, 4.0, 0.0])], &[output(&[3.0, 4.0, 0.5])]).expect("the same results");
        assert!((found[0].error - 0.1).abs() < 1e-12 && found[0].different == 1, "{found:?}");
        assert!(differences(&[], &[output(&[1.0])]).is_err());
    }
}
