//! `kernels/wgmma.cu`: products of many rows by warpgroups, their operands copied by the copy engine.

use super::builder::{Builder, Specialised};
use super::hopper::{ALL_SHARED, MOST_SHARED, PROCESSORS, SYSTEM_SHARED};
use super::pattern::dtype;
use super::tiles::{BAND_ROWS, Form, Product};
use super::{Problem, Twin};
use crate::plan::DType;

/// The twin, for shapes whose rows are all sums of as many terms.
#[derive(Clone, Copy, Debug)]
pub struct Wgmma {
    shapes: &'static [Shape],
}

/// Rows of 16 bits, with a weight of their type.
pub static WHOLE: Wgmma = Wgmma { shapes: &SHAPES };
/// Rows of f32, with a weight of bf16: three terms of bf16 are a number of f32.
pub static SPLIT: Wgmma = Wgmma { shapes: &SPLIT_SHAPES };

/// Bytes of a row in a buffer, which is 64 columns of K.
const ROW_BYTES: u64 = 128;
/// Rows that meet one matrix whose terms are not worth their while: other kernels compute so few in f32 at the speed of memory.
const FEW_ROWS: u64 = 8;
/// Buffers without which copies do not run ahead.
const FEWEST_STAGES: u64 = 3;
const MOST_STAGES: u64 = 8;
/// Rows of x in a box, at the most.
const BOX: u64 = 64;
/// Candidates that are worth a try.
const MOST_CANDIDATES: usize = 12;

/// A way to divide the work: rows of the weight and of x in a tile, multiplying warpgroups, blocks on a multiprocessor, whether
/// other warps finish a tile while the next is multiplied, whether the weight is multiplied from registers, of how many terms a
/// row of x is the sum, and how many blocks of a cluster share a tile's K.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Shape {
    weights: u64,
    rows: u64,
    groups: u64,
    resident: u64,
    apart: bool,
    held: bool,
    terms: u64,
    shares: u64,
}

const fn shape(weights: u64, rows: u64, groups: u64, resident: u64) -> Shape {
    Shape { weights, rows, groups, resident, apart: false, held: false, terms: 1, shares: 1 }
}

const fn apart(weights: u64, rows: u64, groups: u64, resident: u64) -> Shape {
    Shape { apart: true, ..shape(weights, rows, groups, resident) }
}

const fn shared(weights: u64, rows: u64, groups: u64) -> Shape {
    Shape { shares: 2, ..shape(weights, rows, groups, 1) }
}

const fn terms(weights: u64, rows: u64, groups: u64, resident: u64) -> Shape {
    Shape { terms: 3, ..shape(weights, rows, groups, resident) }
}

const fn held(weights: u64, rows: u64, groups: u64, resident: u64) -> Shape {
    Shape { held: true, ..terms(weights, rows, groups, resident) }
}

const SHAPES: [Shape; 27] = [
    shape(256, 192, 2, 1),
    shape(192, 192, 3, 1),
    apart(192, 192, 3, 1),
    shape(192, 128, 3, 1),
    apart(192, 128, 3, 1),
    shape(192, 64, 3, 1),
    shared(192, 128, 3),
    shared(128, 256, 2),
    shared(128, 128, 2),
    shared(128, 64, 2),
    shape(128, 112, 2, 1),
    shape(128, 64, 2, 1),
    shape(128, 256, 2, 1),
    apart(128, 256, 2, 1),
    shape(256, 128, 2, 1),
    apart(256, 128, 2, 1),
    shape(128, 192, 2, 1),
    apart(128, 192, 2, 1),
    shape(128, 128, 2, 1),
    apart(128, 128, 2, 1),
    shape(128, 64, 2, 2),
    shape(128, 32, 2, 2),
    shape(64, 256, 1, 1),
    shape(64, 128, 1, 2),
    shape(64, 64, 1, 2),
    shape(64, 32, 1, 2),
    shape(64, 16, 1, 3),
];

/// Where each sum is in registers twice, and a row three times in a buffer.
const SPLIT_SHAPES: [Shape; 8] = [
    terms(128, 128, 2, 1),
    held(128, 128, 2, 1),
    held(256, 64, 2, 1),
    held(128, 64, 2, 1),
    terms(128, 32, 2, 2),
    terms(64, 64, 1, 2),
    terms(64, 32, 1, 2),
    terms(64, 16, 1, 3),
];

