//! Weights onto a GPU: the whole region is, byte for byte, what loading on the CPU writes.

#[path = "../common/checkpoint.rs"]
mod checkpoint;

use std::cell::RefCell;

use lfm2c::codegen::CompileOptions;
use lfm2c::codegen::select::Pack;
use lfm2c::cuda::Device;
use lfm2c::ir::DType;
use lfm2c::passes::Target;
use lfm2c::plan::{ALIGNMENT, PlanFile, WeightSource};
use lfm2c::runtime::cuda::{CudaExecutor, Graphs};
use lfm2c::runtime::weights::{self, Checkpoint, Origin};
use libtest_mimic::{Failed, Trial};

use self::checkpoint::{SEED, Stored, items, plan, write};
use crate::models::{SHAPES, fail, recipe, small};

/// Bytes of the arena: too few for a staging area, of which kernels read pinned memory; a staging area for pieces that end within
/// runs; one for all that goes at a time.
const ARENAS: [u64; 4] = [ALIGNMENT, 4096, (1 << 20) + ALIGNMENT, 40 << 20];

/// A byte that stays where no weight lies.
const UNTOUCHED: u8 = 0x5a;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    for shape in SHAPES {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for stored in [Stored::Bf16, Stored::F32, Stored::Mixed] {
                let options = CompileOptions { target: Target::Sm90a, pack: Pack::All, ..small(&[16], &[1], dtype) };
                let run = move || check(plan(recipe(shape), stored, &options), stored);
                trials.push(Trial::test(format!("load {} {dtype} from {stored:?}", shape.name), run));
            }
        }
    }
    trials
}

fn check(file: PlanFile, stored: Stored) -> Result<(), Failed> {
    let manifest = &file.manifest;
    let program = &manifest.ranks[0];
    let directory = tempfile::tempdir()?;
    let tensors: Vec<_> = manifest.tensors.iter().flat_map(items).collect();
    write(&directory.path().join("model.safetensors"), &tensors);
    drop(tensors);
    let checkpoint = Checkpoint::open(directory.path())?;
    let mut expected = vec![UNTOUCHED; program.pool.weights.bytes as usize];
    weights::load(manifest, program, &checkpoint, &mut expected, &|_| ())?;
    weights::pack(program, &mut expected)?;

    for arena in ARENAS {
        let file = with_arena(&file, arena);
        same(&file, Origin::Checkpoint(&checkpoint), &expected, &format!("checkpoint, arena of {arena}"))?;
    }
    no_room(&file)?;
    // The numbers of a checkpoint of two types were rounded by the narrower one.
    if stored != Stored::Mixed {
        same(&file, Origin::Synthetic(SEED), &expected, "made on the device")?;
        let mut given = with_arena(&file, ARENAS[2]);
        given.manifest.model.weights = WeightSource::Checkpoint;
        same(&given, Origin::Synthetic(SEED), &expected, "made on the host")?;
    }
    Ok(())
}

/// Packing needs room for its counters.
fn no_room(file: &PlanFile) -> Result<(), Failed> {
    let mut executor = CudaExecutor::new(&with_arena(file, 0), 0, &Device::open(0)?, Graphs::Off).map_err(fail)?;
    let packs = !file.manifest.ranks[0].packed.is_empty();
    match executor.load(Origin::Synthetic(SEED), &|_| ()) {
        Ok(()) if !packs => Ok(()),
        Err(error) if packs && error.to_string().contains("for counters") => Ok(()),
        other => Err(format!("no arena, packed: {packs}, found {other:?}").into()),
    }
}

/// The plan with another arena, for loading alone.
fn with_arena(file: &PlanFile, bytes: u64) -> PlanFile {
    let mut file = file.clone();
    let pool = &mut file.manifest.ranks[0].pool;
    pool.arena.bytes = bytes;
    pool.io.offset = (pool.arena.offset + bytes).next_multiple_of(ALIGNMENT);
    file
}

/// Loads, and compares the region and the progress.
fn same(file: &PlanFile, origin: Origin, expected: &[u8], what: &str) -> Result<(), Failed> {
    let device = Device::open(0)?;
    let mut executor = CudaExecutor::new(file, 0, &device, Graphs::Off).map_err(fail)?;
    let program = executor.program().clone();
    let start = program.pool.weights.offset as usize;
    executor.pool().fill(start..start + expected.len(), UNTOUCHED, executor.stream())?;
    let told = RefCell::new(vec![0]);
    executor.load(origin, &|bytes| told.borrow_mut().push(bytes)).map_err(fail)?;
    let told = told.into_inner();
    if !told.is_sorted() || told.last() != Some(&weights::total_bytes(&program)) {
        return Err(format!("{what}: progress of {told:?}").into());
    }
    let mut found = vec![0; expected.len()];
    executor.pool().read(start, &mut found, executor.stream())?;
    let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) else { return Ok(()) };
    let weight = program.weights.iter().filter(|weight| weight.offset <= at as u64).max_by_key(|weight| weight.offset);
    let place = weight.map_or_else(String::new, |weight| format!("{} + {}", weight.name, at as u64 - weight.offset));
    let count = found.iter().zip(expected).filter(|(found, expected)| found != expected).count();
    Err(format!("{what}: {count} of {} bytes differ, the first at {at}, {place}", expected.len()).into())
}
