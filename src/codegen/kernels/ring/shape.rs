//! What candidates of `kernels/ring.cu` differ in, and what follows from a product: how its warps multiply.

use crate::codegen::kernels::pattern::{dtype, is_half};
use crate::codegen::kernels::product::{Product, Prologue, Routing};
use crate::codegen::kernels::{Problem, frame};
use crate::plan::{DType, packed};

/// Rows of a weight in a tile.
pub const TILE: u64 = 8;

/// How the work is divided.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shape {
    /// Warps of a block that multiply.
    pub warps: u64,
    /// Slots of the ring, at the most.
    pub slots: u64,
    /// Most bytes of a row of a unit.
    pub bytes: u64,
    /// Blocks on an SM.
    pub per_sm: u64,
    /// Whether rows are copied each by itself, though they are adjacent.
    pub apart: bool,
    /// Whether a block's first unit waits in registers.
    pub held: bool,
    /// Whether blocks claim items beyond their first ones, so that who is faster does more.
    pub claims: bool,
}

const fn shape(warps: u64, slots: u64, bytes: u64, per_sm: u64) -> Shape {
    Shape { warps, slots, bytes, per_sm, apart: false, held: false, claims: false }
}

const fn claiming(shape: Shape) -> Shape {
    Shape { claims: true, ..shape }
}

const fn holding(shape: Shape) -> Shape {
    Shape { held: true, ..shape }
}

impl Shape {
    /// Whether at least nine tenths of the warps' steps over a chunk are within it.
    pub fn even(&self, chunk: u64, span: u64) -> bool {
        let steps = chunk.div_ceil(self.warps * span) * self.warps;
        chunk * 10 >= steps * span * 9
    }

    /// Columns of a unit of rows of this length.
    pub fn chunk(&self, k: u64, engine: Engine) -> u64 {
        k.div_ceil(k.div_ceil(self.bytes / engine.weight)).next_multiple_of(engine.span)
    }
}

/// Best guess first. 4096 bytes of a row are 32 KiB a unit.
const SHAPES: &[Shape] = &[
    shape(8, 2, 4096, 2),
    claiming(shape(8, 2, 4096, 2)),
    claiming(shape(8, 3, 4096, 1)),
    claiming(Shape { apart: true, ..shape(8, 2, 4096, 2) }),
    claiming(shape(8, 4, 2048, 2)),
    claiming(shape(8, 6, 2048, 1)),
    shape(8, 3, 2048, 2),
    shape(8, 2, 2048, 2),
    shape(8, 4, 2048, 2),
    shape(8, 3, 4096, 1),
    shape(8, 2, 4096, 3),
    shape(4, 2, 4096, 2),
    Shape { apart: true, ..shape(8, 2, 4096, 2) },
    shape(4, 3, 2048, 2),
    shape(4, 4, 2048, 2),
    shape(8, 6, 2048, 1),
    shape(8, 2, 2048, 1),
    shape(4, 2, 2048, 2),
    // Three tiles of an item at once.
    shape(8, 3, 4096, 2),
    holding(shape(8, 2, 4096, 2)),
    holding(shape(8, 3, 2048, 2)),
    // Few warps leave room for the next kernel's blocks.
    shape(4, 2, 4096, 3),
    claiming(shape(4, 2, 4096, 3)),
    claiming(shape(8, 2, 4096, 3)),
    shape(5, 2, 4096, 2),
    holding(shape(5, 2, 4096, 2)),
];

/// The same for packed weights: 4096 bytes of a row are 3072 there. Steps are long: eight warps have as much as each other of 2048
/// columns, seven of 1792.
const PACKED_SHAPES: &[Shape] = &[
    shape(8, 2, 4096, 2),
    shape(7, 2, 4096, 2),
    claiming(shape(8, 2, 4096, 2)),
    claiming(shape(7, 2, 4096, 2)),
    claiming(shape(8, 3, 4096, 2)),
    claiming(shape(7, 3, 4096, 2)),
    claiming(Shape { apart: true, ..shape(8, 2, 4096, 2) }),
    claiming(Shape { apart: true, ..shape(8, 3, 4096, 2) }),
    claiming(shape(8, 2, 4096, 3)),
    claiming(Shape { apart: true, ..shape(8, 2, 4096, 3) }),
    claiming(shape(7, 2, 4096, 3)),
    shape(8, 3, 4096, 2),
    shape(7, 3, 4096, 2),
    shape(8, 2, 4096, 3),
    shape(7, 2, 4096, 3),
    shape(8, 4, 4096, 2),
    Shape { apart: true, ..shape(8, 2, 4096, 2) },
    Shape { apart: true, ..shape(7, 2, 4096, 2) },
    claiming(shape(8, 4, 2048, 2)),
    shape(8, 4, 2048, 2),
    shape(7, 4, 2048, 2),
    shape(4, 2, 4096, 3),
    shape(4, 4, 2048, 2),
    holding(shape(8, 2, 4096, 2)),
    holding(shape(7, 2, 4096, 2)),
    holding(claiming(shape(8, 2, 4096, 2))),
    holding(claiming(shape(8, 3, 4096, 2))),
    holding(shape(8, 2, 4096, 3)),
    holding(shape(7, 2, 4096, 3)),
    holding(shape(8, 4, 2048, 2)),
    claiming(shape(4, 2, 4096, 3)),
    holding(shape(4, 2, 4096, 3)),
    holding(claiming(shape(4, 2, 4096, 3))),
    shape(4, 3, 4096, 2),
    shape(5, 2, 4096, 2),
    shape(5, 2, 4096, 3),
    holding(shape(5, 2, 4096, 2)),
    claiming(shape(4, 3, 4096, 3)),
];

