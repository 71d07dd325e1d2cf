//! The CPU executor: interprets each step of a plan over a pool in host memory, at the planned offsets.
//!
//! A step's operators run in order on values that are f32 in memory and rounded to their declared types; weights are read
//! in place, state is updated in place, and outputs are written to the pool when the step is done. A result depends
//! neither on the number of threads nor on which rows share a batch, bit for bit.

mod attention;
mod collective;
mod conv;
mod ensemble;
mod experts;
mod flight;
mod interpret;
mod matmul;
mod norm;
mod parallel;
mod pointwise;
mod poison;
mod pool;
mod sample;
mod select;
mod tensor;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

pub use self::ensemble::CpuEnsemble;
pub use self::pool::{HostPool, Regions};

use self::flight::Flight;
use self::interpret::{Input, Made, interpret};
use self::poison::{Liveness, POISON};
use self::tensor::{View, byte_len};
use crate::plan::{
    Bucket, ExpertCounts, ForcedRouting, Manifest, Program, Ref, State, StateRole, Step, TensorType, scope,
};
use crate::runtime::executor::{Batch, Executor, SamplingParams};
use crate::runtime::forced::ForcedExperts;
use crate::runtime::group::{Group, Mates};
use crate::runtime::{batch, io};

/// Runs one rank's program on the CPU.
pub struct CpuExecutor {
    manifest: Arc<Manifest>,
    rank: usize,
    pool: HostPool,
    /// For each bucket, if everything not live is poisoned before each step.
    poison: Option<Vec<Liveness>>,
    last: Option<LastRun>,
    flight: Flight,
    forced: ForcedExperts,
    counts: ExpertCounts,
    /// The ranks that run collectives together with this one.
    mates: Option<Mates>,
}

/// What the results of the last run belong to.
#[derive(Clone, Copy, Debug)]
struct LastRun {
    bucket: usize,
    /// Rows of the batch.
    tokens: usize,
    /// Rows with logits.
    rows: usize,
}

impl CpuExecutor {
    /// An executor of a rank's program over its pool, whose weights are filled in already.
    ///
    /// # Errors
    /// No such rank, or a pool of another size.
    pub fn new(manifest: Arc<Manifest>, rank: usize, pool: HostPool) -> Result<Self> {
        let ranks = manifest.ranks.len();
        let program = manifest.ranks.get(rank).with_context(|| format!("no rank {rank} in a plan of {ranks}"))?;
        let (found, expected) = (pool.bytes().len() as u64, program.pool.bytes().max(1));
        ensure!(found == expected, "a pool of {found} bytes for a program that needs {expected}");
        let (flight, forced) = (Flight::new(1), ForcedExperts::default());
        let counts = ExpertCounts::new(&manifest.model.config_hash);
        Ok(CpuExecutor { manifest, rank, pool, poison: None, last: None, flight, forced, counts, mates: None })
    }

    /// Lets so many steps be in flight, at least 1, so that the same steps run as on a device of that lookahead. The CPU gains
    /// nothing: each step runs as it is enqueued.
    #[must_use]
    pub fn with_lookahead(mut self, lookahead: usize) -> Self {
        self.flight = Flight::new(lookahead);
        self
    }

    /// With `true`, fills everything not live with NaN: caches, rings and io now, and the arena before each step.
    #[must_use]
    pub fn with_poison(mut self, poison: bool) -> Self {
        self.poison = poison.then(|| self.manifest.ranks[self.rank].buckets.iter().map(Liveness::new).collect());
        if poison {
            let regions = self.pool.split();
            regions.io.fill(POISON);
            for state in &self.manifest.ranks[self.rank].states {
                let range = span(state.offset, state.ty.bytes().unwrap_or(0));
                if state.role != StateRole::BlockTable
                    && let Some(bytes) = regions.state.get_mut(range)
                {
                    bytes.fill(POISON);
                }
            }
        }
        self
    }

    /// The rank's program.
    pub fn program(&self) -> &Program {
        &self.manifest.ranks[self.rank]
    }

