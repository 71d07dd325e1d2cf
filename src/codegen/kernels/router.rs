//! `kernels/router.cu`: gate product, scores, selection and weights of a mixture of experts, by a cluster for some rows.

use super::builder::{Builder, Specialised, c_number};
use super::group_rows::scratch_bytes;
use super::hopper::{MOST_SHARED, PROCESSORS};
use super::pattern::{dtype, is_float, is_half};
use super::routing::Routing;
use super::{Problem, Twin};
use crate::plan::{DType, Slot};

/// The twin.
pub struct Router;

const THREADS: u64 = 256;
const WARPS: u64 = THREADS / 32;
/// Choices of a row: a lane has one.
const MOST_CHOSEN: u64 = 32;
/// Blocks for which the device has room at once, or nearly.
const BLOCKS: u64 = PROCESSORS * 2;

impl Twin for Router {
    fn name(&self) -> &'static str {
        "router"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/router.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(routing) = Routing::of(problem.semantic) else { return vec![] };
        let [rows, k, ..] = routing.sizes;
        let widest = [8, 4, 2, 1].into_iter().find(|cluster| k >= 32 * cluster).unwrap_or(1);
        let clusters = [widest, widest / 2].into_iter().filter(|&cluster| cluster > 0);
        clusters
            .flat_map(|cluster| {
                let tiles = tiles(rows, cluster, routing.group.is_some());
                tiles.into_iter().map(move |tile| (cluster, tile))
            })
            .filter_map(|(cluster, tile)| specialise(problem, &routing, cluster, tile))
            .collect()
    }
}

/// Rows of a cluster, best guess first. With the sort one cluster has all.
fn tiles(rows: u64, cluster: u64, group: bool) -> Vec<u64> {
    if group {
        return [8, 16, 32, 64, 128, 256, 512].into_iter().find(|&tile| tile >= rows).into_iter().collect();
    }
    let useful = |tile: &u64| *tile == 8 || *tile < 2 * rows;
    let mut tiles: Vec<u64> = [8, 16, 32, 64].into_iter().filter(useful).collect();
    let first = tiles.iter().position(|&tile| rows.div_ceil(tile) * cluster <= BLOCKS);
    let first = first.unwrap_or(tiles.len() - 1);
    let best = tiles.remove(first);
    tiles.insert(0, best);
    tiles
}

