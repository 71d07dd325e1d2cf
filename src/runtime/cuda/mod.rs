//! The CUDA executor: the plan's pool as one allocation on a device, its steps as one captured graph a bucket, replayed.
//!
//! Tokens stay on the device. At the end of each step the `advance` kernel makes the next step's inputs of the tokens chosen
//! and publishes these in a ring of host memory that the device writes by itself; the host reads them there without waiting for
//! anything else. While the rows of a batch stay the same, nothing is copied to the device.

mod capture;
mod collective;
mod contents;
mod libraries;
mod load;
pub mod measure;
mod offers;
mod peers;
mod program;
mod run;
mod share;

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

pub use self::capture::Captured;
use self::capture::{Lanes, Streams};
pub use self::collective::Road;
use self::collective::{Others, Task};
pub use self::peers::Lines;
use self::program::Kernels;
pub use self::program::{check_device, offset};
use self::run::Flight;
use crate::cuda::{Device, DeviceMemory, Part, Stream};
use crate::plan::{Manifest, PlanFile, Program};
use crate::runtime::forced::ForcedExperts;

/// Whether buckets run as captured graphs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Graphs {
    /// Captured when a bucket is first needed; one that cannot be is run step by step, and that is told.
    #[default]
    Lazy,
    /// Captured, or an error.
    Required,
    /// Step by step.
    Off,
}

/// Runs one rank's program on a device.
pub struct CudaExecutor {
    // Fields are dropped in order: what uses memory before the memory.
    captured: Vec<Option<Captured>>,
    /// None of a plan of one rank.
    others: Option<Others>,
    flight: Option<Flight>,
    streams: Streams,
    kernels: Kernels,
    /// For each bucket its steps.
    tasks: Vec<Vec<Task>>,
    lanes: Vec<Lanes>,
    pool: DeviceMemory,
    device: Arc<Device>,
    manifest: Arc<Manifest>,
    rank: usize,
    graphs: Graphs,
    forced: ForcedExperts,
    /// Device memory that allocating the pool took, as the driver reports it: its granularity rounds up.
    measured: u64,
    announce: Box<dyn Fn(&str)>,
}

impl CudaExecutor {
    /// An executor of a rank's program. Its pool is allocated and cleared; weights come next.
    ///
    /// # Errors
    /// A device that cannot run the plan, or too little memory.
    pub fn new(file: &PlanFile, rank: usize, device: &Arc<Device>, graphs: Graphs) -> Result<CudaExecutor> {
        let manifest = Arc::new(file.manifest.clone());
        check_device(&manifest, Some(device))?;
        let ranks = manifest.ranks.len();
        let program = manifest.ranks.get(rank).with_context(|| format!("no rank {rank} in a plan of {ranks}"))?;
        let planned = program.pool.bytes();
        let (free, total) = device.memory()?;
        ensure!(
            planned <= free,
            "device memory: the plan's pool needs {planned} bytes, found {free} free of {total} on {}; compile with smaller \
             --kv-tokens, --max-sequences or buckets, or free the device",
            device.name
        );
        let kernels = Kernels::load(file, program, device)?;
        let (before, _) = device.memory()?;
        let pool = DeviceMemory::shareable(device, usize::try_from(planned)?)?;
        let (after, _) = device.memory()?;
        let streams = Streams::new(device)?;
        for region in [program.pool.state, program.pool.arena, program.pool.io] {
            pool.fill(region.offset as usize..(region.offset + region.bytes) as usize, 0, streams.main())?;
        }
        streams.main().synchronize()?;
        let tasks = kernels.tasks(program, pool.address(), device)?;
        libraries::warm(&tasks, &pool, streams.main())?;
        let lanes = program.buckets.iter().map(|bucket| Lanes::of(&bucket.steps)).collect();
        let captured = program.buckets.iter().map(|_| None).collect();
        let flight = Flight::new(program, &kernels, &pool, device)?;
        let measured = before.saturating_sub(after);
        Ok(CudaExecutor {
            captured,
            others: None,
            flight,
            streams,
            kernels,
            tasks,
            lanes,
            pool,
            device: Arc::clone(device),
            manifest,
            rank,
            graphs,
            forced: ForcedExperts::default(),
            measured,
            announce: Box::new(|_| ()),
        })
    }

