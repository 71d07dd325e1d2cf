//! A plan's machine code on a device: kernels loaded, and for each bucket the launches of its steps with all addresses.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::collective::{Task, exchange};
use super::libraries::Libraries;
use crate::cuda::{Argument, Boxes, Device, Element, Function, LaunchShape, Module, Stream, TensorMap};
use crate::plan::{
    self, Arg, DType, Kernel, Manifest, Param, PlanFile, Program, Promotion, Ref, ServiceRole, StateRole, Step, Target,
};

/// A step, ready to be launched.
#[derive(Clone, Debug)]
pub(super) struct Ready {
    pub(super) function: Function,
    pub(super) shape: LaunchShape,
    pub(super) args: Vec<Argument>,
}

impl Ready {
    pub(super) fn launch(&self, stream: &Stream) -> Result<()> {
        Ok(stream.launch(&self.function, &self.shape, &self.args)?)
    }

    /// The launch after work that it may not overlap with.
    pub(super) fn launch_after_all(&self, stream: &Stream) -> Result<()> {
        let shape = LaunchShape { dependent: false, ..self.shape };
        Ok(stream.launch(&self.function, &shape, &self.args)?)
    }
}

/// Checks that a device can run a plan; without one, that any could.
///
/// # Errors
/// What was expected and what was found.
pub fn check_device(manifest: &Manifest, device: Option<&Device>) -> Result<()> {
    let found = device.map(|device| (device.name.as_str(), device.capability, device.driver));
    check_found(manifest, found)
}

/// A device's name, compute capability and the newest CUDA version of its driver.
type Found<'a> = (&'a str, (u32, u32), (u32, u32));

fn check_found(manifest: &Manifest, device: Option<Found>) -> Result<()> {
    let expected = match manifest.target {
        Target::Cpu => bail!(
            "the plan is for the CPU: expected one for sm_90a; compile it with `lfm2c compile --target sm_90a`, or, where the \
             command has it, use --device cpu"
        ),
        Target::Sm_90a => (9, 0),
    };
    let Some((major, minor)) = manifest.toolkit else {
        bail!(
            "the plan has no machine code: it was lowered without a CUDA compiler; compile it again with `lfm2c compile`"
        );
    };
    let Some((name, capability, driver)) = device else { return Ok(()) };
    ensure!(
        capability == expected,
        "the plan is for compute capability {}.{}: found {name} with {}.{}; run it on such a GPU, or, where the command has it, with --device cpu",
        expected.0,
        expected.1,
        capability.0,
        capability.1
    );
    ensure!(
        driver.0 >= major,
        "the plan's kernels were compiled by CUDA {major}.{minor}: expected a driver for CUDA {major} or later, found one for \
         {}.{}; install a newer driver",
        driver.0,
        driver.1
    );
    Ok(())
}

/// The kernels of a plan on a device.
pub(super) struct Kernels {
    /// By position in the plan; each keeps its machine code loaded.
    functions: HashMap<u32, Function>,
    services: HashMap<ServiceRole, u32>,
}

impl Kernels {
    /// Loads all machine code, and looks up each kernel with the most shared memory that a launch gives it.
    pub(super) fn load(file: &PlanFile, program: &Program, device: &Arc<Device>) -> Result<Kernels> {
        let shared = most_shared(file, program)?;
        let mut functions = HashMap::new();
        for ((i, kernel), &shared) in (0..).zip(&file.manifest.kernels).zip(&shared) {
            functions.insert(i, load_kernel(file, kernel, shared, device)?);
        }
        let services = file.manifest.services.iter().map(|service| (service.0, service.1)).collect();
        Ok(Kernels { functions, services })
    }

    /// The kernels that a device does not load, with what it says.
    pub(super) fn refused(file: &PlanFile, program: &Program, device: &Arc<Device>) -> Result<Vec<(u32, String)>> {
        let shared = most_shared(file, program)?;
        let kernels = file.manifest.kernels.iter().zip(&shared);
        let loaded = kernels.map(|(kernel, &shared)| load_kernel(file, kernel, shared, device));
        Ok((0..).zip(loaded).filter_map(|(i, loaded)| Some((i, format!("{:#}", loaded.err()?)))).collect())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.functions.len()
    }

