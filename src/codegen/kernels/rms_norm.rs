//! `kernels/rms_norm.cu`: RMSNorm over groups of a row, of all rows or of chosen ones.

use super::builder::{Builder, Specialised};
use super::pattern::{Body, args, dims, dtype, results, rows_and_last, ty};
use super::{Problem, Twin};
use crate::plan::{DType, Op, Semantic, Slot};

/// The twin.
pub struct RmsNorm;

/// Threads of a block whose warps work on groups of their own.
const WARPS: u32 = 128;
/// The most packs that a thread keeps in registers, by the kernel.
const MOST_KEPT: u64 = 8;

impl Twin for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/rms_norm.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(norm) = Norm::of(problem.semantic) else { return vec![] };
        let packs = norm.group / norm.vector;
        let mut shapes = vec![];
        if packs <= 32 {
            shapes.push((packs.next_power_of_two() as u32, WARPS));
        } else {
            // A whole block, of few threads with several packs each or of many.
            let most = if packs <= 1024 { 256 } else { 1024 };
            let threads = packs.next_multiple_of(32).min(most) as u32;
            shapes.push((threads, threads));
            if packs.div_ceil(32) <= MOST_KEPT {
                shapes.push((32, WARPS));
            }
        }
        shapes.into_iter().filter_map(|(lanes, threads)| norm.specialise(problem, lanes, threads)).collect()
    }
}

struct Norm {
    x: Slot,
    /// The choice of rows.
    rows: Option<Slot>,
    weight: Slot,
    y: Slot,
    eps: f64,
    /// Elements of a group.
    group: u64,
    /// Elements that a thread loads as one.
    vector: u64,
}

impl Norm {
    fn of(semantic: &Semantic) -> Option<Norm> {
        let mut body = Body::of(semantic);
        let gather = body.take(|op| matches!(op, Op::GatherRows).then_some(()));
        let (eps, norm) = body.take(|op| if let Op::RmsNorm { eps } = op { Some(*eps) } else { None })?;
        let ([normed, weight], [y]) = (args(norm)?, results(norm)?);
        let (x, rows) = match gather {
            None => (normed, None),
            Some((_, gather)) => {
                let ([x, rows], [gathered]) = (args(gather)?, results(gather)?);
                let inside = gathered == normed && matches!(gathered, Slot::Temp(_));
                // Gathering does not convert.
                if !inside || dtype(semantic, gathered) != dtype(semantic, x) || dtype(semantic, rows) != DType::I32 {
                    return None;
                }
                (x, Some(rows))
            }
        };
        let [group] = dims(semantic, weight)?;
        let (_, width) = rows_and_last(semantic, x);
        let types = [x, weight, y].map(|slot| dtype(semantic, slot));
        let inputs = [Some(x), Some(weight), rows].into_iter().flatten().all(|slot| matches!(slot, Slot::In(_)));
        let shapes = ty(semantic, y).1 == ty(semantic, normed).1 && group > 0 && width.is_multiple_of(group);
        if !body.rest.is_empty() || !inputs || !shapes || types.contains(&DType::I32) || group > i32::MAX as u64 {
            return None;
        }
        let widest = 16 / types[0].bytes();
        let vector = [8, 4, 2, 1].into_iter().find(|&n| n <= widest && group.is_multiple_of(n))?;
        matches!(y, Slot::Out(_)).then_some(Norm { x, rows, weight, y, eps, group, vector })
    }

