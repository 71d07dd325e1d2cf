//! `kernels/ring.cu`: products of few 16-bit rows with 16-bit weights, which bulk copies bring through a ring in shared memory.
//!
//! What `stream` does with loads into registers, for up to sixteen rows. Copies need neither registers nor warps while they are
//! on their way, so blocks are small enough that those of the next kernel find room beside them and begin their copies. A
//! tile has but eight rows: 256 blocks divide most sizes of models evenly.

use super::builder::{Builder, Specialised};
use super::frame::{self, List, SMS};
use super::pattern::{dtype, is_half};
use super::product::{Product, Prologue, Routing};
use super::{Problem, Twin};

/// The twin.
pub struct Ring;

/// Claimed items that a block remembers.
const CLAIMED: u64 = 16;

/// Rows of a weight in a tile.
const TILE: u64 = 8;

/// Columns of a weight in a step of a warp.
const SPAN: u64 = 32;

/// Most rows of x.
const MOST_COLUMNS: u64 = 16;

/// Shared memory of an SM, and what each block takes of it beside its own.
const SHARED_OF_SM: u64 = 228 << 10;
const SHARED_BESIDE: u64 = 3 << 9;

/// Most threads of an SM, of blocks of this kernel: with 64 registers each.
const THREADS_OF_SM: u64 = 1024;

impl Twin for Ring {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/ring.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(product) = Product::of(problem).filter(|product| fits(problem, product)) else { return vec![] };
        // Shapes that give each warp as much as the others, if there are any.
        let mut found: Vec<(bool, Specialised)> = vec![];
        for shape in SHAPES {
            if let Some(specialised) = specialise(problem, &product, shape)
                && found.iter().all(|(_, known)| known.config != specialised.config)
            {
                found.push((shape.chunk(product.k).is_multiple_of(shape.warps * SPAN), specialised));
            }
        }
        let some_even = found.iter().any(|(even, _)| *even);
        found.retain(|(even, _)| *even || !some_even);
        found.into_iter().map(|(_, specialised)| specialised).collect()
    }
}

/// How the work is divided.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Shape {
    /// Warps of a block that multiply.
    warps: u64,
    /// Slots of the ring, at the most.
    slots: u64,
    /// Most columns of a unit.
    columns: u64,
    /// Blocks on an SM.
    per_sm: u64,
    /// Whether rows are copied each by itself, though they are adjacent.
    apart: bool,
    /// Whether blocks claim items beyond their first ones, so that who is faster does more.
    claims: bool,
}

const fn shape(warps: u64, slots: u64, columns: u64, per_sm: u64) -> Shape {
    Shape { warps, slots, columns, per_sm, apart: false, claims: false }
}

const fn claiming(shape: Shape) -> Shape {
    Shape { claims: true, ..shape }
}

impl Shape {
    /// Columns of a unit of rows of this length.
    fn chunk(&self, k: u64) -> u64 {
        k.div_ceil(k.div_ceil(self.columns)).next_multiple_of(SPAN)
    }
}

/// Best guess first. 2048 columns are 32 KiB a unit.
const SHAPES: &[Shape] = &[
    shape(8, 2, 2048, 2),
    claiming(shape(8, 2, 2048, 2)),
    claiming(shape(8, 3, 2048, 1)),
    claiming(Shape { apart: true, ..shape(8, 2, 2048, 2) }),
    claiming(shape(8, 4, 1024, 2)),
    claiming(shape(8, 6, 1024, 1)),
    shape(8, 3, 1024, 2),
    shape(8, 2, 1024, 2),
    shape(8, 4, 1024, 2),
    shape(8, 3, 2048, 1),
    shape(8, 2, 2048, 3),
    shape(4, 2, 2048, 2),
    Shape { apart: true, ..shape(8, 2, 2048, 2) },
    shape(4, 3, 1024, 2),
    shape(4, 4, 1024, 2),
    shape(8, 6, 1024, 1),
    shape(8, 2, 1024, 1),
    shape(4, 2, 1024, 2),
    // Three tiles of an item at once.
    shape(8, 3, 2048, 2),
];

