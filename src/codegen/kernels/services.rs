//! The kernels that the runtime launches by itself. Their parameters are told at [`ServiceRole`].

use std::collections::BTreeSet;

use super::builder::{Builder, Specialised};
use crate::plan::{
    AREA_HEADER_BYTES, AREA_STOP, DType, EXCHANGE_BLOCKS, Manifest, PACKET_BYTES, SERVICE_THREADS, ServiceRole, Tensor,
    Weight, WeightSource, collectives, exchange_role, packed,
};

/// A kernel that the runtime launches by itself.
pub struct ServiceKernel {
    /// What it is for.
    pub role: ServiceRole,
    /// Name of its source file in `kernels/`, and of the function in it.
    pub name: &'static str,
    /// Text of its source file.
    pub source: &'static str,
    /// Constants and parameters; the launch has no arguments.
    pub specialised: Specialised,
}

impl ServiceKernel {
    /// The whole text to compile: generated constants, then the source.
    pub fn text(&self) -> String {
        format!("{}\n{}", self.specialised.prelude(), self.source)
    }
}

/// The kernels that a plan's runtime needs: one for each pair of types that elements of a checkpoint are not just copied between,
/// if weights may be synthetic one for each pair of types of tensors and weights, one that packs if there are packed weights, for a
/// language model the two that lead from step to step, and one for each number of parts that ranks exchange. A plan with synthetic weights can be given a checkpoint.
pub fn services(manifest: &Manifest) -> Vec<ServiceKernel> {
    let mut found = vec![];
    if let WeightSource::Synthetic(_) = manifest.model.weights {
        let made = |_: &Weight, tensor: &Tensor| vec![tensor.dtype];
        found.extend(pairs(manifest, made).into_iter().map(|(tensor, weight)| synthesize(tensor, weight)));
    }
    let placed =
        |weight: &Weight, tensor: &Tensor| tensor.dtypes().filter(|&dtype| !weight.is_copy_of(dtype)).collect();
    found.extend(pairs(manifest, placed).into_iter().map(|(tensor, weight)| place(tensor, weight)));
    if manifest.ranks.iter().any(|rank| !rank.packed.is_empty()) {
        found.push(pack());
    }
    let has = |name: &&str| manifest.ranks.iter().flat_map(|rank| &rank.io).any(|io| io.name == **name);
    if ["tokens", "pos", "slot", "rows", "next"].iter().all(has) {
        found.extend([advance(), feed()]);
    }
    let exchanges: BTreeSet<(u64, u64)> = manifest
        .ranks
        .iter()
        .flat_map(collectives)
        .filter_map(exchange_role)
        .filter_map(|role| if let ServiceRole::Exchange(ranks, parts) = role { Some((ranks, parts)) } else { None })
        .collect();
    found.extend(exchanges.into_iter().map(|(ranks, parts)| exchange(ranks, parts)));
    found
}

/// Types of tensors, as `of` says for a weight and each of its tensors, with those of the weights, in a fixed order.
fn pairs(manifest: &Manifest, of: impl Fn(&Weight, &Tensor) -> Vec<DType>) -> Vec<(DType, DType)> {
    let mut pairs = BTreeSet::new();
    for weight in manifest.ranks.iter().flat_map(|rank| &rank.weights) {
        let tensors = weight.layout.tensors().iter().filter_map(|&tensor| manifest.tensors.get(tensor as usize));
        let dtypes = tensors.flat_map(|tensor| of(weight, tensor));
        pairs.extend(dtypes.map(|dtype| (order(dtype), order(weight.ty.0))));
    }
    pairs.into_iter().map(|(tensor, weight)| (TYPES[tensor], TYPES[weight])).collect()
}

const TYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::I32];

fn order(dtype: DType) -> usize {
    TYPES.iter().position(|&ty| ty == dtype).expect("all types are listed")
}