    /// A service's kernel.
    pub(super) fn service(&self, role: ServiceRole) -> Result<&Function> {
        let found = self.services.get(&role).and_then(|kernel| self.functions.get(kernel));
        found.with_context(|| format!("the plan has no kernel for {role:?}; compile it again with this lfm2c"))
    }

    /// A kernel by its position.
    pub(super) fn function(&self, kernel: u32) -> Result<&Function> {
        self.functions.get(&kernel).with_context(|| format!("no kernel {kernel}"))
    }

    /// What all steps are on the stream, by bucket, over a pool at this address.
    pub(super) fn tasks(&self, program: &Program, pool: u64, device: &Arc<Device>) -> Result<Vec<Vec<Task>>> {
        let mut libraries = Libraries::new(device);
        let mut task = |bucket: usize, step: &Step| match (&step.collective, step.library) {
            (Some(collective), _) => exchange(program, bucket, step, collective),
            (None, Some(call)) => libraries.task(program, bucket, step, call),
            (None, None) => self.ready(program, bucket, step, pool).map(Task::Launch),
        };
        let buckets = program.buckets.iter().enumerate().map(|(i, bucket)| {
            let steps = bucket.steps.iter().map(|step| task(i, step));
            steps.collect::<Result<Vec<_>>>().with_context(|| format!("bucket {}", bucket.name))
        });
        buckets.collect()
    }

    /// A step's launch, over a pool at this address.
    pub(super) fn ready(&self, program: &Program, bucket: usize, step: &Step, pool: u64) -> Result<Ready> {
        let launch = step.launch.as_ref().with_context(|| format!("step {} has no launch", step.name))?;
        let address = |list: &[Ref], i: u32| -> Result<u64> {
            let place = list.get(i as usize).with_context(|| format!("step {} has no operand {i}", step.name))?;
            Ok(pool + offset(program, bucket, *place)?)
        };
        let args = launch.args.iter().map(|arg| match *arg {
            Arg::Read(i) => address(&step.reads, i).map(Argument::Bits),
            Arg::Write(i) => address(&step.writes, i).map(Argument::Bits),
            Arg::Packed(i) => {
                let packed = step.reads.get(i as usize).and_then(|place| {
                    let Ref::Weight(weight) = *place else { return None };
                    program.packed.iter().find(|packed| packed.weight == weight)
                });
                let packed = packed.with_context(|| format!("step {} has no packed weight at {i}", step.name))?;
                Ok(Argument::Bits(pool + program.pool.weights.offset + packed.offset))
            }
            Arg::Claim(i) => {
                let start = offset(program, bucket, state(program, StateRole::Claims)?)?;
                Ok(Argument::Bits(pool + start + u64::from(i) * DType::I32.bytes()))
            }
            Arg::Int(value) => Ok(Argument::Bits(u64::from(value as u32))),
            Arg::Long(value) => Ok(Argument::Bits(value as u64)),
            Arg::Float(value) => Ok(Argument::Bits(u64::from(value.to_bits()))),
            Arg::Map(map) => {
                let semantic = program.semantics.get(step.op as usize);
                let ty = semantic.and_then(|semantic| semantic.inputs.get(map.read as usize));
                let ty = ty.with_context(|| format!("step {} has no operand {}", step.name, map.read))?;
                let boxes = boxes(&map, ty.0, address(&step.reads, map.read)?);
                let made = TensorMap::new(&boxes).with_context(|| format!("step {}", step.name))?;
                Ok(Argument::Map(made))
            }
            Arg::Early => Ok(Argument::Bits(u64::from(!launch.early.is_empty()))),
        });
        let shape = LaunchShape {
            grid: launch.grid,
            block: launch.block,
            cluster: launch.cluster,
            shared: launch.shared,
            dependent: launch.dependent,
        };
        Ok(Ready { function: self.function(launch.kernel)?.clone(), shape, args: args.collect::<Result<_>>()? })
    }
}

/// A type in the device's words.
pub(super) fn element(dtype: DType) -> Element {
    match dtype {
        DType::F32 => Element::F32,
        DType::F16 => Element::F16,
        DType::BF16 => Element::BF16,
        DType::I32 => Element::I32,
    }
}

