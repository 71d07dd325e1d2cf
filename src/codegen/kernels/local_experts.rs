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
    if of.div_ceil(BITS) > MOST_SETS {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.pointer("local", local).pointer("chosen", chosen).int("count", count);
    declare(&mut builder, *of, experts);
    Some(builder.finish("", [blocks(count, THREADS), 1, 1], THREADS, 0))
}

/// Declares `EXPERTS`, all there are, `HAS(e)` and `BEFORE(e)`, with the parameters that they need. The experts themselves are
/// arguments, so that ranks share a kernel.
fn declare(builder: &mut Builder, of: u64, experts: &[u64]) {
    let sets: Vec<u64> = (0..of.div_ceil(BITS))
        .map(|set| experts.iter().filter(|&&e| e / BITS == set).fold(0, |bits, e| bits | 1 << (e % BITS)))
        .collect();
    let names: Vec<String> = (0..sets.len()).map(|set| format!("set{set}")).collect();
    let has: Vec<String> =
        names.iter().enumerate().map(|(i, set)| format!("(e / {BITS} == {i} && ({set} >> e % {BITS} & 1))")).collect();
    let below = |(i, set): (usize, &String)| {
        format!("__popcll({set} & (e / {BITS} > {i} ? ~0ull : e / {BITS} == {i} ? (1ull << e % {BITS}) - 1 : 0ull))")
    };
    let before: Vec<String> = names.iter().enumerate().map(below).collect();
    builder.constant("EXPERTS", of);
    let formal: Vec<String> = names.iter().map(|set| format!("u64 {set}")).collect();
    for (name, value, result) in [("has", has.join(" || "), "bool"), ("before", before.join(" + "), "int")] {
        builder.line(format_args!(
            "__device__ __forceinline__ {result} {name}(int e, {}) {{ return {value}; }}",
            formal.join(", ")
        ));
        builder.line(format_args!("#define {}(e) {name}(e, {})", name.to_uppercase(), names.join(", ")));
    }
    for (name, set) in names.iter().zip(sets) {
        builder.long(name, set as i64);
    }
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