/// Whether the kernel can run a product.
fn fits(problem: &Problem, product: &Product) -> bool {
    let weight = dtype(problem.semantic, product.weight);
    let whole = product.n.is_multiple_of(TILE * product.bands())
        && product.block().is_none_or(|block| product.n.is_multiple_of(2 * block));
    let rows = match product.routing {
        Routing::Dense { rows, .. } | Routing::Pairs { rows, .. } => rows,
        Routing::Grouped { .. } => frame::rows_together(product),
    };
    let types = is_half(weight) && weight == product.rows_dtype;
    types && whole && frame::holds(product) && rows <= MOST_COLUMNS
}

fn specialise(problem: &Problem, product: &Product, shape: &Shape) -> Option<Specialised> {
    let (n, k) = (product.n, product.k);
    let columns = frame::rows_together(product).next_multiple_of(8);
    let list = List::of(product, columns);
    let block = product.block();

    let chunk = shape.chunk(k);
    let chunks = k.div_ceil(chunk);
    let run = match block {
        _ if chunk != k => 1,
        None => TILE,
        Some(block) if block % (TILE / 2) == 0 => TILE / 2,
        Some(_) => 1,
    };
    // Copies of whole lines of the cache.
    let line = if run > 1 { 2 * k } else { (2 * chunk).next_multiple_of(128) };
    if shape.apart && run == 1 {
        return None;
    }
    let run = if shape.apart { 1 } else { run };

    let products = list.subs * product.bands();
    let items = list.groups * (n / (TILE * product.bands()));
    let most_blocks = (SMS * shape.per_sm).min(items);
    let rounds = items.div_ceil(most_blocks);
    let units = products * chunks;
    let slots = shape.slots.min(rounds * units);
    // Who claims has the first slots' items for sure, and all items the same rows.
    let own = slots.div_ceil(units);
    let blocks = if shape.claims { most_blocks.min(items / (own + 1)) } else { items.div_ceil(rounds) };
    if shape.claims && (slots < 2 || blocks < SMS.min(items) || list.groups > list.sharing) {
        return None;
    }
    let pairs = matches!(product.routing, Routing::Pairs { .. });
    // One row has a kernel of its own, more rows share one.
    let width = if pairs || frame::rows_together(product) == 1 { 1 } else { columns };
    let sums = products * shape.warps * width * TILE;
    let room = list.room.min((list.groups * list.subs).next_multiple_of(32));
    let pitch = k.next_multiple_of(64) + 32;
    let beside = (slots * TILE * line + room * 16 + sums * 8 + slots * 16 + CLAIMED * 4).next_multiple_of(16);
    let with_rows = |rows| beside + rows * pitch * 2;
    let shared = with_rows(list.staged_rows);
    if shape.per_sm * (shared + SHARED_BESIDE) > SHARED_OF_SM || items * units > i32::MAX as u64 {
        return None;
    }
    let most_rows = if list.staged_rows == 1 || pairs { list.staged_rows } else { columns };
    // One more fills slots. The convolution has more on its way.
    let block_warps = shape.warps + 1;
    let multiplying = if matches!(product.prologue, Prologue::ShortConv(_)) { 768 } else { THREADS_OF_SM };
    let resident = (SHARED_OF_SM / (with_rows(most_rows) + SHARED_BESIDE)).clamp(1, multiplying / (shape.warps * 32));

    let norm = matches!(product.prologue, Prologue::Norm { .. });
    let mut builder = Builder::new(problem);
    product.declare(&mut builder);
    builder.alias("S", product.rows_dtype);
    let constants = [
        ("COLUMNS", columns),
        ("WIDTH", width),
        ("SLOTS", slots),
        ("CHUNK", chunk),
        ("CHUNKS", chunks),
        ("LINE", line),
        ("RUN", run),
        // Pairs of several rows may share experts.
        ("ONCE", u64::from(!matches!(product.routing, Routing::Pairs { rows: 2.., .. }))),
        ("PART", k),
        ("PITCH", pitch),
        ("SPLIT", 1),
        ("DEPTH", 8),
        ("ROW_WARPS", if norm { frame::row_warps(shape.warps, &list) } else { 1 }),
        ("ROUTED", u64::from(!matches!(product.routing, Routing::Dense { .. }))),
        ("SUBS", list.subs),
        ("BANDS", product.bands()),
        ("STAGED_SUBS", list.staged_subs),
        ("SHARING", list.sharing),
        ("WEIGHTED", u64::from(matches!(product.routing, Routing::Pairs { weighted: Some(_), .. }))),
        ("BLOCK", block.unwrap_or(1)),
        ("GROUP_ROOM", room),
        ("RESIDENT", resident),
        ("CLAIMS", u64::from(shape.claims)),
        ("CLAIMED", CLAIMED),
        ("OWN", own),
    ];
    for (name, value) in constants {
        builder.constant(name, value);
    }
    match product.early() {
        none if none.is_empty() => {
            builder.constant("early", 0);
        }
        inputs => {
            builder.early("early", &inputs);
        }
    }
    if !matches!(product.routing, Routing::Dense { .. }) {
        builder.releases_late();
    }
    let mut config = format!("warps={} slots={slots} chunk={chunk} blocks={blocks}", shape.warps);
    if shape.apart {
        config += " apart";
    }
    if shape.claims {
        builder.claim("claims");
        config += " claims";
    } else {
        builder.line("constexpr int* claims = nullptr;");
    }
    if matches!(product.routing, Routing::Grouped { .. }) {
        config += &format!(" columns={columns}");
    }
    Some(builder.finish(config, [blocks, 1, 1], u32::try_from(block_warps * 32).ok()?, shared))
}

