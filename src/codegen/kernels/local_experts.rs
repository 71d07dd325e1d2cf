//! `kernels/local_experts.cu`: which of a rank's experts each choice is, if it is one of them.

use super::builder::{Builder, Specialised};
use super::pattern::{dims, only, results};
use super::{Problem, Twin, blocks};
use crate::plan::{Instr, Op, Slot, TURNS};

/// The twin.
pub struct LocalExperts;

const THREADS: u32 = 256;
/// Experts of a set of bits.
const BITS: u64 = 64;
/// Sets, of which each is a parameter.
const MOST_SETS: u64 = 24;

impl Twin for LocalExperts {
    fn name(&self) -> &'static str {
        "local_experts"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/local_experts.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        specialise(problem).into_iter().collect()
    }
}

fn specialise(problem: &Problem) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr @ Instr(op @ Op::LocalExperts { .. }, ..) = only(semantic)? else { return None };
    let ((chosen, weights), [local]) = (operands(instr)?, results(instr)?);
    let [rows, k] = dims(semantic, chosen)?;
    let count = rows.checked_mul(k).filter(|&count| count <= i32::MAX as u64 / 2)?;
    let mut builder = Builder::new(problem);
    builder.pointer("local", local).pointer("chosen", chosen).int("count", count);
    declare(&mut builder, op, weights, k)?;
    Some(builder.finish("", [blocks(count, THREADS), 1, 1], THREADS, 0))
}

/// The choices and, where it needs them, their weights that a look-up of experts takes.
pub(super) fn operands(look_up: &Instr) -> Option<(Slot, Option<Slot>)> {
    match look_up.1[..] {
        [chosen] => Some((chosen, None)),
        [chosen, weights] => Some((chosen, Some(weights))),
        _ => None,
    }
}

/// Declares `LOCAL_OF(chosen, i)`, the place of choice i of rows of k among the experts that this rank has, or -1, with the parameters that it
/// needs, of which `weights [rows, k]` has the weights of the choices. The experts themselves are arguments, and so are the turns of those that other ranks have, too, so that ranks and layers share a
/// kernel; none if there are more than parameters have room for.
pub(super) fn declare(builder: &mut Builder, op: &Op, weights: Option<Slot>, k: u64) -> Option<()> {
    let Op::LocalExperts { of, experts, parts } = op else { return None };
    let count = of.div_ceil(BITS);
    let room = MOST_SETS.checked_sub(count)?;
    let shared: Vec<u64> = experts.iter().zip(parts).filter_map(|(&expert, &part)| shared(expert, part)).collect();
    let pairs = match shared.len().div_ceil(2) {
        0 => 0,
        pairs => pairs.next_power_of_two().min(room as usize),
    };
    if shared.len() > 2 * pairs {
        return None;
    }
    let names: Vec<String> =
        (0..count).map(|i| format!("set{i}")).chain((0..pairs).map(|i| format!("parts{i}"))).collect();
    let formal: Vec<String> = names.iter().map(|name| format!("u64 {name}")).collect();
    let formal = formal.join(", ");
    let bits = if weights.is_some() { "const float* weights, " } else { "" };
    builder.line(format_args!("__device__ __forceinline__ int local_of(const int* chosen, int i, {bits}{formal}) {{"));
    builder.line(format_args!("    int e = chosen[i];\n    if ((u32)e >= {of}u) return -1;"));
    builder.line("    u64 set = 0;\n    int before = 0;");
    for i in 0..count {
        builder.line(format_args!("    if (e / {BITS} == {i}) set = set{i};"));
        builder.line(format_args!("    if (e / {BITS} > {i}) before += __popcll(set{i});"));
    }
    builder.line(format_args!("    if (!(set >> e % {BITS} & 1)) return -1;"));
    if pairs > 0 {
        // The turn is that of `plan::turn`.
        builder.line(format_args!("    constexpr u32 ALL = {TURNS}u << 21;\n    u32 part = ALL;"));
        for i in 0..pairs {
            for half in ["", " >> 32"] {
                builder.line(format_args!(
                    "    if ((int)(parts{i}{half} & {NO_EXPERT}) == e) part = (u32)(parts{i}{half});"
                ));
            }
        }
        builder.line("    if (part != ALL) {\n        u32 hash = 0;");
        builder.line(format_args!(
            "        for (int j = 0; j < {k}; j++) hash = (hash ^ __float_as_uint(weights[i / {k} * {k} + j])) * 0x9e3779b1u;"
        ));
        builder.line("        u32 turn = hash >> 22;");
        builder.line("        if (turn < (part >> 11 & 1023) || turn >= part >> 21) return -1;\n    }");
    }
    builder.line(format_args!("    return before + __popcll(set & ((1ull << e % {BITS}) - 1));\n}}"));
    let bits = if weights.is_some() { "weights, " } else { "" };
    builder.line(format_args!("#define LOCAL_OF(chosen, i) local_of(chosen, i, {bits}{})", names.join(", ")));
    if let Some(weights) = weights {
        builder.pointer("weights", weights);
    }
    let sets = (0..count).map(|set| {
        let of_set = experts.iter().filter(|&&expert| expert / BITS == set);
        of_set.fold(0u64, |bits, expert| bits | 1 << (expert % BITS))
    });
    let shared = |at: usize| shared.get(at).copied().unwrap_or(NO_EXPERT);
    let parts = (0..pairs).map(|i| shared(2 * i) | shared(2 * i + 1) << 32);
    names.iter().zip(sets.chain(parts)).for_each(|(name, bits)| {
        builder.long(name, bits as i64);
    });
    Some(())
}

