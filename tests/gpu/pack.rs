//! Packed forms of weights: what the device makes of rows of every kind is, byte for byte, what the host makes.

use lfm2c::codegen::CompileOptions;
use lfm2c::codegen::select::Pack;
use lfm2c::cuda::Device;
use lfm2c::ir::DType;
use lfm2c::plan::{PlanFile, Program};
use lfm2c::runtime::cuda::{CudaExecutor, Graphs};
use lfm2c::runtime::synthetic::{element, key};
use lfm2c::runtime::weights;
use libtest_mimic::{Failed, Trial};

use crate::models::{SHAPES, fail, plan, small};

pub fn trials() -> Vec<Trial> {
    let trial = |shape: &'static crate::models::Shape| {
        let options = CompileOptions { pack: Pack::All, ..small(&[16], &[1], DType::BF16) };
        Trial::test(format!("pack {}", shape.name), move || check(&plan(shape, &options)))
    };
    SHAPES.iter().filter(|shape| shape.name != "odd").map(trial).collect()
}

fn check(file: &PlanFile) -> Result<(), Failed> {
    let executor = CudaExecutor::new(file, 0, &Device::open(0)?, Graphs::Off).map_err(fail)?;
    let program = executor.program().clone();
    assert!(program.packed.len() > 5, "{} packed forms", program.packed.len());
    let start = program.pool.weights.offset as usize;
    let mut region = vec![0x5a; program.pool.weights.bytes as usize];
    for seed in 0..3 {
        fill(&program, &mut region, seed, 15);
        executor.pool().write(start, &region, executor.stream())?;
        weights::pack(&program, &mut region)?;
        executor.pack().map_err(fail)?;
        let mut found = vec![0; region.len()];
        executor.pool().read(start, &mut found, executor.stream())?;
        if let Some(at) = found.iter().zip(&region).position(|(found, expected)| found != expected) {
            return Err(format!("seed {seed}: {:#x} at {at}, expected {:#x}", found[at], region[at]).into());
        }
    }
    // Some rows have an exception too many: the host says of which weight and how many.
    fill(&program, &mut region, 3, 40);
    executor.pool().write(start, &region, executor.stream())?;
    let expected = weights::pack(&program, &mut region).expect_err("rows do not pack").to_string();
    assert!(expected.contains("rows do not pack") && expected.contains("without --pack"), "{expected}");
    let found = executor.pack().expect_err("rows do not pack").to_string();
    if found == expected { Ok(()) } else { Err(format!("expected `{expected}`, found `{found}`").into()) }
}

/// Makes rows of up to 15 binades from anywhere, with zeros and up to `most` numbers from anywhere else.
fn fill(program: &Program, region: &mut [u8], seed: u64, most: u64) {
    let uniform = lfm2c::plan::Synthetic { salt: 0, center: 0.5, scale: 0.5 };
    let (key, mut count) = (key(seed, 1), 0);
    let mut below = |bound: u64| {
        count += 1;
        (f64::from(element(key, &uniform, count)) * bound as f64) as u64 % bound
    };
    for packed in &program.packed {
        let weight = &program.weights[packed.weight as usize];
        let (rows, columns) = weight.packed_rows().expect("it can be packed");
        let bytes = &mut region[weight.offset as usize..][..(rows * columns * 2) as usize];
        for row in bytes.chunks_mut(columns as usize * 2) {
            let (low, binades) = (below(223), 1 + below(15));
            let mut put = |column: u64, bits: u64| {
                row[column as usize * 2..][..2].copy_from_slice(&(bits as u16).to_le_bytes());
            };
            for column in 0..columns {
                let sign_and_mantissa = below(1 << 16) & 0x807f;
                let exponent = 1 + low + below(binades);
                put(
                    column,
                    if below(20) == 0 { sign_and_mantissa & 0x8000 } else { exponent << 7 | sign_and_mantissa },
                );
            }
            for _ in 0..below(most + 1) {
                put(below(columns), below(1 << 16));
            }
        }
    }
}
