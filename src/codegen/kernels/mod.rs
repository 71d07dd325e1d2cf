//! The kernel registry: for each source file in `kernels/` its Rust twin, which knows the steps that the kernel can run, the
//! constants to specialise it with, its parameters and its launch.
//!
//! A twin looks at a step's semantic alone, never at a name or a label. What it returns are *candidates*: configurations that
//! all compute the step, best guess first. The twins stand in one table, the more special before the more general and, where
//! several run a step, what measurements mostly chose before the others; the first candidate of the first twin that has one is
//! the default, and tactics may name another.

mod attention;
mod attention_decode;
mod attention_prefill;
mod attention_tile_fma;
mod block_sum;
mod builder;
mod expression;
mod flash;
mod frame;
mod gather_rows;
mod group_rows;
mod head_rope;
mod heads;
mod hopper;
mod kv_write;
mod local_experts;
mod normed;
mod pattern;
mod pointwise;
mod product;
mod ring;
mod rms_norm;
mod rope;
mod router;
mod router_few;
mod routing;
mod row_sum;
mod sample;
mod select;
mod services;
mod short_conv;
mod split;
mod stream;
mod stream_fma;
#[cfg(test)]
mod testing;
mod tile;
mod tile_fma;
mod tiles;
#[cfg(test)]
mod trial;
mod weighted_sum;
mod wgmma;

pub use self::builder::{Builder, Specialised};
pub use self::pattern::is_weight;
pub use self::services::{ServiceKernel, services};
use crate::plan::{Launch, Phase, Semantic};

/// A step, as a twin sees it.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// What it computes, with the bucket's sizes.
    pub semantic: &'a Semantic,
    /// The bucket's phase: in [`Phase::Decode`] each sequence has one row.
    pub phase: Phase,
}

/// A kernel's Rust twin.
pub trait Twin: Sync {
    /// Name of its source file in `kernels/`, and of the function in it.
    fn name(&self) -> &'static str;

    /// Text of its source file.
    fn source(&self) -> &'static str;

    /// The ways in which this kernel can run a step, best guess first; none if it cannot.
    fn candidates(&self, problem: &Problem) -> Vec<Specialised>;

    /// Whether it multiplies numbers of f32 as such. What takes them apart is never a default: it stands behind a twin that does not,
    /// and is chosen by tactics.
    fn exact(&self) -> bool {
        true
    }
}

/// Every kernel that steps launch, the more special before the more general.
#[rustfmt::skip]
pub static TWINS: &[&dyn Twin] = &[
    &ring::Ring,
    &wgmma::WHOLE,
    &tile::Tile,
    &stream::Stream,
    &stream_fma::StreamFma,
    &tile_fma::TileFma,
    &wgmma::SPLIT,
    &router_few::RouterFew,
    &router::Router,
    &local_experts::LocalExperts,
    &group_rows::GroupRows,
    &weighted_sum::WeightedSum,
    &block_sum::BlockSum,
    &select::TopK,
    &select::GatherColumns,
    &row_sum::RowSum,
    &sample::Sample,
    &short_conv::ShortConv,
    &rms_norm::RmsNorm,
    &gather_rows::GatherRows,
    &split::Split,
    &pointwise::Pointwise,
    &head_rope::HeadRope,
    &rope::Rope,
    &kv_write::KvWrite,
    &flash::Flash,
    &attention_prefill::AttentionPrefill,
    &attention_tile_fma::MANY,
    &attention_decode::AttentionDecode,
    &attention_tile_fma::FEW,
    &attention::Attention,
];

