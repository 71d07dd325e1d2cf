//! `kv_write`: keys and values to the paged cache, of any size and type.

use super::builder::{Builder, Specialised};
use super::heads::Cache;
use super::hopper::PROCESSORS;
use super::pattern::{args, dtype, only, rows_and_last};
use super::{Problem, Twin};
use crate::plan::{DType, Op, Slot};

/// The twin.
pub struct KvWrite;

const THREADS: u32 = 256;
const MOST_BLOCKS: u64 = PROCESSORS * 16;

impl Twin for KvWrite {
    fn name(&self) -> &'static str {
        "kv_write"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/kv_write.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        [4, 8, 1].into_iter().filter_map(|vector| specialise(problem, vector)).collect()
    }
}

fn specialise(problem: &Problem, vector: u64) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr = only(semantic)?;
    let (Op::KvWrite, [k @ Slot::In(_), v @ Slot::In(_), kv, table, pos, slot]) = (&instr.0, args(instr)?) else {
        return None;
    };
    let cache = Cache::of(semantic, [kv, table, pos, slot])?;
    let (rows, width) = rows_and_last(semantic, k);
    let loads = [k, v, kv].map(|slot| dtype(semantic, slot));
    let typed = !loads.contains(&DType::I32) && loads.iter().all(|dtype| dtype.bytes() * vector <= 16);
    let fits = width == cache.kv_heads * cache.head && rows_and_last(semantic, v) == (rows, width);
    if !typed || !fits || !cache.head.is_multiple_of(vector) {
        return None;
    }
    let mut builder = Builder::new(problem);
    cache.constants(&mut builder);
    builder.constant("VECTOR", vector).pointer("k", k).pointer("v", v);
    cache.parameters(&mut builder, true);
    builder.int("rows", rows);
    let blocks = (rows * width / vector).div_ceil(u64::from(THREADS)).min(MOST_BLOCKS);
    Some(builder.finish(format!("vector={vector}"), [blocks, 1, 1], THREADS, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::kernels::heads::testing::{problem, sizes};

    #[test]
    fn vectors_divide_heads_and_are_sixteen_bytes_at_the_most() {
        let configs = |dtype, head| {
            let found = sizes(dtype).head(head).kv_write();
            KvWrite.candidates(&problem(&found)).into_iter().map(|found| found.config).collect::<Vec<_>>()
        };
        assert_eq!(configs(DType::BF16, 64), ["vector=4", "vector=8", "vector=1"]);
        assert_eq!(configs(DType::F32, 64), ["vector=4", "vector=1"]);
        assert_eq!(configs(DType::F16, 7), ["vector=1"]);
    }

    #[test]
    fn the_cache_is_written_and_rows_are_an_argument() {
        let text = |rows| KvWrite.candidates(&problem(&sizes(DType::F16).rows(rows).kv_write()))[0].prelude();
        assert_eq!(text(2), text(900));
        assert!(text(2).contains("f16* kv") && !text(2).contains("const f16* __restrict__ kv"), "{}", text(2));
    }

    #[test]
    fn nothing_else_matches() {
        assert!(KvWrite.candidates(&problem(&sizes(DType::F16).prepared())).is_empty());
        let mut wrong = sizes(DType::F16).kv_write();
        wrong.inputs[4].0 = DType::F32;
        assert!(KvWrite.candidates(&problem(&wrong)).is_empty(), "positions of another type");
    }
}
