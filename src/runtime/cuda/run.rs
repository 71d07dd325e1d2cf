//! The executor's interface on a device: batches go in, tokens come out of a ring in host memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::CudaExecutor;
use super::collective::Others;
use super::program::{Kernels, Ready, offset, state};
use crate::cuda::{Argument, Device, DeviceMemory, HostMemory, LaunchShape, Stream};
use crate::plan::{
    Bucket, ForcedRouting, Manifest, Phase, Program, Ref, SERVICE_THREADS, STOP_COLUMNS, ServiceRole, State, StateRole,
};
use crate::runtime::executor::{Batch, Executor, PENDING, SamplingParams};
use crate::runtime::group::Group;
use crate::runtime::{batch, io};

/// Steps that may be in flight. Three steps hide what the host does between two; more would only make the end of a sequence
/// known later.
const LOOKAHEAD: usize = 4;
/// Entries of the ring: more than steps in flight, so that none is written before it is read.
const RING_DEPTH: usize = LOOKAHEAD + 2;
/// Pinned memory that small inputs are copied through.
const STAGING_BYTES: usize = 4 << 20;
/// How often the host looks at the ring before it asks whether the device has failed.
const LOOKS: usize = 1 << 14;
/// A step that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a language model's program needs beside its steps.
pub(super) struct Flight {
    ring: HostMemory,
    staging: Staging,
    /// Rows of a ring entry.
    width: usize,
    /// For each bucket, what follows its last step.
    advance: Vec<Ready>,
    /// For each bucket, what fills in tokens.
    feed: Vec<Ready>,
    /// Number of the step enqueued last; the device counts too.
    number: u32,
    /// Steps in flight: number and rows with logits.
    steps: VecDeque<(u32, usize)>,
    /// The batch whose successor the device has prepared, and its bucket.
    prepared: Option<(usize, Batch)>,
    /// The step enqueued last: bucket, rows of the batch, rows with logits.
    last: Option<(usize, usize, usize)>,
}

/// Pinned memory, used from front to back again and again.
struct Staging {
    memory: HostMemory,
    at: usize,
}

impl Staging {
    /// Starts a copy of bytes that may change at once.
    fn write(&mut self, pool: &DeviceMemory, to: u64, bytes: &[u8], stream: &Stream) -> Result<()> {
        let to = usize::try_from(to)?;
        if bytes.len() > self.memory.bytes() {
            return Ok(pool.write(to, bytes, stream)?);
        }
        if self.at + bytes.len() > self.memory.bytes() {
            // Everything that was copied from here has arrived then.
            stream.synchronize()?;
            self.at = 0;
        }
        let range = self.at..self.at + bytes.len();
        self.memory.as_mut_slice()[range.clone()].copy_from_slice(bytes);
        self.at = range.end.next_multiple_of(64);
        Ok(pool.write_from(to, &self.memory, range, stream)?)
    }
}