/// Adjacent elements of rows of `columns` that are loaded as one.
fn vector(columns: u64, dtype: DType) -> u64 {
    let fits = |n: &u64| columns.is_multiple_of(*n) && n * dtype.bytes() <= 16;
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

fn specialise(problem: &Problem, routing: &Routing, cluster: u64, tile: u64) -> Option<Specialised> {
    let semantic = problem.semantic;
    let [rows, k, experts, chosen] = routing.sizes;
    let (x, gate) = (dtype(semantic, routing.x), dtype(semantic, routing.gate));
    let floats = [Some(routing.x), Some(routing.gate), routing.norm.map(|norm| norm.weight)];
    if !floats.into_iter().flatten().all(|slot| is_float(semantic, slot)) || k == 0 || chosen > MOST_CHOSEN.min(experts)
    {
        return None;
    }
    let blocks = rows.div_ceil(tile) * cluster;
    if blocks > i32::MAX as u64 || (routing.group.is_some() && rows > tile) {
        return None;
    }
    let slice = k.div_ceil(cluster).next_multiple_of(32);
    let across = experts.next_multiple_of(16);
    let mma = x == gate && is_half(x);
    let tasks = if mma { tile / 8 * (across / 16) } else { tile * across / 64 };
    let split = if tasks >= WARPS { 1 } else { 4 };

    let norm_type = routing.norm.map_or(DType::F32, |norm| dtype(semantic, norm.weight));
    let up = |bytes: u64| bytes.next_multiple_of(16);
    let mut shared = tile * (slice * x.bytes() + 16) + across * (slice * gate.bytes() + 16);
    shared += split * tile * (across + 4) * 4 + up(experts * 4) + up(WARPS * choices_bytes(chosen));
    if routing.norm.is_some() {
        shared += slice * norm_type.bytes() + up(tile * 4);
    }
    if routing.group.is_some() {
        shared += up(tile * chosen * 4) + up(scratch_bytes(experts, WARPS));
    }
    if shared > MOST_SHARED {
        return None;
    }

    let mut builder = Builder::new(problem);
    builder.cluster(cluster as u32);
    for (name, value) in [
        ("CLUSTER", cluster),
        ("ROWS", tile),
        ("K", k),
        ("SLICE", slice),
        ("EXPERTS", experts),
        ("CHOSEN", chosen),
        ("SPLIT", split),
        ("SHARED", shared),
        ("X_VECTOR", vector(k, x)),
        ("G_VECTOR", vector(k, gate)),
        ("W_VECTOR", vector(k, norm_type)),
    ] {
        builder.constant(name, value);
    }
    builder.line(format_args!("#define MMA {}", u8::from(mma)));
    declare(&mut builder, problem, routing);
    Some(builder.finish(format!("cluster={cluster} rows={tile}"), [blocks, 1, 1], THREADS as u32, shared))
}

/// Bytes of shared memory for the choices of a row; see `Choices` in `route.cuh`.
pub(super) fn choices_bytes(chosen: u64) -> u64 {
    chosen * 8
}

/// What all routers are told: types, operands, what they are to do besides, and how scores become weights.
pub(super) fn declare(builder: &mut Builder, problem: &Problem, routing: &Routing) {
    let semantic = problem.semantic;
    let norm_type = routing.norm.map_or(DType::F32, |norm| dtype(semantic, norm.weight));
    builder.alias("X", dtype(semantic, routing.x)).alias("G", dtype(semantic, routing.gate)).alias("W", norm_type);
    builder.pointer("x", routing.x).pointer("gate", routing.gate).pointer("slot", routing.slot);
    builder.int("rows", routing.sizes[0]).pointer("weights", routing.weights);
    let out = |slot: Slot| matches!(slot, Slot::Out(_));
    let define = |builder: &mut Builder, name: &str, value: bool| {
        builder.line(format_args!("#define {name} {}", u8::from(value)));
    };
    define(builder, "NORM", routing.norm.is_some());
    define(builder, "GROUP", routing.group.is_some());
    define(builder, "NORM_OUT", routing.norm.is_some_and(|norm| out(norm.result)));
    define(builder, "EXPERTS_OUT", out(routing.experts));
    if let Some(norm) = routing.norm {
        builder.number("EPS", norm.eps).pointer("norm", norm.weight);
        if out(norm.result) {
            builder.pointer("normed", norm.result);
        }
    }
    if out(routing.experts) {
        builder.pointer("experts", routing.experts);
    }
    match routing.bias {
        Some(bias) => {
            builder.pointer("bias", bias).line("#define BIAS(e) to_f32(bias[e])");
            builder.line("#define SELECTION(score, bias) __fadd_rn(score, bias)")
        }
        None => builder.line("#define BIAS(e) 0.0f").line("#define SELECTION(score, bias) (score)"),
    };
    builder.line(format_args!("#define WEIGHT(weight, sum) {}", weight(routing)));
    if let Some([pairs, places, offsets]) = routing.group {
        builder.pointer("pairs", pairs).pointer("places", places).pointer("offsets", offsets);
    }
}

/// A weight from the score and the row's sum of scores, as C++.
fn weight(routing: &Routing) -> String {
    let divided = match routing.divided {
        None => "(weight)".to_owned(),
        Some(None) => "((weight) / (sum))".to_owned(),
        Some(Some(added)) => format!("((weight) / __fadd_rn(sum, {}))", c_number(added)),
    };
    match routing.factor {
        None => divided,
        Some(factor) => format!("__fmul_rn({divided}, {})", c_number(factor)),
    }
}

#[cfg(test)]
#[path = "router/testing.rs"]
pub(super) mod testing;
#[cfg(test)]
#[path = "router/tests.rs"]
mod tests;
