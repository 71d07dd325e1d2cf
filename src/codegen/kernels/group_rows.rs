//! `kernels/group_rows.cu`: the stable sort of pairs by expert, by one cluster.

use super::builder::{Builder, Specialised};
use super::hopper::MOST_SHARED;
use super::pattern::{args, dims, only, results};
use super::{Problem, Twin};
use crate::plan::{Instr, Op};

/// The twin.
pub struct GroupRows;

/// Pairs from which eight blocks are better than one.
const MANY: u64 = 4096;

impl Twin for GroupRows {
    fn name(&self) -> &'static str {
        "group_rows"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/group_rows.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let found = |warps| [1, 8].map(|cluster| specialise(problem, cluster, warps));
        let mut found: Vec<Specialised> =
            [16, 4, 1].into_iter().map(found).find(|list| list[0].is_some()).into_iter().flatten().flatten().collect();
        let pairs = only(problem.semantic).and_then(args).and_then(|[experts]| dims(problem.semantic, experts));
        if pairs.is_some_and(|[rows, k]| rows.saturating_mul(k) >= MANY) {
            found.reverse();
        }
        found
    }
}

/// Bytes of shared memory that the sort needs: counts for each warp, totals, starts. See `group_scratch` in `group.cuh`.
pub fn scratch_bytes(experts: u64, warps: u64) -> u64 {
    ((warps + 2) * experts + 1) * 4
}

fn specialise(problem: &Problem, cluster: u32, warps: u32) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr @ Instr(Op::GroupRows, ..) = only(semantic)? else { return None };
    let ([experts], [pairs, places, offsets]) = (args(instr)?, results(instr)?);
    let ([rows, k], [bounds]) = (dims(semantic, experts)?, dims(semantic, offsets)?);
    let count = rows.checked_mul(k).filter(|&count| count <= i32::MAX as u64 / 2)?;
    let shared = scratch_bytes(bounds.checked_sub(1)?, u64::from(warps));
    if bounds < 2 || shared > MOST_SHARED {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.cluster(cluster).constant("CLUSTER", u64::from(cluster)).constant("EXPERTS", bounds - 1);
    builder.pointer("experts", experts).int("count", count);
    builder.pointer("pairs", pairs).pointer("places", places).pointer("offsets", offsets);
    Some(builder.finish(format!("cluster={cluster}"), [u64::from(cluster), 1, 1], warps * 32, shared))
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{DType, Semantic, Slot};

    fn group(rows: u64, k: u64, experts: u64) -> Semantic {
        let body = vec![Instr(Op::GroupRows, vec![Slot::In(0)], vec![Slot::Out(0), Slot::Out(1), Slot::Out(2)])];
        let outputs = [vec![rows * k], vec![rows, k], vec![experts + 1]].map(|shape| (DType::I32, shape));
        semantic(&[(DType::I32, vec![rows, k])], &outputs, &[], body)
    }

    #[test]
    fn many_pairs_take_a_cluster() {
        let configs = |rows| candidates(&GroupRows, &group(rows, 4, 32)).into_iter().map(|c| c.config);
        assert_eq!(configs(64).collect::<Vec<_>>(), ["cluster=1", "cluster=8"]);
        assert_eq!(configs(8192).collect::<Vec<_>>(), ["cluster=8", "cluster=1"]);
        let many = &candidates(&GroupRows, &group(8192, 4, 32))[0];
        assert_eq!((many.launch.grid, many.launch.cluster), ([8, 1, 1], 8));
        assert_eq!(candidates(&GroupRows, &group(2048, 4, 32))[0].prelude(), many.prelude());
        for (i, label) in ["one", "cluster"].into_iter().enumerate() {
            write_text(&GroupRows, &group(64, 4, 32), i, label);
        }
        write_text(&GroupRows, &group(700, 3, 7), 1, "seven");
    }

    #[test]
    fn very_many_experts_take_fewer_warps() {
        let found = candidates(&GroupRows, &group(64, 4, 5000));
        assert_eq!(found[0].launch.block, 128);
        assert!(found[0].launch.shared <= 232_448);
        assert!(candidates(&GroupRows, &group(64, 4, 200_000)).is_empty());
    }
}