impl Flight {
    /// None for a graph that is no language model.
    pub(super) fn new(
        program: &Program,
        kernels: &Kernels,
        pool: &DeviceMemory,
        device: &Arc<Device>,
    ) -> Result<Option<Flight>> {
        if program.buckets.iter().all(|bucket| bucket.phase == Phase::Fixed) {
            return Ok(None);
        }
        let width = program.buckets.iter().map(|bucket| bucket.rows).max().unwrap_or(1) as usize;
        let ring = HostMemory::new(device, RING_DEPTH * width * size_of::<u64>())?;
        let address = |place: Ref| -> Result<u64> { Ok(pool.address() + offset(program, 0, place)?) };
        let io = |name: &str| -> Result<u64> {
            let at = program.io.iter().position(|io| io.name == name);
            address(Ref::Io(at.with_context(|| format!("the plan has no `{name}`"))? as u32))
        };
        let state = |role: StateRole| -> Result<u64> { address(state(program, role)?) };
        let (tokens, pos, slot, rows, next) = (io("tokens")?, io("pos")?, io("slot")?, io("rows")?, io("next")?);
        let (last, stops) = (state(StateRole::LastToken)?, state(StateRole::Stops)?);
        let number = state(StateRole::StepCounter)?;
        let shape = |blocks: u64| LaunchShape {
            grid: [u32::try_from(blocks.clamp(1, 64)).unwrap_or(1), 1, 1],
            block: SERVICE_THREADS,
            cluster: 1,
            shared: 0,
            dependent: true,
        };
        let (mut advance, mut feed) = (vec![], vec![]);
        for bucket in &program.buckets {
            let moves = u64::from(bucket.phase == Phase::Decode);
            let ring = [ring.device_address(), number, bucket.rows, moves, RING_DEPTH as u64, width as u64];
            advance.push(Ready {
                function: kernels.service(ServiceRole::Advance)?.clone(),
                shape: shape(1),
                args: [next, tokens, pos, slot, rows, last, stops]
                    .into_iter()
                    .chain(ring)
                    .map(Argument::Bits)
                    .collect(),
            });
            feed.push(Ready {
                function: kernels.service(ServiceRole::Feed)?.clone(),
                shape: shape(bucket.tokens.div_ceil(u64::from(SERVICE_THREADS))),
                args: [tokens, pos, slot, last, bucket.tokens].map(Argument::Bits).to_vec(),
            });
        }
        let staging = Staging { memory: HostMemory::new(device, STAGING_BYTES)?, at: 0 };
        Ok(Some(Flight {
            ring,
            staging,
            width,
            advance,
            feed,
            number: 0,
            steps: VecDeque::with_capacity(LOOKAHEAD),
            prepared: None,
            last: None,
        }))
    }

    /// Counts on from where another left off over the same pool, with no step in flight.
    pub(super) fn continue_after(&mut self, other: &Flight) {
        self.number = other.number;
    }

    /// What follows a bucket's last step.
    pub(super) fn advance(&self, bucket: usize) -> Result<&Ready> {
        self.advance.get(bucket).with_context(|| format!("no bucket {bucket}"))
    }

    /// True if the device has made this batch of the one before it.
    fn is_prepared(&self, bucket: usize, batch: &Batch) -> bool {
        let Some((last_bucket, last)) = &self.prepared else { return false };
        *last_bucket == bucket
            && last.slots == batch.slots
            && last.rows == batch.rows
            && batch.tokens.iter().all(|&token| token == PENDING)
            && last.positions.iter().zip(&batch.positions).all(|(last, next)| last + 1 == *next)
    }

    /// Remembers a decode batch, reusing the memory of the one before.
    fn remember(&mut self, bucket: usize, batch: &Batch, phase: Phase) {
        if phase != Phase::Decode || batch.rows.len() != batch.tokens.len() {
            self.prepared = None;
            return;
        }
        let (at, kept) = self.prepared.get_or_insert_with(Default::default);
        *at = bucket;
        kept.slots.clone_from(&batch.slots);
        kept.rows.clone_from(&batch.rows);
        kept.positions.clone_from(&batch.positions);
    }

    /// Waits for the tokens of a step.
    fn wait(
        &self,
        number: u32,
        rows: usize,
        (stream, others): (&Stream, Option<&Others>),
        tokens: &mut Vec<i32>,
    ) -> Result<()> {
        let entry = number as usize % RING_DEPTH * self.width;
        let started = Instant::now();
        for row in 0..rows {
            let mut looks = 0;
            loop {
                let word = self.ring.load(entry + row);
                if (word >> 32) as u32 == number {
                    tokens.push(word as u32 as i32);
                    break;
                }
                std::hint::spin_loop();
                looks += 1;
                if looks % LOOKS == 0 {
                    let done = stream.is_done().context("the device failed while it ran a step")?;
                    others.map_or(Ok(()), Others::check).context("the ranks failed while they ran a step")?;
                    ensure!(
                        started.elapsed() < PATIENCE && !(done && (self.ring.load(entry + row) >> 32) as u32 != number),
                        "step {number}: expected the token of row {row} in the ring, found none after {:?}",
                        started.elapsed()
                    );
                }
            }
        }
        Ok(())
    }
}

