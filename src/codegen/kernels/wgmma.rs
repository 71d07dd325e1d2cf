//! `kernels/wgmma.cu`: products of many rows by warpgroups, their operands copied by the copy engine.

use super::builder::{Builder, Specialised};
use super::pattern::{dtype, is_half};
use super::tiles::{Form, Product};
use super::{Problem, Twin};
use crate::plan::DType;

/// The twin.
pub struct Wgmma;

const PROCESSORS: u64 = 132;
/// Shared memory of a block, and of all blocks of a multiprocessor, each of which has some more for the system.
const MOST_SHARED: u64 = 232_448;
const ALL_SHARED: u64 = 233_472;
const SYSTEM_SHARED: u64 = 1024;
/// Bytes of a row in a buffer, which is 64 columns of K.
const ROW_BYTES: u64 = 128;
/// Buffers without which copies do not run ahead.
const FEWEST_STAGES: u64 = 3;
const MOST_STAGES: u64 = 8;
/// Rows of x in a box.
const BOX: u64 = 64;
/// Candidates that are worth a try.
const MOST_CANDIDATES: usize = 8;

/// A way to divide the work: rows of the weight and of x in a tile, multiplying warpgroups, blocks on a multiprocessor, and whether
/// other warps finish a tile while the next is multiplied.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Shape {
    weights: u64,
    rows: u64,
    groups: u64,
    resident: u64,
    apart: bool,
}

const fn shape(weights: u64, rows: u64, groups: u64, resident: u64) -> Shape {
    Shape { weights, rows, groups, resident, apart: false }
}

const fn apart(weights: u64, rows: u64, groups: u64, resident: u64) -> Shape {
    Shape { weights, rows, groups, resident, apart: true }
}

const SHAPES: [Shape; 15] = [
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

impl Twin for Wgmma {
    fn name(&self) -> &'static str {
        "wgmma"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/wgmma.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(product) = matched(problem) else { return vec![] };
        let mut shapes = SHAPES;
        shapes.sort_by(|a, b| a.seconds(&product).total_cmp(&b.seconds(&product)));
        shapes.iter().filter_map(|shape| shape.specialise(problem, &product)).take(MOST_CANDIDATES).collect()
    }
}

/// The product, if warpgroups can compute it and the copy engine take its rows: whole chunks of 16 bytes.
fn matched(problem: &Problem) -> Option<Product> {
    let semantic = problem.semantic;
    let product = Product::of(semantic)?;
    let (x, w) = (dtype(semantic, product.x), dtype(semantic, product.w));
    let chunked = product.k > 0 && product.k.is_multiple_of(8) && product.n.is_multiple_of(8 * product.halves());
    let halves = product.epilogue.block.is_none_or(|block| block == 8);
    let tiled = !matches!(product.form, Form::ByPair { .. });
    // Places in x are counted in chunks, in 32 bits.
    let counted = product.rows.max(product.experts * product.n).saturating_mul(product.k / 8) < 1 << 31;
    (is_half(x) && x == w && chunked && halves && tiled && counted).then_some(product)
}

