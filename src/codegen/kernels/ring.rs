//! `kernels/ring.cu`: products of few rows with weights, which bulk copies bring through a ring in shared memory.
//!
//! What `stream` does with loads into registers, for up to sixteen rows, and `stream_fma`, in f32 and for any float types, for up to
//! four, or eight of an expert; for one row of 16 bits either. Copies need neither registers nor warps while they are on their way, so blocks are small enough that
//! those of the next kernel find room beside them and begin their copies. A tile has but eight rows: 256 blocks divide most sizes
//! of models evenly.

mod shape;

use self::shape::{Engine, Shape, TILE};
use super::builder::{Builder, Specialised};
use super::frame::{self, List};
use super::hopper::PROCESSORS;
use super::pattern::dtype;
use super::product::{Product, Prologue, Routing};
use super::{Problem, Twin};

/// The twin.
pub struct Ring;

/// Claimed items that a block remembers.
const CLAIMED: u64 = 16;

/// Shared memory of an SM, and what each block takes of it beside its own.
const SHARED_OF_SM: u64 = 228 << 10;
const SHARED_BESIDE: u64 = 3 << 9;

impl Twin for Ring {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/ring.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(product) = Product::of(problem) else { return vec![] };
        let engines = Engine::all(problem, &product).into_iter();
        engines.flat_map(|engine| shapes(problem, &product, engine)).collect()
    }
}

/// The shapes that give each warp about as much as the others, or all if none does.
fn shapes(problem: &Problem, product: &Product, engine: Engine) -> Vec<Specialised> {
    let mut found: Vec<(bool, Specialised)> = vec![];
    for shape in engine.shapes(product, dtype(problem.semantic, product.weight)) {
        if let Some(specialised) = specialise(problem, product, engine, shape)
            && found.iter().all(|(_, known)| known.config != specialised.config)
        {
            let chunk = shape.chunk(product.k, engine);
            found.push((shape.even(chunk, engine.span), specialised));
        }
    }
    let some_even = found.iter().any(|(even, _)| *even);
    found.retain(|(even, _)| *even || !some_even);
    found.into_iter().map(|(_, specialised)| specialised).collect()
}

fn specialise(problem: &Problem, product: &Product, engine: Engine, shape: &Shape) -> Option<Specialised> {
    let (n, k, columns) = (product.n, product.k, engine.columns);
    let list = List::of(product, columns);
    let block = product.block();

    let chunk = shape.chunk(k, engine);
    let chunks = k.div_ceil(chunk);
    let run = match block {
        _ if chunk != k => 1,
        None => TILE,
        Some(block) if block % (TILE / 2) == 0 => TILE / 2,
        Some(_) => 1,
    };
    let line = if run > 1 { engine.bytes(k) + engine.header() } else { engine.line(chunk) };
    if shape.apart && run == 1 {
        return None;
    }
    let run = if shape.apart { 1 } else { run };

    let products = list.subs * product.bands();
    let items = list.groups * (n / (TILE * product.bands()));
    let most_blocks = (PROCESSORS * shape.per_sm).min(items);
    let rounds = items.div_ceil(most_blocks);
    let units = products * chunks;
    let slots = shape.slots.min(rounds * units);
    // Which experts there are is known too late for what rows that were just routed meet.
    let just_routed =
        matches!(product.routing, Routing::Pairs { row_a_pair: false, .. } | Routing::Grouped { gather: Some(_), .. });
    if shape.held && just_routed {
        return None;
    }
    // Who claims has the items of what is under way before the wait for sure, and all items the same rows.
    let own = (slots + u64::from(shape.held)).div_ceil(units);
    let blocks = if shape.claims { most_blocks.min(items / (own + 1)) } else { items.div_ceil(rounds) };
    if shape.claims && (slots < 2 || blocks < PROCESSORS.min(items) || list.groups > list.sharing) {
        return None;
    }
    let pairs = matches!(product.routing, Routing::Pairs { .. });
    // One row has a kernel of its own, more rows share one.
    let width = if pairs || frame::rows_together(product) == 1 { 1 } else { columns };
    let sums = products * shape.warps * width * TILE;
    let room = list.room.min((list.groups * list.subs).next_multiple_of(32));
    let pitch = engine.pitch(k);
    let headers = products * TILE * engine.header();
    let beside =
        (slots * TILE * line + room * 16 + sums * 8 + headers * 2 + slots * 16 + CLAIMED * 4).next_multiple_of(16);
    let with_rows = |rows| beside + rows * pitch * engine.staged.bytes();
    let shared = with_rows(list.staged_rows);
    if shape.per_sm * (shared + SHARED_BESIDE) > SHARED_OF_SM || items * units > i32::MAX as u64 {
        return None;
    }
    let most_rows = if list.staged_rows == 1 || pairs { list.staged_rows } else { columns };
    // One more fills slots.
    let block_warps = shape.warps + 1;
    let multiplying = engine.threads(product, shape) / (shape.warps * 32);
    let resident = (SHARED_OF_SM / (with_rows(most_rows) + SHARED_BESIDE)).clamp(1, multiplying);

    let norm = matches!(product.prologue, Prologue::Norm { .. });
    let mut builder = Builder::new(problem);
    product.declare(&mut builder);
    builder.alias("S", engine.staged);
    builder.line(format_args!("#define FMA {}", u8::from(engine.fma)));
    builder.line(format_args!("#define PACKED {}", u8::from(engine.packed)));
    builder.line(format_args!("#define HELD {}", u8::from(shape.held)));
    builder.line(format_args!("#define WEIGHT {}", if engine.packed { "packed" } else { "w" }));
    if engine.packed {
        builder.packed("packed", product.weight);
    }
    let constants = [
        ("COLUMNS", columns),
        ("WIDTH", width),
        ("SLOTS", slots),
        ("CHUNK", chunk),
        ("CHUNKS", chunks),
        ("SPAN", engine.span),
        ("SPAN_BYTES", engine.bytes(engine.span)),
        ("HEADER_WORDS", engine.header() / 4),
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
        ("RESTAGES", u64::from(list.groups > list.sharing)),
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
    if engine.fma && shape::suits_tensor_cores(product, dtype(problem.semantic, product.weight)) {
        config += " fma";
    }
    if engine.packed {
        config += " packed";
    }
    if shape.apart {
        config += " apart";
    }
    if shape.held {
        config += " held";
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
mod tests;