/// What kernels take to know where elements go.
const PLACES: [&str; 5] = ["part", "whole", "run", "stride", "offset"];

fn synthesize(tensor: DType, weight: DType) -> ServiceKernel {
    let names = [&["to", "first", "count", "key", "center", "scale"][..], &PLACES].concat();
    let source = include_str!("../../../kernels/synthesize.cu");
    let builder = with_layout(tensor, weight);
    service(ServiceRole::Synthesize(tensor, weight), "synthesize", source, &names, builder)
}

fn place(tensor: DType, weight: DType) -> ServiceKernel {
    let names = [&["to", "from", "first", "count"][..], &PLACES].concat();
    let source = include_str!("../../../kernels/place.cu");
    let builder = with_layout(tensor, weight);
    service(ServiceRole::Place(tensor, weight), "place", source, &names, builder)
}

fn pack() -> ServiceKernel {
    let source = include_str!("../../../kernels/pack.cu");
    let mut builder = Builder::service();
    for (name, value) in [
        ("SPAN_COLUMNS", packed::SPAN_COLUMNS),
        ("SPAN_BYTES", packed::SPAN_BYTES),
        ("HEADER_WORDS", packed::HEADER_BYTES / 4),
        ("MAX_EXCEPTIONS", packed::MAX_EXCEPTIONS as u64),
        ("CODES", packed::CODES as u64),
        ("BASES", u64::from(packed::MAX_BASE) + 1),
    ] {
        builder.constant(name, value);
    }
    service(ServiceRole::Pack, "pack", source, &["to", "from", "rows", "columns", "failed"], builder)
}

fn advance() -> ServiceKernel {
    let names = ["next", "tokens", "pos", "slot", "rows", "last", "stops", "ring", "number"];
    let names = [&names[..], &["count", "moves", "depth", "width"]].concat();
    let source = include_str!("../../../kernels/advance.cu");
    service(ServiceRole::Advance, "advance", source, &names, Builder::service())
}

fn feed() -> ServiceKernel {
    let names = ["tokens", "pos", "slot", "last", "count"];
    let source = include_str!("../../../kernels/feed.cu");
    service(ServiceRole::Feed, "feed", source, &names, Builder::service())
}

/// The kernel by which so many ranks exchange so many parts.
pub fn exchange(ranks: u64, parts: u64) -> ServiceKernel {
    let numbered = |name: &str, count: u64| -> Vec<String> { (0..count).map(|i| format!("{name}{i}")).collect() };
    let peers = numbered("peer", ranks - 1);
    let part = |i: u64| ["from", "to", "bytes"].map(|name| format!("{name}{i}"));
    let listed: Vec<[String; 3]> = (0..parts).map(part).collect();
    let mut builder = Builder::service();
    for (name, value) in [
        ("RANKS", ranks),
        ("PARTS", parts),
        ("HEADER_BYTES", AREA_HEADER_BYTES),
        ("STOP", AREA_STOP),
        ("PACKET_BYTES", PACKET_BYTES),
        ("MOST_BLOCKS", EXCHANGE_BLOCKS),
    ] {
        builder.constant(name, value);
    }
    builder.line(format_args!("#define PEERS {{{}}}", peers.join(", ")));
    let initial: Vec<String> = listed.iter().map(|part| format!("{{{}}}", part.join(", "))).collect();
    builder.line(format_args!("#define LISTED {{{}}}", initial.join(", ")));
    let names = ["own".to_owned()].into_iter().chain(peers).chain(listed.into_iter().flatten());
    let names: Vec<String> = names.chain(["slots", "slot", "rank", "blocks", "wide"].map(str::to_owned)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let source = include_str!("../../../kernels/exchange.cu");
    service(ServiceRole::Exchange(ranks, parts), "exchange", source, &names, builder)
}

fn with_layout(tensor: DType, weight: DType) -> Builder<'static> {
    let mut builder = Builder::service();
    builder.line("#include \"layout.cuh\"").alias("T", tensor).alias("W", weight);
    builder
}