/// The files that sources include, by name.
pub static HEADERS: &[(&str, &str)] = &[
    ("attention.cuh", include_str!("../../../kernels/include/attention.cuh")),
    ("block.cuh", include_str!("../../../kernels/include/block.cuh")),
    ("bulk.cuh", include_str!("../../../kernels/include/bulk.cuh")),
    ("cluster.cuh", include_str!("../../../kernels/include/cluster.cuh")),
    ("convolution.cuh", include_str!("../../../kernels/include/convolution.cuh")),
    ("eight.cuh", include_str!("../../../kernels/include/eight.cuh")),
    ("fma.cuh", include_str!("../../../kernels/include/fma.cuh")),
    ("group.cuh", include_str!("../../../kernels/include/group.cuh")),
    ("layout.cuh", include_str!("../../../kernels/include/layout.cuh")),
    ("list.cuh", include_str!("../../../kernels/include/list.cuh")),
    ("mma.cuh", include_str!("../../../kernels/include/mma.cuh")),
    ("normed.cuh", include_str!("../../../kernels/include/normed.cuh")),
    ("packed.cuh", include_str!("../../../kernels/include/packed.cuh")),
    ("parts.cuh", include_str!("../../../kernels/include/parts.cuh")),
    ("ring_fma.cuh", include_str!("../../../kernels/include/ring_fma.cuh")),
    ("ring_mma.cuh", include_str!("../../../kernels/include/ring_mma.cuh")),
    ("ring_packed.cuh", include_str!("../../../kernels/include/ring_packed.cuh")),
    ("ring_sums.cuh", include_str!("../../../kernels/include/ring_sums.cuh")),
    ("rope.cuh", include_str!("../../../kernels/include/rope.cuh")),
    ("route.cuh", include_str!("../../../kernels/include/route.cuh")),
    ("runs.cuh", include_str!("../../../kernels/include/runs.cuh")),
    ("select.cuh", include_str!("../../../kernels/include/select.cuh")),
    ("softmax.cuh", include_str!("../../../kernels/include/softmax.cuh")),
    ("stage.cuh", include_str!("../../../kernels/include/stage.cuh")),
    ("stream.cuh", include_str!("../../../kernels/include/stream.cuh")),
    ("terms.cuh", include_str!("../../../kernels/include/terms.cuh")),
    ("tiles.cuh", include_str!("../../../kernels/include/tiles.cuh")),
    ("types.cuh", include_str!("../../../kernels/include/types.cuh")),
    ("wgmma.cuh", include_str!("../../../kernels/include/wgmma.cuh")),
];

/// A kernel with a configuration for a step.
pub struct Candidate {
    /// Its twin.
    pub twin: &'static dyn Twin,
    /// The configuration.
    pub specialised: Specialised,
}

/// All candidates for a step, the default first.
pub fn candidates(problem: &Problem) -> Vec<Candidate> {
    let of_twin = |twin: &'static dyn Twin| {
        let list = twin.candidates(problem).into_iter();
        list.map(move |specialised| Candidate { twin, specialised })
    };
    TWINS.iter().flat_map(|twin| of_twin(*twin)).collect()
}

/// Blocks for work whose kernel lets a block do several parts: as many as the device has room for, or nearly.
fn blocks(threads_of_work: u64, threads: u32) -> u64 {
    threads_of_work.div_ceil(u64::from(threads)).min(hopper::PROCESSORS * 16)
}

impl Candidate {
    /// What tactics call it: `stream rows=16 warps=8`.
    pub fn name(&self) -> String {
        format!("{} {}", self.twin.name(), self.specialised.config).trim_end().to_owned()
    }

    /// The whole text to compile: generated constants, then the source.
    pub fn text(&self) -> String {
        format!("{}\n{}", self.specialised.prelude(), self.twin.source())
    }

    /// The launch, of the kernel with this position in the plan.
    pub fn launch(&self, kernel: u32) -> Launch {
        Launch { kernel, ..self.specialised.launch.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_all_of_the_folder() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/include");
        let files = std::fs::read_dir(folder).expect("headers are there");
        let mut names: Vec<String> =
            files.map(|file| file.expect("a file").file_name().into_string().expect("a name in ASCII")).collect();
        names.sort_unstable();
        assert_eq!(HEADERS.iter().map(|(name, _)| *name).collect::<Vec<_>>(), names);
    }
}