    /// The pool.
    pub fn pool(&self) -> &HostPool {
        &self.pool
    }

    /// The pool, for a tool that compares or replaces its contents.
    pub fn pool_mut(&mut self) -> &mut HostPool {
        &mut self.pool
    }

    /// Writes an input of the graph by name.
    ///
    /// # Errors
    /// No such input, or more bytes than it has.
    pub fn set_input(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let range = io::input(&self.manifest.ranks[self.rank], name)?;
        let room = range.len();
        ensure!(bytes.len() <= room, "input `{name}`: {} bytes for a buffer of {room}", bytes.len());
        self.pool.split().io[range][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Runs all steps of a bucket over the inputs as they are.
    ///
    /// # Errors
    /// No such bucket, or a step that fails.
    pub fn run_steps(&mut self, bucket: usize) -> Result<()> {
        let steps = bucket_of(&self.manifest.ranks[self.rank], bucket)?.steps.len();
        (0..steps).try_for_each(|step| self.run_step(bucket, step))
    }

    /// The bytes of a result of a bucket's last run, by its name in the graph.
    ///
    /// # Errors
    /// No such bucket or result.
    pub fn output(&self, bucket: usize, name: &str) -> Result<Vec<u8>> {
        Ok(self.output_bytes(bucket, name)?.0.to_vec())
    }

    /// Runs one step of a bucket.
    ///
    /// # Errors
    /// No such step, or one that reads an index out of range.
    pub fn run_step(&mut self, bucket: usize, step: usize) -> Result<()> {
        let manifest = Arc::clone(&self.manifest);
        let program = &manifest.ranks[self.rank];
        let at = bucket_of(program, bucket)?;
        let count = at.steps.len();
        let found = at.steps.get(step).with_context(|| format!("bucket {} has {count} steps, not {step}", at.name))?;
        self.poison_before(bucket, step);
        let run = match &found.collective {
            Some(collective) => self.run_collective(at, found, collective),
            None => self.execute(program, at, found),
        };
        run.with_context(|| format!("step {} of bucket {}", found.name, at.name))
    }

    /// Writes a batch to the inputs of a bucket.
    fn begin(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        let manifest = Arc::clone(&self.manifest);
        let at = bucket_of(&manifest.ranks[self.rank], bucket)?;
        batch::check(batch, at, &manifest).with_context(|| format!("batch for bucket {}", at.name))?;
        let tokens = self.flight.tokens(batch)?;
        self.last = None;
        self.write_input("tokens", &tokens, at.tokens, -1)?;
        self.write_input("pos", &batch.positions, at.tokens, 0)?;
        self.write_input("slot", &batch.slots, at.tokens, -1)?;
        self.write_input("rows", &batch.rows, at.rows, -1)?;
        if let Some(routing) = &manifest.model.forced_routing {
            for (i, &layer) in routing.layers.iter().enumerate() {
                let choices = self.forced.rows(i, routing, batch)?;
                self.write_input(&ForcedRouting::input(layer), &choices, at.tokens * routing.per_token, -1)?;
            }
        }
        Ok(())
    }

    /// Keeps what a bucket has chosen for a batch, whose steps have run.
    fn finish(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        let rows = batch.rows.len();
        let chosen = if rows > 0 { self.next_tokens(bucket, rows)? } else { vec![] };
        self.flight.push(batch, chosen);
        self.last = Some(LastRun { bucket, tokens: batch.tokens.len(), rows });
        Ok(())
    }

    fn execute(&mut self, program: &Program, bucket: &Bucket, step: &Step) -> Result<()> {
        let semantic = program.semantics.get(step.op as usize).with_context(|| format!("no semantic {}", step.op))?;
        let regions = self.pool.split();
        let inputs = step.reads.iter().zip(&semantic.inputs).map(|(&place, ty)| {
            let (start, len) = (place_of(program, bucket, place)?, byte_len(ty)?);
            let region: &[u8] = match place {
                Ref::State(_) => return Ok(Input::State(start..start + len)),
                Ref::Arena(_) => regions.arena,
                Ref::Weight(_) => regions.weights,
                Ref::Io(_) => regions.io,
            };
            Ok(Input::View(View::new(part(region, start, len, place)?, ty.0)?))
        });
        let Made { outputs, chosen } = interpret(semantic, inputs.collect::<Result<_>>()?, regions.state)?;
        if let Some((chosen, experts)) = chosen {
            self.counts.add(scope(&step.name), experts, &chosen);
        }
        ensure!(outputs.len() == step.writes.len(), "{} places for {} outputs", step.writes.len(), outputs.len());
        for ((value, ty), &place) in outputs.iter().zip(&semantic.outputs).zip(&step.writes) {
            let (start, len) = (place_of(program, bucket, place)?, byte_len(ty)?);
            let region = match place {
                Ref::Arena(_) => &mut *regions.arena,
                Ref::Io(_) => &mut *regions.io,
                Ref::Weight(_) | Ref::State(_) => bail!("a step may not write {place:?} as a result"),
            };
            let room = region.get_mut(start..start.saturating_add(len));
            value.store(ty.0, room.with_context(|| format!("{place:?} leaves its region"))?)?;
        }
        Ok(())
    }

    /// The bytes of a result and its type.
    fn output_bytes(&self, bucket: usize, name: &str) -> Result<(&[u8], &TensorType)> {
        let program = &self.manifest.ranks[self.rank];
        let bucket = bucket_of(program, bucket)?;
        let place = bucket.outputs.iter().find(|(found, _)| found == name).map(|(_, place)| *place);
        let place = place.with_context(|| {
            let names: Vec<&str> = bucket.outputs.iter().map(|(name, _)| name.as_str()).collect();
            format!("bucket {} returns no `{name}`; it returns {names:?}", bucket.name)
        })?;
        let written = bucket.steps.iter().rev().find_map(|step| {
            let at = step.writes.iter().position(|found| *found == place)?;
            program.semantics.get(step.op as usize)?.outputs.get(at)
        });
        let ty = written.with_context(|| format!("no step of bucket {} writes `{name}`", bucket.name))?;
        let region = if matches!(place, Ref::Io(_)) { self.pool.io() } else { self.pool.arena() };
        Ok((part(region, place_of(program, bucket, place)?, byte_len(ty)?, place)?, ty))
    }

    /// Writes i32 to an input, padded to `len`.
    fn write_input(&mut self, name: &str, values: &[i32], len: u64, padding: i32) -> Result<()> {
        let range = io::input(&self.manifest.ranks[self.rank], name)?;
        let poison = self.poison.is_some();
        let buffer = &mut self.pool.split().io[range];
        if poison {
            buffer.fill(POISON);
        }
        io::write_padded(buffer, values, len, padding).with_context(|| format!("input `{name}`"))
    }

    /// Writes the first columns of a slot's row of an i32 table, if the program has one for that role.
    fn write_row(&mut self, role: StateRole, slot: u32, row: &[i32]) -> Result<()> {
        let program = &self.manifest.ranks[self.rank];
        let tables: Vec<&State> = program.states.iter().filter(|state| state.role == role).collect();
        for state in tables {
            let range = io::table_row(state, slot, row.len())?;
            let bytes = self.pool.split();
            let bytes =
                bytes.state.get_mut(range).with_context(|| format!("state `{}` leaves its region", state.name))?;
            bytes.copy_from_slice(bytemuck::cast_slice(row));
        }
        Ok(())
    }

    /// The tokens that a bucket's last run chose for its first rows of logits.
    fn next_tokens(&self, bucket: usize, rows: usize) -> Result<Vec<i32>> {
        let (bytes, ty) = self.output_bytes(bucket, "next")?;
        Ok(View::new(bytes, ty.0)?.part(0, rows)?.i32()?.to_vec())
    }

    fn last(&self) -> Result<LastRun> {
        self.last.context("nothing has run yet")
    }
}

impl Executor for CpuExecutor {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn device(&self) -> String {
        "the CPU".into()
    }

    fn expert_counts(&self) -> Option<ExpertCounts> {
        Some(self.counts.clone())
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        match &mut self.mates {
            Some(mates) => Some(mates.all()),
            None => None,
        }
    }

    fn force_experts(&mut self, slot: i32, choices: Vec<i32>) {
        self.forced.set(slot, choices);
    }

    fn set_pages(&mut self, slot: u32, pages: &[u32]) -> Result<()> {
        let row = io::page_row(&self.manifest.limits, slot, pages)?;
        self.write_row(StateRole::BlockTable, slot, &row)
    }

    fn set_sampling(&mut self, slot: u32, params: SamplingParams) -> Result<()> {
        self.write_row(StateRole::Sampling, slot, &params.to_row())
    }

    fn set_stops(&mut self, slot: u32, _eos: &[u32], _last_position: u32) -> Result<()> {
        let limit = self.manifest.limits.max_sequences;
        ensure!(u64::from(slot) < limit, "slot {slot} of {limit}");
        self.flight.begin(slot);
        Ok(())
    }

    fn lookahead(&self) -> usize {
        self.flight.lookahead()
    }

    fn enqueue(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        self.begin(bucket, batch)?;
        self.run_steps(bucket)?;
        self.finish(bucket, batch)
    }

    fn collect(&mut self, tokens: &mut Vec<i32>) -> Result<()> {
        self.flight.pop(tokens)
    }

    fn discard(&mut self) -> Result<()> {
        self.flight.discard();
        Ok(())
    }

    fn run_head(&mut self, bucket: usize, rows: &[i32]) -> Result<()> {
        let last = self.last()?;
        let manifest = Arc::clone(&self.manifest);
        let at = bucket_of(&manifest.ranks[self.rank], bucket)?;
        ensure!(last.bucket == bucket, "the head of bucket {}, but another bucket ran last", at.name);
        batch::check_rows(rows, last.tokens, at).with_context(|| format!("head of bucket {}", at.name))?;
        self.last = None;
        self.write_input("rows", rows, at.rows, -1)?;
        (at.head as usize..at.steps.len()).try_for_each(|step| self.run_step(bucket, step))?;
        self.last = Some(LastRun { rows: rows.len(), ..last });
        Ok(())
    }

    fn logits(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        let last = self.last()?;
        let (bytes, ty) = self.output_bytes(last.bucket, "logits")?;
        let (_, vocab) = tensor::rows_and_last(ty)?;
        logits.extend_from_slice(&View::new(bytes, ty.0)?.part(0, last.rows * vocab)?.to_f32()?);
        Ok(())
    }
}

fn bucket_of(program: &Program, bucket: usize) -> Result<&Bucket> {
    let count = program.buckets.len();
    program.buckets.get(bucket).with_context(|| format!("no bucket {bucket} in a plan of {count}"))
}

/// Where a place starts in its region.
fn place_of(program: &Program, bucket: &Bucket, place: Ref) -> Result<usize> {
    let offset = match place {
        Ref::Arena(i) => bucket.buffers.get(i as usize).map(|buffer| buffer.1),
        Ref::Weight(i) => program.weights.get(i as usize).map(|weight| weight.offset),
        Ref::State(i) => program.states.get(i as usize).map(|state| state.offset),
        Ref::Io(i) => program.io.get(i as usize).map(|io| io.offset),
    };
    Ok(usize::try_from(offset.with_context(|| format!("{place:?} is not in the plan"))?)?)
}

fn part(region: &[u8], start: usize, len: usize, place: Ref) -> Result<&[u8]> {
    region.get(start..start.saturating_add(len)).with_context(|| format!("{place:?} leaves its region"))
}

/// A range of a region, as the validator found it to be inside.
fn span(offset: u64, bytes: u64) -> Range<usize> {
    offset as usize..offset.saturating_add(bytes) as usize
}
