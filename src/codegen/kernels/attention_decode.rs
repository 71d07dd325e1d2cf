//! `attention_decode`: attention of few rows with the positions dealt out over a cluster, alone or with all that a decode step
//! does to its heads before.

use super::builder::{Builder, Specialised};
use super::heads::{Attend, Prepared, halves, vector};
use super::hopper::{MOST_SHARED, PROCESSORS};
use super::pattern::{dtype, only};
use super::{Problem, Twin};
use crate::plan::{Instr, Op, Phase, Slot};

/// The twin.
pub struct AttentionDecode;

/// Numbers of queries and as many of sums that a lane holds.
const MOST_NUMBERS: u64 = 64;
/// Blocks from which on the device has enough to do without more of them.
const ENOUGH_BLOCKS: u64 = PROCESSORS * 4;

impl Twin for AttentionDecode {
    fn name(&self) -> &'static str {
        "attention_decode"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/attention_decode.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(attention) = Attention::of(problem) else { return vec![] };
        let clusters: Vec<u32> = match problem.phase {
            Phase::Decode => {
                let best = attention.best_cluster();
                [best].into_iter().chain([8, 4, 2, 1].into_iter().filter(|&other| other != best)).collect()
            }
            _ => vec![1],
        };
        let shapes = [4, 8].into_iter().flat_map(|warps| clusters.iter().map(move |&cluster| (warps, cluster)));
        shapes.filter_map(|(warps, cluster)| attention.specialise(problem, warps, cluster)).collect()
    }
}

/// An attention and how its heads are held.
struct Attention {
    attend: Attend,
    prepared: Option<Prepared>,
    vector: u64,
    lanes: u64,
    spans: u64,
    share: u64,
}

impl Attention {
    fn of(problem: &Problem) -> Option<Attention> {
        let semantic = problem.semantic;
        let instr = semantic.body.iter().find(|Instr(op, ..)| matches!(op, Op::Attention { .. }))?;
        let attend = Attend::of(semantic, instr)?;
        let prepared = match attend.q {
            Slot::In(_) => {
                only(semantic)?;
                None
            }
            q => {
                // Only where each sequence has one row does no row need a key that another makes.
                let prepared = Prepared::of(semantic, q, 1).filter(|found| found.cache == attend.cache)?;
                if problem.phase != Phase::Decode || prepared.half() > 8 * 32 {
                    return None;
                }
                Some(prepared)
            }
        };
        let head = attend.cache.head;
        // Queries that are inputs are loaded by the same vectors.
        let vector = vector(dtype(semantic, attend.cache.kv), head);
        let lanes = (head / vector).next_power_of_two().min(32);
        let spans = (head / vector).div_ceil(lanes);
        let share = attend.share(MOST_NUMBERS / (vector * spans))?;
        Some(Attention { attend, prepared, vector, lanes, spans, share })
    }

    /// Clusters of one block of four warps.
    fn units(&self) -> u64 {
        self.attend.rows * self.attend.cache.kv_heads * (self.attend.group() / self.share)
    }

    /// As many blocks as the device has room for at once, and no more of them than a sequence has chunks.
    fn best_cluster(&self) -> u32 {
        let context = self.attend.cache.page * self.attend.cache.pages_per_slot;
        let useful = |cluster: u64| self.units() * cluster <= ENOUGH_BLOCKS && context >= cluster * self.chunk(4);
        [8, 4, 2].into_iter().find(|&cluster| useful(cluster)).unwrap_or(1) as u32
    }

    /// Positions that a group of lanes works on at a time.
    fn step(&self) -> u64 {
        (4 / self.spans).max(1)
    }

    fn chunk(&self, warps: u64) -> u64 {
        warps * 32 / self.lanes * self.step()
    }