/// The same for 16-bit rows by FMA, packed or not.
const HALVES_BY_FMA: &[Shape] = &[
    shape(8, 2, 4096, 2),
    shape(8, 2, 4096, 3),
    holding(shape(8, 2, 4096, 2)),
    holding(shape(8, 2, 4096, 3)),
    shape(4, 2, 4096, 3),
    claiming(shape(4, 2, 4096, 3)),
    holding(claiming(shape(4, 2, 4096, 3))),
    holding(shape(7, 2, 4096, 2)),
    holding(shape(5, 2, 4096, 2)),
];

/// How warps multiply.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Engine {
    /// Whether by FMA in f32, not on tensor cores.
    pub fma: bool,
    /// Whether weights are read in their packed form.
    pub packed: bool,
    /// Bytes of an element of the weight.
    pub weight: u64,
    /// The type that rows of x are staged in.
    pub staged: DType,
    /// Columns of the weight in a step of a warp.
    pub span: u64,
    /// Rows of x at a time.
    pub columns: u64,
}

impl Engine {
    /// Those for a product, if the kernel can run it: tensor cores for 16-bit rows with weights of the same type, and FMA for any; either
    /// with weights of bf16 packed, too.
    pub fn all(problem: &Problem, product: &Product) -> Vec<Engine> {
        let whole = product.n.is_multiple_of(TILE * product.bands())
            && product.block().is_none_or(|block| product.n.is_multiple_of(2 * block));
        if !whole || !frame::holds(product) {
            return vec![];
        }
        let weight = dtype(problem.semantic, product.weight);
        let packs = weight == DType::BF16 && packed::packs(product.k);
        let engines = [Engine::tensor_cores(product, weight), Engine::fma(product, weight)].into_iter().flatten();
        let both = |engine: Engine| {
            let packed = packs.then_some(Engine { packed: true, span: packed::SPAN_COLUMNS, ..engine });
            // Of several rows by FMA, unpacking takes longer than what it saves.
            let later = engine.fma && engine.columns > 2;
            let (first, last) = if later { (Some(engine), packed) } else { (packed, Some(engine)) };
            first.into_iter().chain(last)
        };
        engines.flat_map(both).collect()
    }

    fn tensor_cores(product: &Product, weight: DType) -> Option<Engine> {
        let together = frame::rows_together(product);
        let rows = match product.routing {
            Routing::Dense { rows, .. } | Routing::Pairs { rows, .. } => rows,
            Routing::Grouped { .. } => together,
        };
        let columns = together.next_multiple_of(8);
        let engine = Engine { fma: false, packed: false, weight: 2, staged: weight, span: 32, columns };
        (suits_tensor_cores(product, weight) && rows <= 16).then_some(engine)
    }

    fn fma(product: &Product, weight: DType) -> Option<Engine> {
        let together = frame::rows_together(product);
        let (rows, most) = match product.routing {
            // Of more rows in f32, the reads from shared memory would take longer than the weight from memory.
            Routing::Dense { rows, .. } => (rows, 4),
            Routing::Pairs { rows, .. } => (rows, 16),
            // There are seldom as many as there is room for.
            Routing::Grouped { .. } => (together, 8),
        };
        // Tensor cores take eight rows as fast as one; FMA starts sooner where there is one.
        let worth = !suits_tensor_cores(product, weight) || rows == 1;
        // Sixteen lanes read sixteen bytes each. Sums of all rows are in registers.
        let (bytes, columns) = (weight.bytes(), together.next_power_of_two());
        let engine = Engine { fma: true, packed: false, weight: bytes, staged: DType::F32, span: 256 / bytes, columns };
        (worth && rows <= most).then_some(engine)
    }

    /// The shapes that are worth trying.
    pub fn shapes(&self, product: &Product, weight: DType) -> &'static [Shape] {
        match self {
            Engine { fma: true, .. } if suits_tensor_cores(product, weight) => HALVES_BY_FMA,
            Engine { packed: true, .. } => PACKED_SHAPES,
            _ => SHAPES,
        }
    }

    /// Bytes of so many columns of a row of the weight, without a header.
    pub fn bytes(&self, columns: u64) -> u64 {
        if self.packed { columns / packed::SPAN_COLUMNS * packed::SPAN_BYTES } else { columns * self.weight }
    }

    /// Bytes behind the last column of a row.
    pub fn header(&self) -> u64 {
        if self.packed { packed::HEADER_BYTES } else { 0 }
    }

    /// Bytes from a row of a tile to the next where each is copied by itself: whole lines of the cache, or an odd number of 64 bytes
    /// where lanes read spans of two rows together.
    pub fn line(&self, columns: u64) -> u64 {
        let bytes = self.bytes(columns) + self.header();
        if self.packed { bytes.next_multiple_of(64) | 64 } else { bytes.next_multiple_of(128) }
    }

    /// Elements of shared memory from a row of x to the next: an odd number of 64 bytes where lanes of two rows read together.
    pub fn pitch(&self, k: u64) -> u64 {
        if self.fma { k.next_multiple_of(self.span) } else { k.next_multiple_of(64) + 32 }
    }

    /// Most threads of an SM that multiply, of blocks of this kernel: as many as have registers enough.
    pub fn threads(&self, product: &Product, shape: &Shape) -> u64 {
        // A convolution has more on its way; f32 has its sums, and elements of four rows of the weight.
        let convolves = matches!(product.prologue, Prologue::ShortConv(_));
        match (self.fma, self.columns) {
            (true, 3..) => 512,
            (true, _) => 768,
            _ if shape.held => 768,
            (false, _) if convolves => 768,
            (false, _) => 1024,
        }
    }
}

/// Whether rows and weights are of one 16-bit type.
pub fn suits_tensor_cores(product: &Product, weight: DType) -> bool {
    is_half(weight) && weight == product.rows_dtype
}
