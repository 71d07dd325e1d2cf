//! What `bench` and `profile` share: the device and its ceilings first, then the plan.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use crate::cli::load::{self, has_extension};
use crate::cli::usage;
use crate::codegen::CompileOptions;
use crate::cuda;
use crate::plan::{Manifest, PlanFile};
use crate::runtime::SamplingParams;
use crate::runtime::cuda::check_device;
use crate::runtime::cuda::measure::{Ceilings, Distinct, Machine, Options, measure_machine};

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub struct Measuring {
    /// Positions that each sequence of a decode bucket has behind it; fewer where the plan has no room
    #[arg(long, value_name = "N", default_value_t = 256)]
    context: usize,
    /// Rows of each prompt of a prefill bucket, which packs them; the last may be shorter [default: as many as go]
    #[arg(long, value_name = "ROWS")]
    prompt: Option<usize>,
    /// Decode steps that are timed; of prefill a tenth of it, and at least 10
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: usize,
    /// Divides the logits that decode steps choose their tokens from; 0 always takes the most likely
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    temperature: f32,
    /// Of random tokens and inputs
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Operations that the device can do in a second, in 10^12: floors are then those of memory or of this, whichever is longer
    #[arg(long, value_name = "X")]
    peak_tflops: Option<f64>,
}

impl Measuring {
    /// As options of the measurements.
    pub fn options(&self) -> Result<Options> {
        let &Measuring { context, prompt, steps, temperature, seed, peak_tflops } = self;
        if steps == 0 {
            return usage("--steps: expected at least 1, found 0");
        }
        if prompt == Some(0) {
            return usage("--prompt: expected at least 1 row, found 0");
        }
        if !(temperature.is_finite() && temperature >= 0.0) {
            return usage(format!("--temperature: expected a number of at least 0, found {temperature}"));
        }
        if let Some(peak) = peak_tflops
            && !(peak.is_finite() && peak > 0.0)
        {
            return usage(format!("--peak-tflops: expected a number above 0, found {peak}"));
        }
        Ok(Options { context, prompt, steps, temperature, seed, ..Options::default() })
    }

    /// Seed of random tokens, and how tokens are chosen.
    pub fn sampling(&self) -> (u64, SamplingParams) {
        (self.seed, SamplingParams { temperature: self.temperature, ..SamplingParams::default() })
    }

    /// The ceilings of a device, and of its arithmetic what the command line says.
    pub fn ceilings(&self, machine: &Machine) -> Ceilings {
        let flops_per_second = self.peak_tflops.map(|peak| peak * 1e12);
        Ceilings { bytes_per_second: machine.bytes_per_second, flops_per_second }
    }
}

/// A plan, and the device that it is to be measured on.
pub struct Opened {
    /// The plan.
    pub file: PlanFile,
    /// What the device can do.
    pub machine: Machine,
    /// Keeps the device open.
    pub _device: Arc<cuda::Device>,
}

/// True if a path names what is to be compiled.
pub fn is_source(path: &Path) -> bool {
    has_extension(path, "ron") || has_extension(path, "ir")
}

/// The first GPU and its ceilings.
pub fn machine() -> Result<(Arc<cuda::Device>, Machine)> {
    let device = cuda::Device::open(0)?;
    let machine = measure_machine(&device)?;
    Ok((device, machine))
}

/// Reads or compiles a plan and measures the device; a plan that no GPU could run is refused first, and one of other ranks than are measured.
pub fn open(
    path: &Path,
    model: Option<&Path>,
    options: &CompileOptions,
    ranks: fn(&Manifest) -> Result<()>,
) -> Result<Opened> {
    let read = if is_source(path) { None } else { Some(load::plan(path, model, options)?) };
    if let Some(file) = &read {
        ranks(&file.manifest)?;
        check_device(&file.manifest, None)?;
    }
    let (device, machine) = machine()?;
    let file = match read {
        Some(file) => file,
        None => load::plan(path, model, options)?,
    };
    ranks(&file.manifest)?;
    Ok(Opened { file, machine, _device: device })
}

/// What stands above tables: the device, whose steps they are, and what floors are made of.
pub fn heading(machine: &Machine, manifest: &Manifest, ceilings: &Ceilings) -> String {
    machine_line(machine) + &rank_line(manifest) + &floor_line(ceilings) + "\n"
}

/// The device in a line.
pub fn machine_line(machine: &Machine) -> String {
    format!(
        "{}: driver for CUDA {}, {} multiprocessors at up to {} MHz, memory at up to {} MHz\n\
         copy on the device: {:.2} TB/s read and written, median of {} times {:.2} GiB\n",
        machine.device,
        machine.driver,
        machine.multiprocessors,
        machine.clock_mhz,
        machine.memory_clock_mhz,
        machine.bytes_per_second / 1e12,
        machine.copy.runs,
        machine.copy_bytes as f64 / f64::from(1 << 30),
    )
}

/// Whose steps they are, in a line; nothing of a plan of one rank.
fn rank_line(manifest: &Manifest) -> String {
    match manifest.ranks.len() {
        0 | 1 => String::new(),
        ranks => format!(
            "rank 0 of {ranks} by itself: what it sends comes back in the others' place, so others' rows are its own again\n"
        ),
    }
}

/// What a floor is made of, in a line.
fn floor_line(ceilings: &Ceilings) -> String {
    let bytes =
        "floor: the plan's bytes, with the distinct experts and positions of these inputs, over the copy's bandwidth";
    match ceilings.flops_per_second {
        None => format!("{bytes}; of memory alone (--peak-tflops X adds arithmetic)\n"),
        Some(peak) => format!("{bytes}; or its operations over {} TFLOP/s, if that is longer\n", peak / 1e12),
    }
}

/// Heading of the column of floors.
pub fn floor_heading(ceilings: &Ceilings, unit: &str) -> String {
    let what = if ceilings.flops_per_second.is_some() { "floor" } else { "memory floor" };
    format!("{what}, {unit}")
}

/// Distinct experts of a layer: mean, fewest, and what uniform routing gives.
pub fn experts_cell(experts: Option<&Distinct>) -> String {
    experts.map_or_else(String::new, |found| format!("{:.1} ({}, {:.1})", found.mean, found.least, found.uniform))
}

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