/// A plan's tensor map in the driver's words, of a tensor at this address.
fn boxes(map: &plan::TensorMap, dtype: DType, address: u64) -> Boxes {
    let element = element(dtype);
    let promotion = match map.promotion {
        Promotion::None => 0,
        Promotion::Bytes64 => 64,
        Promotion::Bytes128 => 128,
        Promotion::Bytes256 => 256,
    };
    let swizzle = map.swizzle.span().unwrap_or(0) as u32;
    Boxes { address, element, sizes: map.sizes, strides: map.strides, tile: map.tile, swizzle, promotion }
}

/// For each kernel the most shared memory that a launch gives it.
fn most_shared(file: &PlanFile, program: &Program) -> Result<Vec<u32>> {
    let mut shared = vec![0; file.manifest.kernels.len()];
    for launch in program.buckets.iter().flat_map(|bucket| &bucket.steps).filter_map(|step| step.launch.as_ref()) {
        let most = shared.get_mut(launch.kernel as usize).context("a launch of no kernel")?;
        *most = launch.shared.max(*most);
    }
    Ok(shared)
}

/// A service's kernel by itself.
pub(super) fn service_of(file: &PlanFile, role: ServiceRole, device: &Arc<Device>) -> Result<Function> {
    let found = file.manifest.services.iter().find(|service| service.0 == role);
    let kernel = found.and_then(|service| file.manifest.kernels.get(service.1 as usize));
    load_kernel(file, kernel.with_context(|| format!("the plan has no kernel for {role:?}"))?, 0, device)
}

fn load_kernel(file: &PlanFile, kernel: &Kernel, shared: u32, device: &Arc<Device>) -> Result<Function> {
    let what = || format!("kernel {} ({})", kernel.name, kernel.config);
    let cubin = kernel.cubin.and_then(|cubin| file.cubins.get(cubin as usize)).with_context(what)?;
    let module = Module::load(device, cubin).with_context(what)?;
    let sizes: Vec<usize> = kernel.params.iter().map(|Param(_, ty)| ty.bytes()).collect();
    module.function(&kernel.name, &sizes, shared).with_context(what)
}

/// The state of a role that one state has.
pub(super) fn state(program: &Program, role: StateRole) -> Result<Ref> {
    let at = program.states.iter().position(|state| state.role == role);
    let what = || format!("the plan has no state for {role:?}; compile it again for this target");
    Ok(Ref::State(at.with_context(what)? as u32))
}

/// Where a place lies in the pool.
pub fn offset(program: &Program, bucket: usize, place: Ref) -> Result<u64> {
    let missing = || format!("{place:?} is not there");
    let pool = &program.pool;
    let found = match place {
        Ref::Arena(i) => {
            let bucket = program.buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
            pool.arena.offset + bucket.buffers.get(i as usize).with_context(missing)?.1
        }
        Ref::Weight(i) => pool.weights.offset + program.weights.get(i as usize).with_context(missing)?.offset,
        Ref::State(i) => pool.state.offset + program.states.get(i as usize).with_context(missing)?.offset,
        Ref::Io(i) => pool.io.offset + program.io.get(i as usize).with_context(missing)?.offset,
    };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::mock;

    #[test]
    fn a_device_that_cannot_run_a_plan_is_told_why() {
        let mut manifest = mock::manifest(1, 1, 1, 1, vec![]);
        let hopper = |driver| Some(("NVIDIA H200", (9, 0), driver));
        let told = |manifest: &Manifest, device| check_found(manifest, device).expect_err("it cannot").to_string();
        assert!(told(&manifest, hopper((13, 0))).contains("the plan is for the CPU"));
        manifest.target = Target::Sm_90a;
        assert!(told(&manifest, None).contains("no machine code"));
        manifest.toolkit = Some((13, 0));
        assert!(check_found(&manifest, None).is_ok() && check_found(&manifest, hopper((13, 1))).is_ok());
        let other = told(&manifest, Some(("NVIDIA A100", (8, 0), (13, 0))));
        assert!(other.contains("9.0: found NVIDIA A100 with 8.0"), "{other}");
        let old = told(&manifest, hopper((12, 8)));
        assert!(old.contains("a driver for CUDA 13 or later, found one for 12.8"), "{old}");
    }
}