#[cfg(test)]
mod tests {
    use super::super::product::samples::{self, Sample};
    use super::*;
    use crate::plan::{DType, Phase};

    fn found(sample: &Sample) -> Vec<Specialised> {
        let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
        Ring.candidates(&problem)
    }

    #[test]
    fn every_body_of_few_rows_has_candidates() {
        for dtype in [DType::BF16, DType::F16] {
            let of_one_matrix = samples::all(dtype, dtype).into_iter().chain(samples::small(dtype, dtype));
            for sample in of_one_matrix.chain(samples::convolved(dtype, dtype)) {
                let rows: u64 = sample.name.split('_').find_map(|part| part.parse().ok()).expect("a number of rows");
                assert!(rows > 16 || !found(&sample).is_empty(), "{}", sample.name);
            }
        }
        // Rows that two tiles have, or a tile and a half.
        let half = DType::BF16;
        assert!(!found(&samples::matmul(half, half, 16, 64, 64)).is_empty());
        assert!(!found(&samples::matmul(half, half, 4, 24, 64)).is_empty());
    }

    #[test]
    fn bodies_of_other_types_sizes_or_wires_have_none() {
        for (x, w) in [(DType::F32, DType::BF16), (DType::F16, DType::BF16), (DType::F32, DType::F32)] {
            assert!(samples::all(x, w).iter().all(|sample| found(sample).is_empty()), "{x:?} {w:?}");
        }
        let half = DType::F16;
        assert!(found(&samples::matmul(half, half, 17, 64, 64)).is_empty(), "too many rows");
        assert!(found(&samples::matmul(half, half, 4, 20, 64)).is_empty(), "rows that no tile divides");
        assert!(found(&samples::matmul(half, half, 4, 64, 60)).is_empty(), "columns that no copy divides");
        for sample in samples::broken(half) {
            assert!(found(&sample).is_empty(), "{}", sample.name);
        }
        let mut prefill = samples::short_conv(half, half, 4, 64, false);
        assert!(!found(&prefill).is_empty());
        prefill.phase = Phase::Prefill;
        assert!(found(&prefill).is_empty(), "rows of one sequence");
        assert!(found(&samples::gated(half, half, 4, [36, 3], 64, false)).is_empty(), "bands that no tile divides");
        let mut prefill = samples::gated(half, half, 4, [64, 3], 64, false);
        assert!(!found(&prefill).is_empty());
        prefill.phase = Phase::Prefill;
        assert!(found(&prefill).is_empty(), "rows of one sequence behind a product");
    }