impl Twin for Wgmma {
    fn name(&self) -> &'static str {
        "wgmma"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/wgmma.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(product) = self.matched(problem) else { return vec![] };
        let mut shapes = self.shapes.to_vec();
        shapes.sort_by(|a, b| a.seconds(&product).total_cmp(&b.seconds(&product)));
        let found = shapes.iter().filter_map(|shape| shape.specialise(problem, &product));
        found.take(MOST_CANDIDATES).collect()
    }

    fn exact(&self) -> bool {
        self.terms() == 1
    }
}

impl Wgmma {
    /// Terms of a row.
    fn terms(&self) -> u64 {
        self.shapes[0].terms
    }

    /// The product, if warpgroups can compute it.
    fn matched(&self, problem: &Problem) -> Option<Product> {
        let product = match self.terms() {
            1 => Product::of_tensor_cores(problem.semantic)?,
            _ => Product::of_terms(problem.semantic).filter(|product| rows_together(product) > FEW_ROWS as f64)?,
        };
        // Places in x are counted in chunks of 16 bytes, in 32 bits.
        let counted = product.rows.max(product.experts * product.n).saturating_mul(product.k / 8) < 1 << 31;
        counted.then_some(product)
    }
}

/// Rows of x that meet one matrix, were all equally likely.
fn rows_together(product: &Product) -> f64 {
    match product.form {
        Form::Grouped { .. } => product.rows as f64 / product.experts.min(product.rows).max(1) as f64,
        _ => product.rows as f64,
    }
}

impl Shape {
    /// Steps in the number of rows that a tile computes: each number is a loop of its own in the kernel.
    fn unit(&self) -> u64 {
        if self.rows > 128 { 16 } else { 8 }
    }

    fn threads(&self) -> u64 {
        (self.groups + 1) * 128
    }

    /// Rows of x in a box: whole atoms of eight, and a tile's rows are whole boxes, because what a box copies too much would lie in
    /// the next buffer.
    fn box_rows(&self) -> u64 {
        (8..=BOX).rev().step_by(8).find(|rows| self.rows.is_multiple_of(*rows)).unwrap_or(8)
    }

    fn stage_bytes(&self) -> u64 {
        (self.weights + self.terms * self.rows) * ROW_BYTES
    }

    /// Buffers, as many as there is room for, rows of a piece of results, of elements of so many bytes, and shared memory in
    /// all; none if there is too little.
    fn memory(&self, product: &Product, bytes: u64) -> Option<(u64, u64, u64)> {
        let groups = if matches!(product.form, Form::Grouped { .. }) { product.experts + 1 } else { 1 };
        let most = MOST_SHARED.min(ALL_SHARED / self.resident - SYSTEM_SHARED);
        let stage = self.stage_bytes() + 16;
        let pieces = if self.apart { [self.rows; 2] } else { [(64 / bytes).min(self.rows), 16] };
        let whole = pieces.into_iter().filter(|piece| self.rows.is_multiple_of(*piece));
        let memory = whole.filter_map(|piece| {
            let buffers = if self.apart { 1 } else { 2 };
            let results = self.groups * buffers * piece * (self.weights / self.groups * bytes + 16);
            let sums = if self.shares > 1 { self.weights * self.rows / self.shares * 4 + 16 } else { 0 };
            let fixed = results + sums + 2 * (groups + 1) * 4;
            let stages = (most.checked_sub(fixed)? / stage).min(MOST_STAGES);
            (stages >= FEWEST_STAGES).then_some((stages, piece, stages * stage + fixed))
        });
        memory.max_by_key(|(stages, piece, _)| (*stages, *piece))
    }

    /// Warps that copy, and that finish.
    fn warps(&self, gathers: bool) -> (u64, u64) {
        match (self.apart, gathers || self.terms > 1) {
            (true, true) => (3, 1),
            (true, false) => (1, 3),
            (false, true) => (4, 0),
            (false, false) => (1, 0),
        }
    }

    /// Registers of copying and of multiplying threads, where a multiplying one needs more than there are for each: together no
    /// more than a block begins with.
    fn registers(&self, gathers: bool) -> Option<(u64, u64)> {
        let sums = self.weights / self.groups / 64 * self.rows / 2;
        if self.groups == 3 {
            return (sums > 64).then_some((40, 152));
        }
        match (self.groups, self.resident, sums) {
            // Those who multiply have every sum twice, and the weight if they hold it; those who copy have rows on their way.
            (2, 1, 64..) if self.held => Some(if self.rows > 64 { (136, 184) } else { (104, 200) }),
            _ if self.terms > 1 => None,
            (2, 1, 64..) if self.apart => Some((104, 200)),
            (2, 1, 64..) => Some(if gathers && sums <= 128 { (72, 216) } else { (40, 232) }),
            _ => None,
        }
    }

