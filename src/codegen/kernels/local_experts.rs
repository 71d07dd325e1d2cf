//! `kernels/local_experts.cu`: which of a rank's experts each choice is, if it is one of them.

use super::builder::{Builder, Specialised};
use super::pattern::{args, dims, only, results};
use super::{Problem, Twin, blocks};
use crate::plan::{Instr, Op};

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
    let instr @ Instr(Op::LocalExperts { of, experts }, ..) = only(semantic)? else { return None };
    let ([chosen], [local]) = (args(instr)?, results(instr)?);
    let [rows, k] = dims(semantic, chosen)?;
    let count = rows.checked_mul(k).filter(|&count| count <= i32::MAX as u64 / 2)?;
    let mut builder = Builder::new(problem);
    builder.pointer("local", local).pointer("chosen", chosen).int("count", count);
    declare(&mut builder, *of, experts)?;
    Some(builder.finish("", [blocks(count, THREADS), 1, 1], THREADS, 0))
}

/// Declares `LOCAL_OF(e)`, the place of expert e among those that this rank has, or -1, with the parameters that it needs. The experts
/// themselves are arguments, so that ranks share a kernel; none if there are more than parameters have room for.
pub(super) fn declare(builder: &mut Builder, of: u64, experts: &[u64]) -> Option<()> {
    let count = of.div_ceil(BITS);
    if count > MOST_SETS {
        return None;
    }
    let names: Vec<String> = (0..count).map(|set| format!("set{set}")).collect();
    let formal: Vec<String> = names.iter().map(|set| format!("u64 {set}")).collect();
    builder.line(format_args!("__device__ __forceinline__ int local_of(int e, {}) {{", formal.join(", ")));
    builder.line(format_args!("    if ((u32)e >= {of}u) return -1;\n    u64 set = 0;\n    int before = 0;"));
    for (i, set) in names.iter().enumerate() {
        builder.line(format_args!("    if (e / {BITS} == {i}) set = {set};"));
        builder.line(format_args!("    if (e / {BITS} > {i}) before += __popcll({set});"));
    }
    builder.line(format_args!(
        "    return set >> e % {BITS} & 1 ? before + __popcll(set & ((1ull << e % {BITS}) - 1)) : -1;\n}}"
    ));
    builder.line(format_args!("#define LOCAL_OF(e) local_of(e, {})", names.join(", ")));
    for (set, name) in (0..).zip(&names) {
        let of_set = experts.iter().filter(|&&expert| expert / BITS == set);
        builder.long(name, of_set.fold(0u64, |bits, expert| bits | 1 << (expert % BITS)) as i64);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{Arg, DType, Semantic, Slot};

    fn local(rows: u64, of: u64, experts: &[u64]) -> Semantic {
        let op = Op::LocalExperts { of, experts: experts.to_vec() };
        let body = vec![Instr(op, vec![Slot::In(0)], vec![Slot::Out(0)])];
        semantic(&[(DType::I32, vec![rows, 4])], &[(DType::I32, vec![rows, 4])], &[], body)
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
        assert!(
            candidates(&LocalExperts, &local(64, 64 * 24 + 1, &[1])).is_empty(),
            "more than there are parameters for"
        );
    }
}