    fn specialise(&self, problem: &Problem, lanes: u32, threads: u32) -> Option<Specialised> {
        let semantic = problem.semantic;
        let (rows, width) = rows_and_last(semantic, self.y);
        let groups = rows * (width / self.group);
        let blocks = groups.div_ceil(u64::from(threads / lanes));
        if groups > i32::MAX as u64 {
            return None;
        }
        let mut builder = Builder::new(problem);
        builder.constant("D", self.group).constant("VECTOR", self.vector).constant("LANES", u64::from(lanes));
        builder.number("EPS", self.eps as f32);
        builder.alias("X", dtype(semantic, self.x)).alias("W", dtype(semantic, self.weight));
        builder.alias("Y", dtype(semantic, self.y));
        builder.line(format_args!("#define GATHER {}", u8::from(self.rows.is_some())));
        builder.pointer("y", self.y).pointer("x", self.x).pointer("weight", self.weight).int("groups", groups);
        if let Some(slot) = self.rows {
            builder.constant("PER_ROW", width / self.group);
            builder.pointer("rows", slot).int("x_rows", rows_and_last(semantic, self.x).0);
        }
        Some(builder.finish(format!("lanes={lanes}"), [blocks, 1, 1], threads, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{dump, instr, semantic, ty};
    use super::*;
    use crate::plan::{Phase, TensorType};

    fn norm(x: DType, rows: u64, width: u64, group: u64) -> Semantic {
        let types = (vec![ty(x, &[rows, width]), ty(DType::BF16, &[group])], vec![ty(x, &[rows, width])]);
        let body = vec![instr(Op::RmsNorm { eps: 1e-5 }, &[Slot::In(0), Slot::In(1)], &[Slot::Out(0)])];
        semantic(types, vec![], body)
    }

    fn gathered(temp: TensorType, wired: Slot) -> Semantic {
        let inputs = vec![ty(DType::BF16, &[64, 2048]), ty(DType::I32, &[5]), ty(DType::BF16, &[2048])];
        let body = vec![
            instr(Op::GatherRows, &[Slot::In(0), Slot::In(1)], &[Slot::Temp(0)]),
            instr(Op::RmsNorm { eps: 1e-5 }, &[wired, Slot::In(2)], &[Slot::Out(0)]),
        ];
        semantic((inputs, vec![ty(DType::BF16, &[5, 2048])]), vec![temp], body)
    }

    fn candidates(semantic: &Semantic) -> Vec<Specialised> {
        RmsNorm.candidates(&Problem { semantic, phase: Phase::Prefill })
    }

    #[test]
    fn whole_rows_heads_and_odd_sizes() {
        let configs = |semantic: Semantic| -> Vec<String> {
            dump(&RmsNorm, &semantic, Phase::Prefill);
            candidates(&semantic).into_iter().map(|c| c.config).collect()
        };
        assert_eq!(configs(norm(DType::BF16, 8192, 2048, 2048)), ["lanes=256", "lanes=32"]);
        assert_eq!(configs(norm(DType::F32, 9, 2048, 64)), ["lanes=16"]);
        assert_eq!(configs(norm(DType::F16, 9, 21, 7)), ["lanes=8"]);
        assert_eq!(configs(norm(DType::F32, 9, 1000, 1000)), ["lanes=256", "lanes=32"]);
        assert_eq!(configs(norm(DType::BF16, 2, 100_001, 100_001)), ["lanes=1024"]);
        let heads = candidates(&norm(DType::BF16, 10, 2048, 64));
        assert_eq!(heads[0].launch.grid, [320 / 16, 1, 1]);
    }

    #[test]
    fn chosen_rows_are_gathered_in_the_kernel() {
        let fits = gathered(ty(DType::BF16, &[5, 2048]), Slot::Temp(0));
        assert_eq!(candidates(&fits).len(), 2);
        dump(&RmsNorm, &fits, Phase::Prefill);
        assert!(candidates(&gathered(ty(DType::BF16, &[5, 2048]), Slot::In(0))).is_empty(), "another value is normed");
        assert!(candidates(&gathered(ty(DType::F32, &[5, 2048]), Slot::Temp(0))).is_empty(), "the rows are converted");
    }

    #[test]
    fn only_norms_of_numbers_match() {
        let mut other = norm(DType::BF16, 4, 64, 64);
        other.inputs[0].0 = DType::I32;
        assert!(candidates(&other).is_empty());
        let mut longer = norm(DType::BF16, 4, 64, 64);
        longer.body.push(longer.body[0].clone());
        assert!(candidates(&longer).is_empty());
    }

    #[test]
    fn buckets_share_the_kernel() {
        let text = |rows| candidates(&norm(DType::BF16, rows, 2048, 2048))[0].prelude();
        assert_eq!(text(1), text(8192));
    }
}