    fn specialise(&self, problem: &Problem, warps: u64, cluster: u32) -> Option<Specialised> {
        let Attention { attend, share, .. } = self;
        let (teams, head) = (warps * 32 / self.lanes, attend.cache.head);
        let shared = (teams * share * head + 2 * share * head + 2 * head + 2 * teams * share + 2 * share) * 4;
        let blocks = self.units() * u64::from(cluster);
        if shared > MOST_SHARED || blocks > i32::MAX as u64 {
            return None;
        }
        let mut builder = Builder::new(problem);
        attend.constants(&mut builder, *share);
        builder.constant("VEC", self.vector).constant("LANES", self.lanes).constant("STEP", self.step());
        builder.constant("CLUSTER", u64::from(cluster)).cluster(cluster);
        // Scores count in powers of two.
        builder.number("SCALE", attend.scale * std::f32::consts::LOG2_E);
        match &self.prepared {
            Some(prepared) => {
                // As few elements a lane as go, because each takes a sine and a cosine.
                let narrow = [1, 2].into_iter().find(|widest| prepared.half() <= 32 * widest).unwrap_or(4);
                let (vector, _) = halves(prepared.half(), narrow);
                builder.line("#define FUSED").constant("E", vector);
                prepared.declare(&mut builder);
            }
            None => {
                builder.pointer("q", attend.q);
            }
        }
        attend.cache.parameters(&mut builder, self.prepared.is_some());
        let cache = attend.cache;
        builder.early("early", &[cache.kv, cache.table, cache.pos, cache.slot]);
        builder.pointer("y", attend.y);
        let config = format!("warps={warps} cluster={cluster}");
        Some(builder.finish(config, [blocks, 1, 1], warps as u32 * 32, shared))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::kernels::heads::testing::{decode, problem, sizes};
    use crate::plan::{DType, Semantic};

    fn found(semantic: &Semantic) -> Vec<Specialised> {
        AttentionDecode.candidates(&decode(semantic))
    }

    #[test]
    fn few_rows_are_spread_over_clusters() {
        let clusters = |rows| found(&sizes(DType::BF16).rows(rows).fused())[0].launch.cluster;
        assert_eq!([1, 8, 16, 33, 256].map(clusters), [8, 8, 4, 2, 1]);
        let all: Vec<String> = found(&sizes(DType::BF16).rows(8).fused()).into_iter().map(|c| c.config).collect();
        assert_eq!(all[..4], ["warps=4 cluster=8", "warps=4 cluster=4", "warps=4 cluster=2", "warps=4 cluster=1"]);
        assert_eq!(all.len(), 8);
        let short = sizes(DType::BF16).pages_per_slot(2);
        assert_eq!(found(&short.rows(1).fused())[0].launch.cluster, 2, "two chunks of positions at the most");
    }

    #[test]
    fn rows_are_in_the_grid_alone() {
        for semantic in [|rows| sizes(DType::F16).rows(rows).fused(), |rows| sizes(DType::F16).rows(rows).attention()] {
            let texts: Vec<String> = [3, 7].map(|rows| found(&semantic(rows))[0].prelude()).into_iter().collect();
            assert_eq!(texts[0], texts[1]);
            let grids = [3, 7].map(|rows| found(&semantic(rows))[0].launch.grid);
            assert_eq!(grids, [[3 * 8 * 8, 1, 1], [7 * 8 * 8, 1, 1]]);
        }
    }

    #[test]
    fn any_even_head_up_to_512() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for head in [2, 6, 16, 40, 64, 80, 96, 128, 250, 256, 512] {
                assert!(!found(&sizes(dtype).head(head).fused()).is_empty(), "{dtype:?} {head}");
            }
        }
        assert!(!found(&sizes(DType::BF16).head(7).attention()).is_empty());
    }

    #[test]
    fn with_other_rows_of_a_sequence_only_attention_by_itself() {
        let semantic = sizes(DType::BF16).fused();
        assert!(AttentionDecode.candidates(&problem(&semantic)).is_empty());
        let alone = AttentionDecode.candidates(&problem(&sizes(DType::F32).attention()));
        assert!(!alone.is_empty() && alone.iter().all(|found| found.launch.cluster == 1));
    }

    #[test]
    fn nothing_else_matches() {
        assert!(found(&sizes(DType::BF16).prepared()).is_empty());
        let mut wrong = sizes(DType::BF16).fused();
        wrong.inputs.push(wrong.inputs[4].clone());
        wrong.body[6].1[1] = Slot::In(7);
        assert!(found(&wrong).is_empty(), "attention over another cache");
        let mut wrong = sizes(DType::BF16).fused();
        wrong.body[6].1[0] = Slot::Temp(3);
        assert!(found(&wrong).is_empty(), "queries that are not rotated");
        let mut wrong = sizes(DType::BF16).fused();
        wrong.inputs[6].0 = DType::F32;
        assert!(found(&wrong).is_empty(), "slots of another type");
    }
}
