//! Products of f32 on tensor cores, as sums of terms, against f64: no worse than sums of f32 in order, and what is not finite
//! stays what it is.

use half::bf16;
use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::select::F32;
use lfm2c::codegen::{CompileOptions, Source, compile};
use lfm2c::passes::Target;
use lfm2c::plan::Kernel;
use lfm2c::runtime::cuda::{CudaExecutor, Graphs, offset};
use libtest_mimic::{Failed, Trial};

use crate::models::gpu;

const ROWS: usize = 300;
const COLUMNS: usize = 264;
const DEPTHS: [usize; 3] = [200, 2048, 7168];

pub fn trials() -> Vec<Trial> {
    let of_depth = |depth| Trial::test(format!("errors of terms, {depth}"), move || errors(depth));
    let mut trials = Vec::from(DEPTHS.map(of_depth));
    trials.push(Trial::test("terms of what is not finite", not_finite));
    trials
}

/// A product of `depth` columns of x with a weight.
struct Product {
    executor: CudaExecutor,
    depth: usize,
}

impl Product {
    fn new(depth: usize, f32: F32) -> Result<Product, Failed> {
        let text = format!(
            "graph @product (%x: f32[{ROWS},{depth}]) {{\n  weight @w : bf16[{COLUMNS},{depth}]\n  %y = matmul %x, @w : \
             f32[{ROWS},{COLUMNS}]\n  return %y\n}}\n"
        );
        let graph = lfm2c::ir::parse(&text).map_err(|fault| fault.to_string())?.graph;
        let options = CompileOptions { target: Target::Sm90a, f32, ..CompileOptions::default() };
        let file = compile(&Source::Graph("product".into(), Box::new(graph)), &options, &Silent)?.file;
        let names: Vec<String> = file.manifest.kernels.iter().map(Kernel::title).collect();
        let split = names.iter().any(|name| name.starts_with("wgmma terms="));
        if split != (f32 == F32::Split) {
            return Err(format!("expected products by {f32:?}, found {names:?}").into());
        }
        Ok(Product { executor: gpu(&file, Graphs::Off), depth })
    }

    fn run(&self, x: &[f32], w: &[bf16]) -> Result<Vec<f32>, Failed> {
        assert_eq!((x.len(), w.len()), (ROWS * self.depth, COLUMNS * self.depth));
        let (executor, program) = (&self.executor, self.executor.program());
        let step = &program.buckets[0].steps[0];
        let at = |place| offset(program, 0, place).map(|at| at as usize);
        let (pool, stream) = (executor.pool(), executor.stream());
        for (&place, bytes) in step.reads.iter().zip([bytemuck::cast_slice(x), bytemuck::cast_slice(w)]) {
            pool.write(at(place)?, bytes, stream)?;
        }
        executor.launch_step(0, 0)?;
        let mut y = vec![0f32; ROWS * COLUMNS];
        pool.read(at(step.writes[0])?, bytemuck::cast_slice_mut(&mut y), stream)?;
        Ok(y)
    }
}

/// Numbers between -1 and 1, the same every time.
struct Numbers(u64);

impl Numbers {
    fn draw(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// Sums in f64 for every row and column: of the products, and of their sizes.
fn sums(x: &[f32], w: &[bf16], depth: usize) -> Vec<(f64, f64)> {
    let sum = |row: &[f32], column: &[bf16]| {
        let products = row.iter().zip(column).map(|(&x, w)| f64::from(x) * w.to_f64());
        products.fold((0.0, 0.0), |(sum, size): (f64, f64), product| (sum + product, size + product.abs()))
    };
    x.chunks(depth).flat_map(|row| w.chunks(depth).map(move |column| sum(row, column))).collect()
}

/// Relative L2 error.
fn error(exact: &[(f64, f64)], y: &[f32]) -> f64 {
    let wrong: f64 = exact.iter().zip(y).map(|((sum, _), &y)| (f64::from(y) - sum).powi(2)).sum();
    (wrong / exact.iter().map(|(sum, _)| sum.powi(2)).sum::<f64>()).sqrt()
}

fn errors(depth: usize) -> Result<(), Failed> {
    // Of x and of the weight.
    type Make = fn(&mut Numbers) -> f64;
    let kinds: [(&str, Make, Make); 4] = [
        ("of both signs", Numbers::draw, Numbers::draw),
        ("of one sign", |numbers| numbers.draw().abs(), |numbers| numbers.draw().abs()),
        ("of many sizes", |numbers| numbers.draw() * (6.0 * numbers.draw()).exp(), Numbers::draw),
        ("small", |numbers| numbers.draw() * 2f64.powi(-90), Numbers::draw),
    ];
    let (exact, split) = (Product::new(depth, F32::Exact)?, Product::new(depth, F32::Split)?);
    let mut faults = vec![];
    for (name, of_x, of_w) in kinds {
        let mut numbers = Numbers(depth as u64);
        let x: Vec<f32> = (0..ROWS * depth).map(|_| of_x(&mut numbers) as f32).collect();
        let w: Vec<bf16> = (0..COLUMNS * depth).map(|_| bf16::from_f64(of_w(&mut numbers))).collect();
        let truth = sums(&x, &w, depth);
        let (in_order, in_terms) = (error(&truth, &exact.run(&x, &w)?), error(&truth, &split.run(&x, &w)?));
        println!("{depth} numbers {name}: {in_terms:.2e} by terms, {in_order:.2e} in order");
        // Of few numbers both are at a few roundings.
        if in_terms.is_nan() || in_terms > in_order.max(2e-7) {
            faults.push(format!("{name}: {in_terms:e} by terms, {in_order:e} in order"));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n").into()) }
}

fn not_finite() -> Result<(), Failed> {
    let depth = DEPTHS[0];
    let mut numbers = Numbers(1);
    let mut x: Vec<f32> = (0..ROWS * depth).map(|_| numbers.draw() as f32).collect();
    // A number with bits in its lower half alone would become infinite, were it cut off.
    let nan = f32::from_bits(0x7f80_0001);
    let special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, nan, f32::MAX, f32::MIN, f32::MIN_POSITIVE / 8.0];
    for (i, &value) in special.iter().enumerate() {
        x[(3 + 40 * i) * depth + 7 + i] = value;
    }
    let w: Vec<bf16> = (0..COLUMNS * depth).map(|_| bf16::from_f64(0.25 + 0.5 * numbers.draw().abs())).collect();
    let y = Product::new(depth, F32::Split)?.run(&x, &w)?;
    for (i, ((sum, size), &y)) in sums(&x, &w, depth).into_iter().zip(&y).enumerate() {
        let found = f64::from(y);
        let same = match sum.is_finite() {
            true => (found - sum).abs() <= 1e-6 * size,
            false => found == sum || found.is_nan() && sum.is_nan(),
        };
        if !same {
            return Err(format!("row {}: expected {sum:e}, found {found:e}", i / COLUMNS).into());
        }
    }
    Ok(())
}