    fn specialise(&self, problem: &Problem, product: &Product) -> Option<Specialised> {
        let semantic = problem.semantic;
        let made = dtype(semantic, *semantic.body.first()?.2.first()?);
        let (stages, piece, shared) = self.memory(product, made.bytes())?;
        let tiles = product.row_tiles(self.rows) * product.n.div_ceil(self.weights);
        // A tile taller than the weight or the rows, where a lower one does, is work for nothing.
        let wasteful = (self.weights > 64 && self.weights / 2 >= product.n)
            || (self.rows > 16 && self.rows as f64 / 2.0 >= product.rows as f64);
        // Blocks that share a tile have no other: what they send each other has one place.
        let k_tiles = product.k.div_ceil(64);
        let shares = self.shares == 1
            || (product.form == Form::Plain
                && tiles * self.shares <= PROCESSORS
                && k_tiles.is_multiple_of(self.shares)
                && (self.rows / piece).is_multiple_of(self.shares));
        if wasteful || tiles > i32::MAX as u64 || !shares {
            return None;
        }
        let (copiers, finishers) = self.warps(product.gathers());
        let once = rows_together(product) <= self.rows as f64;
        let mut builder = Builder::new(problem);
        let constants = [
            ("K", product.k),
            ("N", product.n),
            ("BM", self.weights),
            ("BN", self.rows),
            ("UNIT", self.unit()),
            ("TERMS", self.terms),
            ("SHARES", self.shares),
            ("BOX", self.box_rows()),
            ("STAGES", stages),
            ("RESIDENT", self.resident),
            ("PIECE", piece),
            ("COPIERS", copiers),
            ("FINISHERS", finishers),
            ("BAND", (BAND_ROWS / self.rows).max(1)),
        ];
        for (name, value) in constants {
            builder.constant(name, value);
        }
        builder.line(format_args!("constexpr bool W_ONCE = {once};"));
        builder.line(format_args!("#define SPLIT {}", u8::from(self.terms > 1)));
        builder.line(format_args!("#define HELD {}", u8::from(self.held)));
        let registers = self.registers(product.gathers());
        builder.line(format_args!("#define MANY_REGISTERS {}", u8::from(registers.is_some())));
        if let Some((copy, multiply)) = registers {
            builder.constant("COPY_REGISTERS", copy).constant("PRODUCT_REGISTERS", multiply);
        }
        builder.alias("P", made);
        for name in ["product", "first_product"].into_iter().take(if self.terms > 1 { 2 } else { 1 }) {
            let weight = weight_parameter(self.held);
            builder.line(format_args!(
                "template <int COUNT> __device__ void {name}(float (&d)[BN / 2], {weight}, u64 x);"
            ));
        }
        for count in (self.unit()..=self.rows).step_by(self.unit() as usize) {
            builder.line(instruction(dtype(semantic, product.w), count, self.held, true));
            if self.terms > 1 {
                builder.line(instruction(dtype(semantic, product.w), count, self.held, false));
            }
        }
        builder.map("w_map", product.w, self.weights as u32);
        match product.gathers() || self.terms > 1 {
            true => builder.alias("X", dtype(semantic, product.x)).pointer("x", product.x),
            false => builder.map("x_map", product.x, self.box_rows() as u32),
        };
        product.declare_rest(&mut builder);
        product.epilogue.declare_vectors(&mut builder);
        let blocks = if self.shares > 1 { tiles * self.shares } else { tiles.min(PROCESSORS * self.resident) };
        builder.cluster(self.shares as u32);
        let apart = if self.apart { " apart" } else { "" };
        let held = if self.held { " held" } else { "" };
        let terms = if self.terms > 1 { format!("terms={} ", self.terms) } else { String::new() };
        let shares = if self.shares > 1 { format!(" shares={}", self.shares) } else { String::new() };
        let (weights, rows, resident) = (self.weights, self.rows, self.resident);
        let config = format!("{terms}tile={weights}x{rows} stages={stages} blocks={resident}{apart}{held}{shares}");
        Some(builder.finish(config, [blocks, 1, 1], self.threads() as u32, shared))
    }

