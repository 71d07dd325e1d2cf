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
    let instr @ Instr(op @ Op::LocalExperts { .. }, ..) = only(semantic)? else { return None };
    let ([chosen], [local]) = (args(instr)?, results(instr)?);
    let [rows, k] = dims(semantic, chosen)?;
    let count = rows.checked_mul(k).filter(|&count| count <= i32::MAX as u64 / 2)?;
    let mut builder = Builder::new(problem);
    builder.pointer("local", local).pointer("chosen", chosen).int("count", count);
    declare(&mut builder, op, k)?;
    Some(builder.finish("", [blocks(count, THREADS), 1, 1], THREADS, 0))
}

/// Declares `LOCAL_OF(chosen, i)`, the place of choice i of rows of k among the experts that this rank has, or -1, with the parameters that it
/// needs. The experts themselves are arguments, so that ranks share a kernel, and so are the copies of them: binary digits of how
/// many there are beside one, and of which one this is, a set for each digit. None if there are more experts than parameters have room for.
pub(super) fn declare(builder: &mut Builder, op: &Op, k: u64) -> Option<()> {
    let Op::LocalExperts { of, experts, copies, copy } = op else { return None };
    let count = of.div_ceil(BITS);
    let digits = copies.iter().map(|copies| copies.saturating_sub(1)).max().map_or(0, |most| 64 - most.leading_zeros());
    if count * u64::from(1 + 2 * digits) > MOST_SETS {
        return None;
    }
    let digits: Vec<u32> = (0..digits).collect();
    let names = |set: u64| {
        let of_digits = |what| digits.iter().map(move |digit| format!("{what}{set}_{digit}"));
        let names = std::iter::once(format!("set{set}")).chain(of_digits("copies")).chain(of_digits("copy"));
        names.collect::<Vec<_>>()
    };
    let names: Vec<String> = (0..count).flat_map(names).collect();
    let formal: Vec<String> = names.iter().map(|set| format!("u64 {set}")).collect();
    builder.line(format_args!(
        "__device__ __forceinline__ int local_of(const int* chosen, int i, {}) {{",
        formal.join(", ")
    ));
    builder.line(format_args!("    int e = chosen[i];\n    if ((u32)e >= {of}u) return -1;"));
    builder.line("    u64 set = 0;\n    int before = 0;\n    u32 copies = 1, copy = 0;");
    for i in 0..count {
        builder.line(format_args!("    if (e / {BITS} == {i}) {{\n        set = set{i};"));
        for digit in &digits {
            for what in ["copies", "copy"] {
                builder.line(format_args!("        {what} += (u32)({what}{i}_{digit} >> e % {BITS} & 1) << {digit};"));
            }
        }
        builder.line(format_args!("    }}\n    if (e / {BITS} > {i}) before += __popcll(set{i});"));
    }
    builder.line(format_args!("    if (!(set >> e % {BITS} & 1)) return -1;"));
    if !digits.is_empty() {
        // As `plan::turn` has it.
        builder.line("    if (copies > 1) {\n        u32 hash = 0;");
        builder.line(format_args!(
            "        for (int j = 0; j < {k}; j++) hash = (hash ^ (u32)chosen[i / {k} * {k} + j]) * 0x9e3779b1u;"
        ));
        builder.line("        if (__umulhi(hash, copies) != copy) return -1;\n    }");
    }
    builder.line(format_args!("    return before + __popcll(set & ((1ull << e % {BITS}) - 1));\n}}"));
    builder.line(format_args!("#define LOCAL_OF(chosen, i) local_of(chosen, i, {})", names.join(", ")));
    let digit = |of: &[u64], at: usize, digit: u32, less: u64| of.get(at).is_some_and(|n| (n - less) >> digit & 1 == 1);
    for set in 0..count {
        let bits = |is_in: &dyn Fn(usize) -> bool| {
            let of_set = experts.iter().enumerate().filter(|&(at, &expert)| expert / BITS == set && is_in(at));
            of_set.fold(0u64, |bits, (_, &expert)| bits | 1 << (expert % BITS))
        };
        let of_copies = digits.iter().map(|&d| bits(&|at| digit(copies, at, d, 1)));
        let of_copy = digits.iter().map(|&d| bits(&|at| digit(copy, at, d, 0)));
        let sets = std::iter::once(bits(&|_| true)).chain(of_copies).chain(of_copy);
        let first = set as usize * (1 + 2 * digits.len());
        names[first..].iter().zip(sets).for_each(|(name, bits)| {
            builder.long(name, bits as i64);
        });
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{Arg, DType, Semantic, Slot};

    fn local(rows: u64, of: u64, experts: &[u64]) -> Semantic {
        copied(rows, of, experts, &[], &[])
    }

    fn copied(rows: u64, of: u64, experts: &[u64], copies: &[u64], copy: &[u64]) -> Semantic {
        let (experts, copies, copy) = (experts.to_vec(), copies.to_vec(), copy.to_vec());
        let op = Op::LocalExperts { of, experts, copies, copy };
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
        // Copies are arguments, too: bits 0 and 1 of how many beside one, then of which this is, for 64 experts at a time.
        let first = candidates(&LocalExperts, &copied(64, 70, &[0, 3, 65], &[3, 1, 4], &[2, 0, 1])).swap_remove(0);
        let second = candidates(&LocalExperts, &copied(64, 70, &[1, 65], &[1, 4], &[0, 3])).swap_remove(0);
        assert_eq!(first.launch.args[3..], [9, 0, 1, 0, 1, 2, 2, 2, 2, 0].map(Arg::Long));
        assert_eq!(first.prelude(), second.prelude());
        write_text(&LocalExperts, &copied(64, 70, &[1, 65], &[1, 4], &[0, 3]), 0, "copies");
        assert!(
            candidates(&LocalExperts, &local(64, 64 * 24 + 1, &[1])).is_empty(),
            "more than there are parameters for"
        );
    }
}
