//! The Rust side of `kernels/include/stream.cuh`: divides products of few rows among blocks and warps.
//!
//! A product of T rows with a weight of N x K elements moves N K elements of the weight and 2 T N K flops: up to 64 rows of
//! 16-bit elements that is at most 64 flops a byte, an order below what an H200 needs to be limited by arithmetic. Weights are
//! read once from memory. What else a block loads are its rows of x, from the L2 cache: T K / SPLIT elements for each
//! run of stripes, to be few beside the STRIPE K / SPLIT elements of each stripe; hence stripes are taller, and K is split
//! among the blocks of a cluster, where there are many rows and few stripes.

use super::Problem;
use super::builder::{Builder, Specialised};
use super::hopper::PROCESSORS;
use super::product::{Product, Prologue, Routing};
use crate::plan::DType;

/// Most rows of x.
const MOST_ROWS: u64 = 64;

/// Most pairs of a row and an expert, for which lists have room.
const MOST_PAIRS: u64 = 512;

/// Shared memory with which two blocks fit on an SM, be they of this kernel or of the next.
const SHARED_BY_TWO: u64 = 110 << 10;

/// Most shared memory of a block.
const MOST_SHARED: u64 = 200 << 10;

/// How warps multiply.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Engine {
    /// Columns of the weight in a step of a warp.
    pub span: u64,
    /// Rows of the weight in a step of a warp.
    pub rows: u64,
    /// The type that rows of x are staged in.
    pub staged: DType,
}

/// How the work is divided.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shape {
    /// Warps along the rows of a stripe.
    pub row_groups: u64,
    /// Warps along K, at the most.
    pub k_groups: u64,
    /// Steps that a warp loads ahead, at the most.
    pub depth: u64,
    /// Blocks along K.
    pub split: u64,
    /// Blocks on an SM.
    pub per_sm: u64,
    /// Rows of x at a time.
    pub columns: u64,
}

/// Whether the frame has room for the lists and sizes of a product.
pub fn holds(product: &Product) -> bool {
    let rows = match product.routing {
        Routing::Dense { rows, .. } => rows,
        Routing::Pairs { rows, k, .. } if rows * k <= MOST_PAIRS => rows,
        Routing::Grouped { pairs, gather: Some((_, k)), .. } if pairs <= MOST_PAIRS && k > 0 => pairs / k,
        Routing::Grouped { pairs, gather: None, .. } if pairs <= MOST_PAIRS => 1,
        _ => return false,
    };
    (1..=MOST_ROWS).contains(&rows) && product.k.is_multiple_of(8)
}

/// Whether the frame can run a product: with room for it, and with but one band.
pub fn runs(product: &Product) -> bool {
    product.bands() == 1 && holds(product)
}

/// Rows of x that meet one matrix, were all matrices equally likely: so many that there are seldom more.
pub fn rows_together(product: &Product) -> u64 {
    match product.routing {
        Routing::Dense { rows, .. } => rows,
        Routing::Pairs { .. } => 1,
        Routing::Grouped { pairs, experts, .. } => {
            let mean = pairs as f64 / experts.max(1) as f64;
            ((mean + 2.8 * mean.sqrt()).ceil() as u64).clamp(1, pairs)
        }
    }
}

/// The product in the shapes that fit, those first of which two blocks fit on an SM, each once.
pub fn specialise_all(problem: &Problem, product: &Product, engine: Engine, shapes: &[Shape]) -> Vec<Specialised> {
    let mut found: Vec<Specialised> = vec![];
    for shape in shapes {
        if let Some(specialised) = specialise(problem, product, engine, *shape)
            && found.iter().all(|known| known.config != specialised.config)
        {
            found.push(specialised);
        }
    }
    found.sort_by_key(|specialised| u64::from(specialised.launch.shared) > SHARED_BY_TWO);
    found
}