fn gathers(product: &Product) -> bool {
    matches!(product.form, Form::Grouped { gathered: Some(_), .. })
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

    fn stage_bytes(&self) -> u64 {
        (self.weights + self.rows) * ROW_BYTES
    }

    /// Buffers, as many as there is room for, rows of a piece of results, of elements of so many bytes, and shared memory in
    /// all; none if there is too little.
    fn memory(&self, product: &Product, bytes: u64) -> Option<(u64, u64, u64)> {
        let groups = if matches!(product.form, Form::Grouped { .. }) { product.experts + 1 } else { 1 };
        let most = MOST_SHARED.min(ALL_SHARED / self.resident - SYSTEM_SHARED);
        let stage = self.stage_bytes() + 16;
        let pieces = if self.apart { [self.rows; 2] } else { [(64 / bytes).min(self.rows), 16] };
        pieces.into_iter().find_map(|piece| {
            let buffers = if self.apart { 1 } else { 2 };
            let results = self.groups * buffers * piece * (self.weights / self.groups * bytes + 16);
            let fixed = results + 2 * (groups + 1) * 4;
            let stages = (most.checked_sub(fixed)? / stage).min(MOST_STAGES);
            (stages >= FEWEST_STAGES).then_some((stages, piece, stages * stage + fixed))
        })
    }

    /// Warps that copy, and that finish.
    fn warps(&self, gathers: bool) -> (u64, u64) {
        match (self.apart, gathers) {
            (true, true) => (2, 2),
            (true, false) => (1, 3),
            (false, true) => (4, 0),
            (false, false) => (1, 0),
        }
    }

    /// Registers of copying and of multiplying threads, where a multiplying one needs more than there are for each: together no
    /// more than a block begins with.
    fn registers(&self, gathers: bool) -> Option<(u64, u64)> {
        let sums = self.weights / self.groups / 64 * self.rows / 2;
        match (self.groups, self.resident, sums) {
            (2, 1, 64..) if self.apart => Some((104, 200)),
            (2, 1, 64..) => Some(if gathers { (72, 216) } else { (40, 232) }),
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
        if wasteful || tiles > i32::MAX as u64 {
            return None;
        }
        let (copiers, finishers) = self.warps(gathers(product));
        let once = rows_together(product) <= self.rows as f64;
        let mut builder = Builder::new(problem);
        let constants = [
            ("K", product.k),
            ("N", product.n),
            ("BM", self.weights),
            ("BN", self.rows),
            ("UNIT", self.unit()),
            ("BOX", self.rows.min(BOX)),
            ("STAGES", stages),
            ("RESIDENT", self.resident),
            ("PIECE", piece),
            ("COPIERS", copiers),
            ("FINISHERS", finishers),
            ("BAND", (2048 / self.rows).max(1)),
        ];
        for (name, value) in constants {
            builder.constant(name, value);
        }
        builder.line(format_args!("constexpr bool W_ONCE = {once};"));
        let registers = self.registers(gathers(product));
        builder.line(format_args!("#define MANY_REGISTERS {}", u8::from(registers.is_some())));
        if let Some((copy, multiply)) = registers {
            builder.constant("COPY_REGISTERS", copy).constant("PRODUCT_REGISTERS", multiply);
        }
        builder.alias("P", made);
        builder.line("template <int COUNT> __device__ void product(float (&d)[BN / 2], u64 w, u64 x);");
        for count in (self.unit()..=self.rows).step_by(self.unit() as usize) {
            builder.line(instruction(dtype(semantic, product.x), count));
        }
        builder.map("w_map", product.w, self.weights as u32);
        match gathers(product) {
            true => builder.alias("X", dtype(semantic, product.x)).pointer("x", product.x),
            false => builder.map("x_map", product.x, self.rows.min(BOX) as u32),
        };
        product.declare_rest(&mut builder);
        product.epilogue.declare_vectors(&mut builder);
        let blocks = tiles.min(PROCESSORS * self.resident);
        let apart = if self.apart { " apart" } else { "" };
        let config = format!("tile={}x{} stages={stages} blocks={}{apart}", self.weights, self.rows, self.resident);
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
        // An instruction reads the weight's 64 rows and those of x while it multiplies.
        let rate = 5.8e12 * (rows / (rows + 30.0)) * if self.groups == 1 { 0.85 } else { 1.0 };
        let arithmetic = each * self.resident as f64 * 2.0 * weights * rows * k / rate;
        // A copying warp begins the copies of four gathered rows in some 40 cycles.
        let copies = match self.warps(true).0 {
            copiers if gathers(product) => each * k / 64.0 * rows / 4.0 / copiers as f64 * 23e-9,
            _ => 0.0,
        };
        let arithmetic = arithmetic.max(copies);
        let cache = tiles * (weights + rows) * k * 2.0 / 5.5e12;
        let memory = groups * product.n as f64 * k * 2.0 / 4.2e12;
        let fill = (tiles / PROCESSORS as f64).min(1.0);
        // What follows the products, beside them if it is left to others but for a block's last tile.
        let more = product.halves() == 2 || product.epilogue.reads();
        let finish = if more { 3e-6 } else { 1.5e-6 } * weights * rows / 32768.0;
        let after = if self.apart { finish + each * 0.7e-6 } else { finish * each };
        arithmetic.max(cache / fill).max(memory / fill) + after + each * 0.5e-6
    }
}

/// The product's instruction for so many rows of x.
fn instruction(ty: DType, count: u64) -> String {
    let name = if ty == DType::F16 { "f16" } else { "bf16" };
    let sums = count / 2;
    let list = |item: &dyn Fn(u64) -> String| (0..sums).map(item).collect::<Vec<_>>().join(", ");
    let (places, bound) = (list(&|i| format!("%{i}")), list(&|i| format!("\"+f\"(d[{i}])")));
    format!(
        "template <> __device__ __forceinline__ void product<{count}>(float (&d)[BN / 2], u64 w, u64 x) {{\n    asm \
         volatile(\"wgmma.mma_async.sync.aligned.m64n{count}k16.f32.{name}.{name} {{{places}}}, %{sums}, %{}, 1, 1, 1, 0, 0;\" \
         : {bound} : \"l\"(w), \"l\"(x));\n}}",
        sums + 1
    )
}

#[cfg(test)]
mod tests {
    use super::super::tiles::testing::{After, semantic, typed, write};
    use super::*;
    use crate::plan::{Arg, Op, Phase, Semantic, Slot, TensorMap};

    const GATHER: Op = Op::GroupedMatmulGather { k: 4 };

    fn of(semantic: &Semantic) -> Vec<Specialised> {
        Wgmma.candidates(&Problem { semantic, phase: Phase::Prefill })
    }

    #[test]
    fn products_of_one_16_bit_type_match_in_each_form_with_each_epilogue() {
        for op in [Op::Matmul, GATHER, Op::GroupedMatmul] {
            for ty in [DType::BF16, DType::F16] {
                for after in [After::Nothing, After::Residual, After::Swiglu(Some(8))] {
                    let (few, many) =
                        (semantic(op.clone(), ty, 3, 8, 16, after), semantic(op.clone(), ty, 2048, 64, 512, after));
                    assert!(!of(&few).is_empty(), "{op:?} {ty:?} {after:?}");
                    assert_eq!(of(&many).len(), MOST_CANDIDATES, "{op:?} {ty:?} {after:?}");
                }
            }
        }
        assert!(!of(&typed(Op::Matmul, [DType::BF16, DType::BF16, DType::F32], 3, 8, 8, After::Nothing)).is_empty());
    }

    #[test]
    fn other_types_sizes_and_wires_do_not_match() {
        let bf16 = |k, n, after| semantic(Op::Matmul, DType::BF16, 24, k, n, after);
        let mut swapped = bf16(64, 64, After::Swiglu(Some(8)));
        swapped.body[1].1 = vec![Slot::Temp(1)];
        let mut gathered = semantic(GATHER, DType::BF16, 24, 64, 48, After::Nothing);
        gathered.body[0].1.swap(2, 3);
        let none = [
            semantic(Op::Matmul, DType::F32, 24, 64, 48, After::Nothing),
            typed(Op::Matmul, [DType::BF16, DType::F16, DType::BF16], 24, 64, 48, After::Nothing),
            semantic(Op::ExpertMatmul, DType::BF16, 24, 64, 48, After::Nothing),
            bf16(60, 48, After::Nothing),
            bf16(64, 44, After::Nothing),
            bf16(64, 64, After::Swiglu(Some(16))),
            bf16(64, 64, After::Swiglu(None)),
            swapped,
            gathered,
        ];
        none.iter().for_each(|semantic| assert_eq!(of(semantic), [], "{semantic:?}"));
    }

    #[test]
    fn rows_do_not_occur_in_the_text_so_that_buckets_share_a_kernel() {
        for op in [Op::Matmul, GATHER] {
            let texts = |rows| {
                let found = of(&semantic(op.clone(), DType::BF16, rows, 2048, 3584, After::Swiglu(Some(8))));
                found.into_iter().map(|found| (found.config.clone(), found.prelude())).collect::<Vec<_>>()
            };
            let (some, more) = (texts(8192), texts(6000));
            assert!(some.iter().any(|text| more.contains(text)), "{op:?}");
        }
    }

    #[test]
    fn maps_are_of_the_weight_and_of_rows_that_are_not_gathered() {
        let maps = |op: Op| -> Vec<TensorMap> {
            let found = of(&semantic(op, DType::BF16, 300, 264, 48, After::Nothing)).remove(0);
            let args = found.launch.args.into_iter();
            args.filter_map(|arg| if let Arg::Map(map) = arg { Some(map) } else { None }).collect()
        };
        let grouped = maps(Op::GroupedMatmul);
        assert_eq!(grouped.iter().map(|map| map.read).collect::<Vec<_>>(), [1, 0]);
        assert_eq!((grouped[0].sizes, grouped[0].strides), ([264, 48, 5], [528, 528 * 48]));
        assert_eq!((grouped[1].sizes, grouped[1].strides), ([264, 300, 1], [528, 528 * 300]));
        assert_eq!(maps(GATHER).iter().map(|map| map.read).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn blocks_on_a_multiprocessor_have_room_and_large_products_large_tiles() {
        for after in [After::Nothing, After::Residual, After::Swiglu(Some(8))] {
            for (ty, y) in [(DType::BF16, DType::BF16), (DType::F16, DType::F32)] {
                let semantic = typed(Op::Matmul, [ty, ty, y], 8192, 2048, 6144, after);
                let problem = Problem { semantic: &semantic, phase: Phase::Prefill };
                let product = matched(&problem).expect("a product");
                for shape in SHAPES {
                    let Some((stages, piece, shared)) = shape.memory(&product, y.bytes()) else {
                        assert!(y == DType::F32 && shape.apart, "{shape:?}");
                        continue;
                    };
                    assert!((shared + SYSTEM_SHARED) * shape.resident <= ALL_SHARED && shared <= MOST_SHARED);
                    assert!(stages >= FEWEST_STAGES && shape.rows % piece == 0 && piece % 16 == 0);
                    let first = 65_536 / (shape.threads() * shape.resident) / 8 * 8;
                    for (copy, multiply) in [true, false].into_iter().filter_map(|gathers| shape.registers(gathers)) {
                        assert!((copy + multiply * shape.groups) * 128 <= first * shape.threads(), "{shape:?}");
                    }
                }
                let first = of(&semantic).remove(0);
                assert!(first.config.starts_with("tile=128x256") || first.config.starts_with("tile=256x128"));
            }
        }
    }

    /// A kernel's text, with its launch at the end.
    fn write_all(name: &str, text: String, found: &Specialised) {
        write(name, &format!("{text}// {} {:?}\n", found.config, found.launch));
    }

    /// With `KERNELS_OUT=folder cargo test --lib codegen::kernels::wgmma::tests::texts`, writes kernels to compile.
    #[test]
    fn texts() {
        let cases = [
            (Op::Matmul, 8192, 2048, 6144, After::Nothing, DType::BF16),
            (Op::Matmul, 100, 2048, 2048, After::Residual, DType::F16),
            (Op::Matmul, 16, 264, 72, After::Nothing, DType::BF16),
            (GATHER, 2048, 2048, 3584, After::Swiglu(Some(8)), DType::BF16),
            (Op::GroupedMatmul, 8192, 1792, 2048, After::Residual, DType::BF16),
            (Op::Matmul, 150, 200, 272, After::Swiglu(Some(8)), DType::F16),
            (GATHER, 37, 200, 272, After::Swiglu(Some(8)), DType::BF16),
        ];
        let mut cases: Vec<_> = cases.map(|(op, rows, k, n, after, ty)| semantic(op, ty, rows, k, n, after)).into();
        let types = [DType::BF16, DType::BF16, DType::F32];
        cases.push(typed(Op::Matmul, types, 512, 2048, 2048, After::Nothing));
        cases.push(typed(Op::Matmul, types, 512, 2048, 2048, After::Residual));
        for (case, semantic) in cases.iter().enumerate() {
            let problem = Problem { semantic, phase: Phase::Prefill };
            let product = matched(&problem).expect("a product");
            for (i, shape) in SHAPES.iter().enumerate() {
                let Some(found) = shape.specialise(&problem, &product) else { continue };
                write_all(&format!("wgmma.{case}.{i}"), format!("{}\n{}", found.prelude(), Wgmma.source()), &found);
            }
        }
    }

    /// The same, of products as a large model has them, beside those of `tile`: to measure.
    #[test]
    fn texts_to_measure() {
        let experts = 32;
        let of_model = |op: Op, rows: u64, k, n, after| {
            let mut semantic = semantic(op, DType::BF16, rows, k, n, after);
            if let [_, w, rest @ ..] = &mut semantic.inputs[..]
                && w.1.len() == 3
            {
                w.1[0] = experts;
                rest.iter_mut().filter(|ty| ty.1 == [6]).for_each(|ty| ty.1 = vec![experts + 1]);
            }
            semantic
        };
        let rows = [64, 128, 256, 512, 2048, 8192];
        for (kind, op, each, k, n, after) in [
            ("up", GATHER, 1, 2048, 3584, After::Swiglu(Some(8))),
            ("down", Op::GroupedMatmul, 4, 1792, 2048, After::Nothing),
            ("in", Op::Matmul, 1, 2048, 6144, After::Nothing),
            ("out", Op::Matmul, 1, 2048, 2048, After::Residual),
            ("ffn", Op::Matmul, 1, 2048, 14336, After::Swiglu(Some(8))),
            ("back", Op::Matmul, 1, 7168, 2048, After::Residual),
        ] {
            for rows in rows {
                let semantic = of_model(op.clone(), rows * each, k, n, after);
                let problem = Problem { semantic: &semantic, phase: Phase::Prefill };
                let twins: [&dyn Twin; 2] = [&Wgmma, &super::super::tile::Tile];
                for (twin, most) in twins.into_iter().zip([8, 2]) {
                    for (i, found) in twin.candidates(&problem).into_iter().take(most).enumerate() {
                        let text = format!("{}\n{}", found.prelude(), twin.source());
                        write_all(&format!("measure.{kind}.{rows}.{}.{i}", twin.name()), text, &found);
                    }
                }
            }
        }
    }
}