    /// Whether a plan does the same steps over the same pool, by whatever kernels.
    pub fn runs_same_steps(&self, file: &PlanFile) -> bool {
        file.manifest.ranks.get(self.rank).is_some_and(|program| same_but_launches(program, self.program()))
    }

    /// Goes on with another plan's kernels: one of the same steps over the same pool, which keeps its contents but for what steps have
    /// written in the arena. Graphs are to be captured anew.
    ///
    /// # Errors
    /// A plan that differs in more than kernels and launches, or a device that cannot run it.
    pub fn adopt(&mut self, file: &PlanFile) -> Result<()> {
        let manifest = Arc::new(file.manifest.clone());
        check_device(&manifest, Some(&self.device))?;
        let program = manifest.ranks.get(self.rank).with_context(|| format!("no rank {}", self.rank))?;
        ensure!(
            same_but_launches(program, self.program()),
            "kernels of another plan: expected the same steps over the same pool, found others"
        );
        self.streams.main().synchronize()?;
        let kernels = Kernels::load(file, program, &self.device)?;
        let tasks = kernels.tasks(program, self.pool.address(), &self.device)?;
        libraries::warm(&tasks, &self.pool, self.streams.main())?;
        let mut flight = Flight::new(program, &kernels, &self.pool, &self.device)?;
        if let (Some(new), Some(old)) = (&mut flight, &self.flight) {
            new.continue_after(old);
        }
        self.captured.iter_mut().for_each(|captured| *captured = None);
        (self.flight, self.tasks, self.kernels, self.manifest) = (flight, tasks, kernels, manifest);
        Ok(())
    }

    /// Has what a person should know while it runs told to this: that a bucket runs without a graph.
    pub fn on_announcement(&mut self, announce: impl Fn(&str) + 'static) {
        self.announce = Box::new(announce);
    }