fn specialise(problem: &Problem, product: &Product, engine: Engine, shape: Shape) -> Option<Specialised> {
    let Shape { row_groups, split, per_sm, columns, .. } = shape;
    let (n, k) = (product.n, product.k);
    let stripe = row_groups * engine.rows;
    let block = product.block();
    if !n.is_multiple_of(stripe) || block.is_some_and(|block| !stripe.is_multiple_of(2 * block)) {
        return None;
    }
    // Warps beyond the spans that there are would have nothing to do.
    let k_groups = shape.k_groups.min(k.div_ceil(engine.span * split).next_power_of_two());
    let steps = k.div_ceil(engine.span * split * k_groups);
    let depth = (1..=shape.depth.min(steps)).rev().min_by_key(|depth| steps.next_multiple_of(*depth))?;
    let batches = steps.div_ceil(depth);
    let part = k_groups * batches * depth * engine.span;
    let warps = row_groups * k_groups;

    let list = List::of(product, columns);
    let (pitch, bytes) = match engine.staged {
        DType::F32 => (part, 4),
        _ => (part.next_multiple_of(64) + 32, 2),
    };
    let width = if matches!(product.routing, Routing::Pairs { .. }) { 1 } else { columns };
    let partial = list.subs * k_groups * width * (stripe + 4) * 4;
    let shared = list.room * 16 + partial + list.staged_rows * pitch * bytes;
    let blocks = shape.runs(list.groups * (n / stripe))? * split;
    if shared > MOST_SHARED || list.groups * (n / stripe) > i32::MAX as u64 {
        return None;
    }

    let mut builder = Builder::new(problem);
    product.declare(&mut builder);
    builder.alias("S", engine.staged);
    let constants = [
        ("STRIPE", stripe),
        ("COLUMNS", columns),
        ("WIDTH", width),
        ("ROW_GROUPS", row_groups),
        ("K_GROUPS", k_groups),
        ("DEPTH", depth),
        ("BATCHES", batches),
        ("SPLIT", split),
        ("PART", part),
        ("PITCH", pitch),
        ("ROUTED", u64::from(!matches!(product.routing, Routing::Dense { .. }))),
        ("SUBS", list.subs),
        ("STAGED_SUBS", list.staged_subs),
        ("SHARING", list.sharing),
        ("WEIGHTED", u64::from(matches!(product.routing, Routing::Pairs { weighted: Some(_), .. }))),
        ("BLOCK", block.unwrap_or(1)),
        ("GROUP_ROOM", list.room),
        ("ROW_WARPS", if matches!(product.prologue, Prologue::Norm { .. }) { row_warps(warps, &list) } else { 1 }),
        ("RESIDENT", if shared <= SHARED_BY_TWO { 2 } else { 1 }),
    ];
    for (name, value) in constants {
        builder.constant(name, value);
    }
    builder.constant("early", 0);
    let mut config = format!("rows={stripe} split={split} depth={depth} blocks={per_sm}");
    if matches!(product.routing, Routing::Grouped { .. }) {
        config += &format!(" columns={columns}");
    }
    builder.cluster(u32::try_from(split).ok()?);
    Some(builder.finish(config, [blocks, 1, 1], u32::try_from(warps * 32).ok()?, shared))
}

impl Shape {
    /// Runs among which so many items are divided: as few as take no longer.
    fn runs(&self, items: u64) -> Option<u64> {
        let most = (PROCESSORS * self.per_sm / self.split).min(items);
        (most > 0).then(|| items.div_ceil(items.div_ceil(most)))
    }
}

/// Warps that norm one row: all of them if there is but one.
pub fn row_warps(warps: u64, list: &List) -> u64 {
    (warps / list.staged_rows.next_power_of_two()).max(1)
}

/// Sizes of the list of groups.
pub struct List {
    /// Most groups.
    pub groups: u64,
    /// Entries of a group.
    pub subs: u64,
    /// Entries that there is room for, however many rows there are.
    pub room: u64,
    /// Rows of x staged for each row of a group.
    pub staged_subs: u64,
    /// Most rows staged.
    pub staged_rows: u64,
    /// Adjacent groups with the same rows of x.
    pub sharing: u64,
}

impl List {
    /// The list of a product, with so many rows of x at a time.
    pub fn of(product: &Product, columns: u64) -> List {
        let one = List { groups: 1, subs: 1, room: 1, staged_subs: 1, staged_rows: 1, sharing: 1 };
        match product.routing {
            Routing::Dense { rows, .. } => List {
                groups: rows.div_ceil(columns),
                room: MOST_ROWS.div_ceil(columns),
                staged_rows: rows.min(columns),
                ..one
            },
            Routing::Pairs { rows, k, row_a_pair, weighted: Some(_), .. } => {
                let staged = if row_a_pair { k } else { 1 };
                let room = MOST_PAIRS.min(MOST_ROWS * k);
                List { groups: rows, subs: k, room, staged_subs: staged, staged_rows: staged, ..one }
            }
            Routing::Pairs { rows, k, row_a_pair, .. } => {
                let sharing = if row_a_pair { 1 } else { k };
                List { groups: rows * k, room: MOST_PAIRS.min(MOST_ROWS * k), sharing, ..one }
            }
            Routing::Grouped { pairs, experts, .. } => List {
                groups: (pairs / columns + experts).min(pairs),
                room: experts + MOST_PAIRS / columns,
                staged_rows: pairs.min(columns),
                ..one
            },
        }
    }
}
