//! `kernels/group_rows.cu`: the stable sort of pairs by expert, of all or of those that a rank has, by one cluster.

use super::builder::{Builder, Specialised};
use super::hopper::MOST_SHARED;
use super::pattern::{args, dims, results};
use super::{Problem, Twin, local_experts};
use crate::plan::{Instr, Op, Semantic, Slot};

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
        let pairs = Sort::of(problem.semantic).and_then(|sort| dims(problem.semantic, sort.experts));
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

/// What is sorted.
struct Sort<'a> {
    experts: Slot,
    results: [Slot; 3],
    /// The look-up of those that are sorted for, if not all, with the choices' weights if it needs them.
    local: Option<(&'a Op, Option<Slot>)>,
}

impl<'a> Sort<'a> {
    /// The sort that a semantic is, if it is one and nothing else.
    fn of(semantic: &'a Semantic) -> Option<Sort<'a>> {
        let (sort, before) = semantic.body.split_last()?;
        let (Op::GroupRows, [experts], results) = (&sort.0, args(sort)?, results(sort)?) else { return None };
        match before {
            [] => Some(Sort { experts, results, local: None }),
            [look_up @ Instr(local @ Op::LocalExperts { .. }, ..)] if look_up.2 == [experts] => {
                let (experts @ Slot::In(_), weights) = local_experts::operands(look_up)? else { return None };
                if matches!(weights, Some(Slot::Out(_) | Slot::Temp(_))) {
                    return None;
                }
                Some(Sort { experts, results, local: Some((local, weights)) })
            }
            _ => None,
        }
    }
}

fn specialise(problem: &Problem, cluster: u32, warps: u32) -> Option<Specialised> {
    let semantic = problem.semantic;
    let Sort { experts, results: [pairs, places, offsets], local } = Sort::of(semantic)?;
    let ([rows, k], [bounds]) = (dims(semantic, experts)?, dims(semantic, offsets)?);
    let count = rows.checked_mul(k).filter(|&count| count <= i32::MAX as u64 / 2)?;
    let shared = scratch_bytes(bounds.checked_sub(1)?, u64::from(warps));
    if bounds < 2 || shared > MOST_SHARED {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.cluster(cluster).constant("CLUSTER", u64::from(cluster)).constant("EXPERTS", bounds - 1);
    builder.line(format_args!("#define LOCAL {}", u8::from(local.is_some())));
    if let Some((local, weights)) = local {
        local_experts::declare(&mut builder, local, weights, k)?;
    }
    builder.pointer("experts", experts).int("count", count);
    builder.pointer("pairs", pairs).pointer("places", places).pointer("offsets", offsets);
    Some(builder.finish(format!("cluster={cluster}"), [u64::from(cluster), 1, 1], warps * 32, shared))
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{Arg, DType, TensorType};

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
    fn a_rank_sorts_for_its_own_experts() {
        let mut semantic = group(64, 4, 3);
        semantic.temps.push(semantic.inputs[0].clone());
        semantic.body[0].1 = vec![Slot::Temp(0)];
        let op = |parts: &[(u64, u64)]| Op::LocalExperts { of: 70, experts: vec![0, 5, 69], parts: parts.to_vec() };
        semantic.body.insert(0, Instr(op(&[]), vec![Slot::In(0)], vec![Slot::Temp(0)]));
        let found = &candidates(&GroupRows, &semantic)[0];
        assert_eq!(found.launch.args[..2], [Arg::Long(33), Arg::Long(32)]);
        write_text(&GroupRows, &semantic, 1, "local");
        semantic.inputs.push(TensorType(DType::F32, vec![64, 4]));
        semantic.body[0] = Instr(
            op(&[(0, 1024), (100, 700), (512, 1024)]),
            vec![Slot::In(0), Slot::In(1)],
            semantic.body[0].2.clone(),
        );
        write_text(&GroupRows, &semantic, 1, "parts");
        // What is looked up is needed elsewhere.
        semantic.body[0].2 = vec![Slot::Out(0)];
        assert!(candidates(&GroupRows, &semantic).is_empty());
    }

    #[test]
    fn very_many_experts_take_fewer_warps() {
        let found = candidates(&GroupRows, &group(64, 4, 5000));
        assert_eq!(found[0].launch.block, 128);
        assert!(found[0].launch.shared <= 232_448);
        assert!(candidates(&GroupRows, &group(64, 4, 200_000)).is_empty());
    }
}
