//! `kernels/router_few.cu`: the router of a mixture of experts for few rows, by clusters whose blocks have some experts each.

use super::builder::{Builder, Specialised};
use super::group_rows::scratch_bytes;
use super::hopper::PROCESSORS;
use super::pattern::{dtype, is_float};
use super::router::{choices_bytes, declare};
use super::routing::Routing;
use super::{Problem, Twin};
use crate::plan::DType;

/// The twin.
pub struct RouterFew;

/// Warps of a block, best guess first. More of them leave each thread less to do one after the other.
const WARPS: [u64; 2] = [8, 4];
/// Rows of a cluster. With the sort one cluster has all.
const ROWS: [u64; 4] = [1, 2, 4, 8];
/// Blocks, so that each has a multiprocessor: every block reads whole rows, and its share of the gates for all rows of its cluster.
const BLOCKS: u64 = PROCESSORS;
/// Words that a thread has in registers: rows, gates, norm weights and sums.
const MOST_WORDS: u64 = 96;
const MOST_SHARED: u64 = 65_536;
/// Choices of a row: a lane has one.
const MOST_CHOSEN: u64 = 32;

/// How the work is divided.
#[derive(Clone, Copy)]
struct Division {
    cluster: u64,
    rows: u64,
    warps: u64,
}

impl Twin for RouterFew {
    fn name(&self) -> &'static str {
        "router_few"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/router_few.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(routing) = Routing::of(problem.semantic) else { return vec![] };
        let [all, k, experts, _] = routing.sizes;
        let widest = [8, 4, 2].into_iter().find(|&cluster| experts >= cluster).unwrap_or(1);
        let tiles: Vec<u64> = if routing.group.is_some() {
            ROWS.into_iter().find(|&rows| rows >= all).into_iter().collect()
        } else {
            ROWS.into_iter().filter(|&rows| rows < 2 * all && rows < 8).collect()
        };
        // As many warps as there is work for, then half as many.
        let most = k.div_ceil(256).next_power_of_two();
        let warps = if most >= WARPS[0] { WARPS.to_vec() } else { vec![most] };
        let mut found = vec![];
        for cluster in [widest, widest / 2].into_iter().filter(|&cluster| cluster > 0) {
            for &rows in &tiles {
                for &warps in &warps {
                    found.extend(specialise(problem, &routing, Division { cluster, rows, warps }));
                }
            }
        }
        found
    }
}

fn specialise(problem: &Problem, routing: &Routing, division: Division) -> Option<Specialised> {
    let semantic = problem.semantic;
    let [all, k, experts, chosen] = routing.sizes;
    let Division { cluster, rows, warps } = division;
    let floats = [Some(routing.x), Some(routing.gate), routing.norm.map(|norm| norm.weight)];
    let taken = floats.into_iter().flatten().all(|slot| is_float(semantic, slot));
    if !taken || k == 0 || !k.is_multiple_of(8) || chosen > MOST_CHOSEN.min(experts) {
        return None;
    }
    let blocks = all.div_ceil(rows) * cluster;
    let own = experts.div_ceil(cluster);
    let each = k.div_ceil(8).div_ceil(warps * 32);
    let sums = (rows * own).next_power_of_two();
    let words_of = |dtype: DType| each * 8 * dtype.bytes() / 4;
    let words = rows * words_of(dtype(semantic, routing.x))
        + own * words_of(dtype(semantic, routing.gate))
        + routing.norm.map_or(0, |norm| words_of(dtype(semantic, norm.weight)))
        + sums;
    if blocks > BLOCKS || words > MOST_WORDS {
        return None;
    }
    let up = |bytes: u64| bytes.next_multiple_of(16);
    let mut shared = up(sums * warps * 4) + up(rows * warps * 4) + up(rows * experts * 4);
    shared += up(rows * choices_bytes(chosen)) + 16;
    if routing.group.is_some() {
        shared += up(rows * chosen * 4) + up(scratch_bytes(experts, warps));
    }
    if shared > MOST_SHARED {
        return None;
    }

    let mut builder = Builder::new(problem);
    builder.cluster(cluster as u32);
    for (name, value) in
        [("CLUSTER", cluster), ("ROWS", rows), ("K", k), ("EXPERTS", experts), ("CHOSEN", chosen), ("SHARED", shared)]
    {
        builder.constant(name, value);
    }
    declare(&mut builder, problem, routing);
    let config = format!("cluster={cluster} rows={rows} warps={warps}");
    Some(builder.finish(config, [blocks, 1, 1], warps as u32 * 32, shared))
}

#[cfg(test)]
#[path = "router_few/tests.rs"]
mod tests;