/// A service whose parameters have these names, and the types that the role says.
fn service(
    role: ServiceRole,
    name: &'static str,
    source: &'static str,
    names: &[&str],
    mut builder: Builder,
) -> ServiceKernel {
    let types = role.params();
    assert_eq!(names.len(), types.len(), "parameters of {name}");
    for (name, ty) in names.iter().zip(types) {
        builder.parameter(name, ty);
    }
    ServiceKernel { role, name, source, specialised: builder.finish("", [1, 1, 1], SERVICE_THREADS, 0) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::write;
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::{CompileOptions, Recipe, Source, compile};
    use crate::plan::Packed;

    fn demo() -> Manifest {
        let recipe = Recipe::parse(include_str!("../../../plans/synthetic.ron")).expect("the recipe is valid");
        let options = CompileOptions { prefill: Some(vec![8]), decode: Some(vec![1]), ..CompileOptions::default() };
        compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles").file.manifest
    }

    #[test]
    fn a_plan_gets_what_its_weights_need() {
        let roles = |manifest: &Manifest| services(manifest).into_iter().map(|s| s.role).collect::<Vec<_>>();
        let mut manifest = demo();
        let (bf16, f32) = (DType::BF16, DType::F32);
        let steps = [ServiceRole::Advance, ServiceRole::Feed];
        let synthetic = [ServiceRole::Synthesize(f32, f32), ServiceRole::Synthesize(bf16, bf16)];
        let placed = [ServiceRole::Place(bf16, bf16)];
        assert_eq!(roles(&manifest), [&synthetic[..], &placed, &steps].concat());
        manifest.model.weights = WeightSource::Checkpoint;
        assert_eq!(roles(&manifest), [&placed[..], &steps].concat());
        let mixed = manifest.tensors.iter_mut().find(|tensor| tensor.name.contains("experts")).expect("it has experts");
        mixed.index_dtypes = vec![bf16, DType::F16];
        assert_eq!(roles(&manifest)[..2], [ServiceRole::Place(DType::F16, bf16), placed[0]]);
        manifest.ranks[0].packed = vec![Packed { weight: 0, offset: 0 }];
        assert_eq!(roles(&manifest)[2], ServiceRole::Pack);
        manifest.ranks[0].packed.clear();
        manifest.ranks[0].io.pop();
        manifest.ranks[0].weights.retain(|weight| weight.layout.tensors().len() == 1);
        manifest.tensors.iter_mut().for_each(|tensor| tensor.index_dtypes.clear());
        assert_eq!(roles(&manifest), [], "what is copied as it is needs no kernel");
    }

    #[test]
    fn parameters_are_what_the_source_takes() {
        let (bf16, f16) = (DType::BF16, DType::F16);
        let all = [synthesize(bf16, f16), place(bf16, f16), pack(), advance(), feed(), exchange(2, 3), exchange(8, 1)];
        for service in all {
            let text = service.text();
            write(service.name, &text);
            assert!(text.contains(&format!("{}(PARAMS)", service.name)), "{text}");
            // Those of an exchange are lists, which the source takes whole.
            let listed: Vec<&str> = text
                .lines()
                .filter(|line| line.starts_with("#define PEERS") || line.starts_with("#define LISTED"))
                .collect();
            for param in &service.specialised.params {
                let taken = service.source.contains(&param.0) || listed.iter().any(|line| line.contains(&param.0));
                assert!(taken, "{} of {}", param.0, service.name);
            }
            assert_eq!(service.specialised.launch.block, SERVICE_THREADS);
        }
        for (tensor, weight) in [(DType::I32, DType::I32), (DType::F32, DType::F32), (bf16, bf16), (DType::F32, bf16)] {
            write("synthesize", &synthesize(tensor, weight).text());
            write("place", &place(tensor, weight).text());
        }
    }
}