impl CudaExecutor {
    fn flight(&mut self) -> Result<&mut Flight> {
        self.flight.as_mut().context("the plan's graph is no language model")
    }

    /// Writes an i32 input, padded to `len`.
    fn write_padded(&mut self, name: &str, values: &[i32], len: u64, padding: i32) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let range = io::input(program, name)?;
        let mut bytes = vec![0; len as usize * size_of::<i32>()];
        ensure!(bytes.len() <= range.len(), "input `{name}`: {len} values for {} bytes", range.len());
        io::write_padded(&mut bytes, values, len, padding).with_context(|| format!("input `{name}`"))?;
        let to = program.pool.io.offset + range.start as u64;
        let flight = self.flight.as_mut().context("the plan's graph is no language model")?;
        flight.staging.write(&self.pool, to, &bytes, self.streams.main())
    }

    /// Writes the first columns of a slot's row of an i32 table, if the program has one for that role.
    fn write_row(&mut self, role: StateRole, slot: u32, row: &[i32]) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let tables: Vec<&State> = program.states.iter().filter(|state| state.role == role).collect();
        let flight = self.flight.as_mut().context("the plan's graph is no language model")?;
        for state in tables {
            let range = io::table_row(state, slot, row.len())?;
            let to = program.pool.state.offset + range.start as u64;
            flight.staging.write(&self.pool, to, bytemuck::cast_slice(row), self.streams.main())?;
        }
        Ok(())
    }

    fn bucket(&self, bucket: usize) -> Result<&Bucket> {
        self.program().buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))
    }

    /// Queues the copies of a batch's inputs to the device, where a bucket's steps find them.
    ///
    /// # Errors
    /// The batch does not fit the bucket, or the device failed.
    pub fn upload(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        let manifest = Arc::clone(&self.manifest);
        if let Some(flight) = &mut self.flight {
            flight.prepared = None;
        }
        let at = &manifest.ranks[self.rank].buckets[bucket];
        self.write_padded("tokens", &batch.tokens, at.tokens, -1)?;
        self.write_padded("pos", &batch.positions, at.tokens, 0)?;
        self.write_padded("slot", &batch.slots, at.tokens, -1)?;
        self.write_padded("rows", &batch.rows, at.rows, -1)?;
        if let Some(routing) = &manifest.model.forced_routing {
            for (i, &layer) in routing.layers.iter().enumerate() {
                let choices = self.forced.rows(i, routing, batch)?;
                self.write_padded(&ForcedRouting::input(layer), &choices, at.tokens * routing.per_token, -1)?;
            }
        }
        if batch.tokens.contains(&PENDING) {
            let flight = self.flight.as_ref().context("the plan's graph is no language model")?;
            flight.feed[bucket].launch_after_all(self.streams.main())?;
        }
        Ok(())
    }
}

impl Executor for CudaExecutor {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn device(&self) -> String {
        self.gpu().name.clone()
    }

    fn measured_pool_bytes(&self) -> Option<u64> {
        Some(self.measured)
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        self.others.as_mut().map(Others::group)
    }

    fn force_experts(&mut self, slot: i32, choices: Vec<i32>) {
        self.forced.set(slot, choices);
    }

    fn lookahead(&self) -> usize {
        // With forced routing the host says each row's experts.
        if self.manifest.model.forced_routing.is_some() { 1 } else { LOOKAHEAD }
    }

    fn set_pages(&mut self, slot: u32, pages: &[u32]) -> Result<()> {
        let row = io::page_row(&self.manifest.limits, slot, pages)?;
        self.write_row(StateRole::BlockTable, slot, &row)
    }

    fn set_sampling(&mut self, slot: u32, params: SamplingParams) -> Result<()> {
        self.write_row(StateRole::Sampling, slot, &params.to_row())
    }