    /// A guess at the time: of arithmetic, of the caches, or of memory, whichever is longest.
    fn seconds(&self, product: &Product) -> f64 {
        let (weights, k) = (self.weights as f64, product.k.next_multiple_of(64) as f64);
        let columns = product.n.div_ceil(self.weights) as f64;
        // Rows that a tile computes, and tiles.
        let together = rows_together(product);
        let groups = (product.rows as f64 / together).max(1.0);
        let parts = (together / self.rows as f64 + if groups > 1.0 { 0.5 } else { 0.0 }).ceil();
        let unit = self.unit() as f64;
        let rows = ((together / parts / unit).ceil() * unit).min(self.rows as f64);
        let tiles = groups * parts * columns;
        let each = (tiles / (PROCESSORS * self.resident) as f64).ceil();
        // 64 columns of K: cycles of the tensor cores, or of shared memory, 128 bytes each, which copies write and every instruction
        // reads 64 rows of the weight and all of x from. With terms, those of each row are stored before a step, and sums are
        // added up after it.
        let products = weights * rows / 32.0;
        let step = match self.terms {
            1 => products.max(2.0 * weights + rows + weights * rows / 64.0) / 1.9e9,
            terms => 128.0 * weights * rows * terms as f64 / 5.3e12 + rows * 3.75e-9 + 6e-8,
        };
        let steps = k / 64.0 / self.shares as f64;
        let arithmetic = each * self.resident as f64 * steps * step / if self.groups == 1 { 0.85 } else { 1.0 };
        let sending = if self.shares > 1 { 2e-6 } else { 0.0 };
        // A copying warp begins the copies of four gathered rows in some 50 cycles, and takes a row apart in some 20.
        let row = if self.terms > 1 { 12e-9 } else { 7.5e-9 };
        let copies = match self.warps(true).0 {
            copiers if product.gathers() || self.terms > 1 => each * k / 64.0 * rows / copiers as f64 * row,
            _ => 0.0,
        };
        let arithmetic = arithmetic.max(copies);
        let x_bytes = if self.terms > 1 { 4.0 } else { 2.0 };
        let cache = tiles * (weights * 2.0 + rows * x_bytes) * k / 1.1e13;
        let memory = groups * product.n as f64 * k * 2.0 / 4.2e12;
        let fill = (tiles * self.shares as f64 / PROCESSORS as f64).min(1.0);
        // What follows the products, beside them if it is left to others but for a block's last tile.
        let more = product.halves() == 2 || product.epilogue.reads();
        let finish = if more { 3e-6 } else { 1.5e-6 } * weights * rows / 32768.0;
        let after = if self.apart { finish + each * 0.7e-6 } else { finish * each };
        arithmetic.max(cache / fill).max(memory / fill) + sending + after + each * 0.5e-6
    }
}

/// How an instruction takes the weight: the operand in shared memory, or what a thread has of it.
fn weight_parameter(held: bool) -> &'static str {
    if held { "const u32 (&w)[4]" } else { "u64 w" }
}

/// The product's instruction for so many rows of x: adds to sums, or sets them.
fn instruction(ty: DType, count: u64, held: bool, adds: bool) -> String {
    let name = if ty == DType::F16 { "f16" } else { "bf16" };
    let (function, bound) = if adds { ("product", "+f") } else { ("first_product", "=f") };
    let sums = count / 2;
    let list = |item: &dyn Fn(u64) -> String| (0..sums).map(item).collect::<Vec<_>>().join(", ");
    let (places, bound) = (list(&|i| format!("%{i}")), list(&|i| format!("\"{bound}\"(d[{i}])")));
    // Of what is in registers the instruction does not ask whether it is transposed.
    let (weight, operands, x, transposed) = match held {
        true => {
            let weight = format!("{{%{sums}, %{}, %{}, %{}}}", sums + 1, sums + 2, sums + 3);
            (weight, r#""r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])"#, sums + 4, "0")
        }
        false => (format!("%{sums}"), r#""l"(w)"#, sums + 1, "0, 0"),
    };
    format!(
        "template <> __device__ __forceinline__ void {function}<{count}>(float (&d)[BN / 2], {}, u64 x) {{\n    asm \
         volatile(\"wgmma.mma_async.sync.aligned.m64n{count}k16.f32.{name}.{name} {{{places}}}, {weight}, %{x}, {}, 1, 1, \
         {transposed};\" : {bound} : {operands}, \"l\"(x));\n}}",
        weight_parameter(held),
        u8::from(adds)
    )
}

#[cfg(test)]
mod tests;
