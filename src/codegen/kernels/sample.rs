//! `kernels/sample.cu`: the choice of each row's next token, by a cluster a row.

use super::builder::{Builder, Specialised};
use super::hopper::PROCESSORS;
use super::pattern::{args, dims, dtype, only, results};
use super::{Problem, Twin};
use crate::plan::{DType, Instr, Op};

/// The twin.
pub struct Sample;

/// Threads for which the device has room at once, with the registers that they need.
const MOST_THREADS: u64 = PROCESSORS * 512;

impl Twin for Sample {
    fn name(&self) -> &'static str {
        "sample"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/sample.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let all = [8, 4, 2, 1].map(|cluster| specialise(problem, cluster));
        let mut found: Vec<Specialised> = all.into_iter().flatten().collect();
        // The most blocks a row with which all rows still run at once.
        let first = found.iter().position(|c| u64::from(c.launch.grid[0]) * u64::from(c.launch.block) <= MOST_THREADS);
        let first = first.unwrap_or(found.len().saturating_sub(1));
        let rest = found.split_off(first);
        rest.into_iter().chain(found).collect()
    }
}

fn specialise(problem: &Problem, cluster: u32) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr @ Instr(Op::Sample, ..) = only(semantic)? else { return None };
    let ([logits, rows, pos, slot, sampling], [next]) = (args(instr)?, results(instr)?);
    let [count, vocab] = dims(semantic, logits)?;
    let element = dtype(semantic, logits);
    if element == DType::I32 || vocab == 0 || vocab > i32::MAX as u64 / 2 || count > i32::MAX as u64 / 8 {
        return None;
    }
    let vector = [8, 4, 2, 1].into_iter().find(|n| vocab.is_multiple_of(*n) && n * element.bytes() <= 16)?;
    let mut builder = Builder::new(problem);
    builder.cluster(cluster).constant("CLUSTER", u64::from(cluster));
    builder.constant("V", vocab).constant("VECTOR", vector).alias("L", element);
    builder.pointer("next", next).pointer("logits", logits).pointer("rows", rows).pointer("pos", pos);
    builder.pointer("slot", slot).pointer("sampling", sampling);
    // A multiprocessor has room for one large block or two small ones.
    let threads = if cluster >= 4 { 512 } else { 256 };
    Some(builder.finish(format!("cluster={cluster}"), [count * u64::from(cluster), 1, 1], threads, 0))
}

#[cfg(test)]
mod tests {
    use super::super::trial::{candidates, semantic, write_text};
    use super::*;
    use crate::plan::{Semantic, Slot};

    fn sample(rows: u64, vocab: u64, dtype: DType) -> Semantic {
        let body = vec![Instr(Op::Sample, (0..5).map(Slot::In).collect(), vec![Slot::Out(0)])];
        let row_data = |count| (DType::I32, vec![count]);
        let inputs = [(dtype, vec![rows, vocab]), row_data(rows), row_data(64), row_data(64), (DType::I32, vec![9, 8])];
        semantic(&inputs, &[row_data(rows)], &[], body)
    }

    #[test]
    fn many_rows_take_fewer_blocks_each() {
        let first = |rows| candidates(&Sample, &sample(rows, 65536, DType::F32)).swap_remove(0);
        assert_eq!((first(1).launch.grid, first(1).launch.cluster), ([8, 1, 1], 8));
        assert_eq!((first(512).launch.grid, first(512).launch.cluster), ([512, 1, 1], 1));
        assert_eq!(first(1).prelude(), first(8).prelude());
        assert_eq!(candidates(&Sample, &sample(4096, 65536, DType::F32)).len(), 4);
        write_text(&Sample, &sample(1, 65536, DType::F32), 0, "8");
        write_text(&Sample, &sample(512, 65536, DType::F32), 0, "1");
    }

    #[test]
    fn any_vocabulary_and_float_type() {
        for (vocab, dtype, label) in [(7, DType::F32, "seven"), (1000, DType::BF16, "bf16"), (3001, DType::F16, "f16")]
        {
            assert_eq!(candidates(&Sample, &sample(3, vocab, dtype)).len(), 4);
            write_text(&Sample, &sample(3, vocab, dtype), 0, label);
            write_text(&Sample, &sample(3, vocab, dtype), 2, &format!("{label}-2"));
        }
        assert!(candidates(&Sample, &sample(3, 0, DType::F32)).is_empty());
        assert!(candidates(&Sample, &sample(3, 8, DType::I32)).is_empty());
    }
}