    /// The rank's program.
    pub fn program(&self) -> &Program {
        &self.manifest.ranks[self.rank]
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Device> {
        &self.device
    }

    /// The pool.
    pub fn pool(&self) -> &DeviceMemory {
        &self.pool
    }

    /// Kernels loaded.
    pub fn kernels(&self) -> usize {
        self.kernels.len()
    }

    /// The stream that steps run on.
    pub fn stream(&self) -> &Stream {
        self.streams.main()
    }

    /// Queues one step of a bucket, after everything before.
    ///
    /// # Errors
    /// No such step, or the device failed.
    pub fn launch_step(&self, bucket: usize, step: usize) -> Result<()> {
        let steps = self.tasks.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
        match steps.get(step).with_context(|| format!("no step {step} of {}", steps.len()))? {
            Task::Launch(ready) => ready.launch_after_all(self.streams.main()),
            Task::Exchange(kind, parts) => self.exchange(*kind, parts, self.streams.main(), false).map(drop),
            Task::Library(call) => call.queue(&self.pool, self.streams.main()),
        }
    }

    /// Queues all steps of a bucket one by one, without a graph.
    ///
    /// # Errors
    /// No such bucket, or the device failed.
    pub fn launch_steps(&self, bucket: usize) -> Result<()> {
        let steps = self.tasks.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
        self.queue(steps, &self.lanes[bucket])
    }

    fn queue(&self, tasks: &[Task], lanes: &Lanes) -> Result<()> {
        let exchange = |kind, parts: &[Part], stream: &Stream, dependent| self.exchange(kind, parts, stream, dependent);
        self.streams.queue(tasks, lanes, &self.pool, &exchange)
    }

    /// Queues a bucket: its graph, captured if it is not yet, or its steps if graphs are off.
    ///
    /// # Errors
    /// No such bucket, the device failed, or with [`Graphs::Required`] the capture failed.
    pub fn launch(&mut self, bucket: usize) -> Result<()> {
        if self.graphs != Graphs::Off && self.captured.get(bucket).is_some_and(Option::is_none) {
            match self.capture(bucket).map(drop) {
                Ok(()) => {}
                Err(error) if self.graphs == Graphs::Required => return Err(error),
                Err(error) => {
                    let name = &self.program().buckets[bucket].name;
                    (self.announce)(&format!("bucket {name} runs without a graph, step by step: {error:#}"));
                    self.graphs = Graphs::Off;
                }
            }
        }
        match self.captured.get(bucket) {
            Some(Some(captured)) => Ok(captured.graph.launch(self.streams.main())?),
            Some(None) => self.launch_singly(bucket),
            None => bail!("no bucket {bucket}"),
        }
    }

    /// Queues a bucket's steps one by one, and what follows the last.
    fn launch_singly(&self, bucket: usize) -> Result<()> {
        self.launch_steps(bucket)?;
        match &self.flight {
            Some(flight) => flight.advance(bucket)?.launch_after_all(self.streams.main()),
            None => Ok(()),
        }
    }

    /// Captures a bucket, if it is not yet.
    ///
    /// # Errors
    /// No such bucket, or the driver refused.
    pub fn capture(&mut self, bucket: usize) -> Result<&Captured> {
        let steps = self.tasks.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
        if self.captured[bucket].is_none() {
            let name = &self.program().buckets[bucket].name;
            let captured = self.streams.capture(|| {
                self.queue(steps, &self.lanes[bucket])?;
                match &self.flight {
                    Some(flight) => flight.advance(bucket)?.launch(self.streams.main()),
                    None => Ok(()),
                }
            });
            self.captured[bucket] = Some(captured.with_context(|| format!("capturing bucket {name}"))?);
        }
        self.captured[bucket].as_ref().context("captured just now")
    }

    /// Captures the first steps of a bucket by themselves, to be launched with [`CudaExecutor::replay_captured`].
    ///
    /// # Errors
    /// As [`CudaExecutor::capture`].
    pub fn capture_first(&self, bucket: usize, count: usize) -> Result<Captured> {
        let steps = self.tasks.get(bucket).and_then(|steps| steps.get(..count));
        let steps = steps.with_context(|| format!("no {count} steps in bucket {bucket}"))?;
        let lanes = Lanes::of(&self.program().buckets[bucket].steps[..count]);
        self.streams.capture(|| self.queue(steps, &lanes))
    }

    /// Queues what was captured.
    ///
    /// # Errors
    /// The device failed.
    pub fn replay_captured(&self, captured: &Captured) -> Result<()> {
        Ok(captured.graph.launch(self.streams.main())?)
    }

    /// Captures all buckets, the largest first.
    ///
    /// # Errors
    /// As [`CudaExecutor::capture`].
    pub fn capture_all(&mut self) -> Result<()> {
        let mut order: Vec<usize> = (0..self.captured.len()).collect();
        order.sort_by_key(|&bucket| std::cmp::Reverse(self.program().buckets[bucket].tokens));
        order.into_iter().try_for_each(|bucket| self.capture(bucket).map(drop))
    }

    /// What capturing a bucket took, if it is captured.
    pub fn captured(&self, bucket: usize) -> Option<&Captured> {
        self.captured.get(bucket)?.as_ref()
    }

    /// Registers of a thread, static shared memory, local memory, and blocks a multiprocessor holds, of a step's kernel.
    pub fn occupancy(&self, bucket: usize, step: usize) -> Option<(u32, u32, u32, u32)> {
        let ready = self.tasks.get(bucket)?.get(step)?.ready()?;
        let (registers, shared, local) = ready.function.resources();
        let blocks = ready.function.blocks_per_multiprocessor(ready.shape.block, ready.shape.shared);
        Some((registers, shared, local, blocks))
    }
}

/// Whether two programs do the same steps over the same bytes, by whatever kernels and libraries.
fn same_but_launches(a: &Program, b: &Program) -> bool {
    let without = |program: &Program| {
        let mut program = program.clone();
        program.buckets.iter_mut().flat_map(|bucket| &mut bucket.steps).for_each(|step| {
            (step.launch, step.library) = (None, None);
        });
        program
    };
    without(a) == without(b)
}