    fn set_stops(&mut self, slot: u32, eos: &[u32], last_position: u32) -> Result<()> {
        let mut row = [-1; STOP_COLUMNS as usize];
        let (last, tokens) = row.split_last_mut().context("a table without columns")?;
        // Tokens beyond the table's room end a sequence when the host sees them.
        for (stop, &token) in tokens.iter_mut().zip(eos) {
            *stop = i32::try_from(token)?;
        }
        *last = i32::try_from(last_position)?;
        self.write_row(StateRole::Stops, slot, &row)
    }

    fn enqueue(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        let manifest = Arc::clone(&self.manifest);
        let phase = self.bucket(bucket)?.phase;
        batch::check(batch, &manifest.ranks[self.rank].buckets[bucket], &manifest)
            .with_context(|| format!("batch for bucket {}", manifest.ranks[self.rank].buckets[bucket].name))?;
        let flight = self.flight()?;
        ensure!(flight.steps.len() < LOOKAHEAD, "{} steps are in flight already", flight.steps.len());
        flight.last = None;
        if !flight.is_prepared(bucket, batch) || manifest.model.forced_routing.is_some() {
            flight.prepared = None;
            self.upload(bucket, batch)?;
        }
        self.launch(bucket)?;
        let flight = self.flight()?;
        flight.remember(bucket, batch, phase);
        flight.number = flight.number.wrapping_add(1);
        flight.steps.push_back((flight.number, batch.rows.len()));
        flight.last = Some((bucket, batch.tokens.len(), batch.rows.len()));
        Ok(())
    }

    fn collect(&mut self, tokens: &mut Vec<i32>) -> Result<()> {
        let (number, rows) = self.flight()?.steps.pop_front().context("no step is in flight")?;
        let flight = self.flight.as_ref().context("the plan's graph is no language model")?;
        flight.wait(number, rows, (self.streams.main(), self.others.as_ref()), tokens)
    }

    fn discard(&mut self) -> Result<()> {
        let flight = self.flight()?;
        flight.steps.clear();
        flight.prepared = None;
        Ok(self.streams.main().synchronize()?)
    }

    fn run_head(&mut self, bucket: usize, rows: &[i32]) -> Result<()> {
        let (last, tokens, _) = self.flight()?.last.context("nothing has run yet")?;
        let manifest = Arc::clone(&self.manifest);
        let at = manifest.ranks[self.rank].buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
        ensure!(last == bucket, "the head of bucket {}, but another bucket ran last", at.name);
        batch::check_rows(rows, tokens, at).with_context(|| format!("head of bucket {}", at.name))?;
        self.flight()?.prepared = None;
        self.write_padded("rows", rows, at.rows, -1)?;
        (at.head as usize..at.steps.len()).try_for_each(|step| self.launch_step(bucket, step))?;
        self.flight()?.last = Some((bucket, tokens, rows.len()));
        Ok(())
    }

    fn logits(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        let (bucket, _, rows) = self.flight()?.last.context("nothing has run yet")?;
        let (at, ty) = self.output_place(bucket, "logits")?;
        let vocab = ty.1.last().copied().unwrap_or(0) as usize;
        ensure!(ty.0 == crate::plan::DType::F32, "logits of type {:?}", ty.0);
        let start = logits.len();
        logits.resize(start + rows * vocab, 0.0);
        let bytes = bytemuck::cast_slice_mut(&mut logits[start..]);
        Ok(self.pool.read(usize::try_from(at)?, bytes, self.streams.main())?)
    }
}

impl CudaExecutor {
    /// Queues a bucket over the inputs that the device holds, as a graph or step by step. It chooses tokens and moves inputs
    /// as a step does, but nobody collects them: for measurements. No step is in flight.
    ///
    /// # Errors
    /// As [`CudaExecutor::launch`].
    pub fn replay(&mut self, bucket: usize, graph: bool) -> Result<()> {
        if graph {
            self.launch(bucket)?
        } else {
            self.launch_singly(bucket)?
        }
        if let Some(flight) = &mut self.flight {
            // The device counts this step too.
            flight.number = flight.number.wrapping_add(1);
            flight.prepared = None;
            flight.last = None;
        }
        Ok(())
    }
}