/// 11 bits that are no expert's number, because there are sets for fewer.
const NO_EXPERT: u64 = 2047;

/// An expert and the turns that this rank runs it at, in 32 bits: expert in 11, first turn in 10, end in 11. None if all turns.
fn shared(expert: u64, part: (u64, u64)) -> Option<u64> {
    match part {
        (0, TURNS) => None,
        (from, to) if from < to => Some(expert | from << 11 | to << 21),
        _ => Some(expert),
    }
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{Arg, DType, Semantic};

    fn local(rows: u64, of: u64, experts: &[u64]) -> Semantic {
        sharing(rows, of, experts, &[])
    }

    fn sharing(rows: u64, of: u64, experts: &[u64], parts: &[(u64, u64)]) -> Semantic {
        let op = Op::LocalExperts { of, experts: experts.to_vec(), parts: parts.to_vec() };
        let shared = usize::from(!parts.is_empty());
        let operands = [Slot::In(0), Slot::In(1)][..=shared].to_vec();
        let types = [(DType::I32, vec![rows, 4]), (DType::F32, vec![rows, 4])];
        let body = vec![Instr(op, operands, vec![Slot::Out(0)])];
        semantic(&types[..=shared], &types[..1], &[], body)
    }

    #[test]
    fn ranks_share_a_kernel_and_pass_their_experts() {
        let found = |rows, experts: &[u64]| candidates(&LocalExperts, &local(rows, 70, experts)).swap_remove(0);
        let (first, second) = (found(64, &[0, 3, 65]), found(9000, &[1, 69]));
        assert_eq!(first.prelude(), second.prelude());
        assert_eq!(first.launch.args[3..], [Arg::Long(9), Arg::Long(2)]);
        assert_eq!(second.launch.args[3..], [Arg::Long(2), Arg::Long(32)]);
        write_text(&LocalExperts, &local(64, 70, &[1, 69]), 0, "70");
        write_text(&LocalExperts, &local(64, 8, &[1, 7]), 0, "8");
        // Turns are arguments, too, two experts in one: here of expert 3 the first half, of 65 none.
        let sharing = |experts: &[u64], parts: &[(u64, u64)]| sharing(64, 70, experts, parts);
        let first = sharing(&[0, 3, 65], &[(0, 1024), (0, 512), (512, 512)]);
        let found = candidates(&LocalExperts, &first).swap_remove(0);
        assert_eq!(found.launch.args[4..], [9, 2, 3 | 512 << 21 | 65 << 32].map(Arg::Long));
        let second = candidates(&LocalExperts, &sharing(&[2], &[(512, 1024)])).swap_remove(0);
        assert_eq!(found.prelude(), second.prelude());
        assert_eq!(second.launch.args[4..], [4, 0, 2 | 512 << 11 | 1024 << 21 | 2047 << 32].map(Arg::Long));
        write_text(&LocalExperts, &first, 0, "parts");
        let many: Vec<u64> = (0..45).collect();
        assert!(candidates(&LocalExperts, &sharing(&many, &[(1, 2); 45])).is_empty());
        assert_eq!(candidates(&LocalExperts, &sharing(&many[1..], &[(1, 2); 44]))[0].launch.args.len(), 4 + 24);
        assert!(
            candidates(&LocalExperts, &local(64, 64 * 24 + 1, &[1])).is_empty(),
            "more than there are parameters for"
        );
    }
}