    #[test]
    fn buckets_of_one_tile_share_a_kernel() {
        let text = |rows| found(&samples::matmul(DType::BF16, DType::BF16, rows, 4096, 2048))[0].prelude();
        assert_eq!(text(5), text(8));
        assert_ne!(text(8), text(16));
    }

    #[test]
    fn candidates_differ_and_fit() {
        for sample in samples::all(DType::BF16, DType::BF16) {
            let candidates = found(&sample);
            assert!(candidates.len() <= SHAPES.len(), "{}", sample.name);
            for (i, one) in candidates.iter().enumerate() {
                assert!(one.launch.shared <= 231_936 && one.launch.cluster == 1, "{}", sample.name);
                assert!(candidates[..i].iter().all(|other| other.config != one.config), "{}", one.config);
            }
        }
    }

    #[test]
    fn work_is_divided_evenly() {
        let half = DType::BF16;
        let of = |sample: &Sample, config: &str| {
            let candidates = found(sample);
            let one = candidates.iter().find(|one| one.config == config);
            let launch = &one.unwrap_or_else(|| panic!("{config}: {}", candidates[0].config)).launch;
            (launch.grid[0], launch.shared)
        };
        // A tile for each block, of which six fit on an SM.
        let (blocks, shared) =
            of(&samples::residual(half, half, 1, 2048, 2048), "warps=8 slots=1 chunk=2048 blocks=256");
        assert!(blocks == 256 && shared < 38 << 10);
        of(&samples::norm(half, half, 1, 6144, 2048), "warps=8 slots=2 chunk=2048 blocks=256");
        // An item is three tiles.
        let (blocks, shared) =
            of(&samples::gated(half, half, 1, [2048, 3], 2048, false), "warps=8 slots=2 chunk=2048 blocks=256");
        assert!(blocks == 256 && shared < 74 << 10);
        of(&samples::norm(half, half, 1, 3072, 2048), "warps=8 slots=3 chunk=2048 blocks=128");
        of(&samples::pairs(half, half, 1, [32, 4], 3584, 2048), "warps=8 slots=2 chunk=2048 blocks=256");
        of(&samples::combine(half, half, 1, [32, 4], 2048, 1792), "warps=8 slots=2 chunk=1792 blocks=256");
        of(&samples::combine(half, half, 1, [32, 4], 2048, 1792), "warps=4 slots=4 chunk=896 blocks=256");
        of(&samples::residual(half, half, 1, 2048, 7168), "warps=8 slots=2 chunk=1792 blocks=256");
    }

    #[test]
    fn blocks_claim_what_is_not_theirs_for_sure() {
        let half = DType::BF16;
        let claiming = |sample: &Sample| -> Vec<Specialised> {
            found(sample).into_iter().filter(|one| one.config.ends_with(" claims")).collect()
        };
        let experts = claiming(&samples::pairs(half, half, 1, [32, 4], 3584, 2048));
        let first = &experts[0];
        assert_eq!(
            (first.config.as_str(), first.launch.grid[0]),
            ("warps=8 slots=2 chunk=2048 blocks=264 claims", 264)
        );
        assert!(first.prelude().contains("OWN = 2"), "{}", first.prelude());
        assert_eq!(first.launch.args.iter().filter(|arg| matches!(arg, crate::plan::Arg::Claim(_))).count(), 1);
        // Fewer blocks, so that something is left to claim.
        assert_eq!(claiming(&samples::norm(half, half, 1, 6144, 2048))[0].launch.grid[0], 256);
        // An item for each block; and items of different rows.
        assert!(claiming(&samples::combine(half, half, 1, [32, 4], 2048, 1792)).is_empty());
        assert!(claiming(&samples::pairs(half, half, 4, [32, 4], 3584, 2048)).is_empty());
    }

    /// Writes every candidate's text for the compiler: `KERNEL_TEXTS=DIR cargo test --lib ring`.
    #[test]
    fn texts() {
        let Some(folder) = std::env::var_os("KERNEL_TEXTS") else { return };
        samples::write(&[&Ring], folder.as_ref());
    }
}
