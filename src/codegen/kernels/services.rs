//! The kernels that the runtime launches by itself. Their parameters are told at [`ServiceRole`].

use std::collections::BTreeSet;

use super::builder::{Builder, Specialised};
use crate::plan::{DType, Layout, Manifest, ParamType, SERVICE_THREADS, ServiceRole, Weight, WeightSource};

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

/// The kernels that a plan's runtime needs: one for each pair of types that weights are made of and, for a language model, the
/// two that lead from step to step.
pub fn services(manifest: &Manifest) -> Vec<ServiceKernel> {
    let mut found = vec![];
    if let WeightSource::Synthetic(_) = manifest.model.weights {
        found.extend(conversions(manifest).into_iter().map(|(tensor, weight)| synthesize(tensor, weight)));
    }
    let has = |name: &&str| manifest.ranks.iter().flat_map(|rank| &rank.io).any(|io| io.name == **name);
    if ["tokens", "pos", "slot", "rows", "next"].iter().all(has) {
        found.extend([advance(), feed()]);
    }
    found
}

/// The types of tensors with those of the weights that are made of them, in a fixed order.
fn conversions(manifest: &Manifest) -> Vec<(DType, DType)> {
    let mut pairs = BTreeSet::new();
    for Weight { ty, layout, .. } in manifest.ranks.iter().flat_map(|rank| &rank.weights) {
        let tensors = match layout {
            Layout::Copy(tensor) => std::slice::from_ref(tensor),
            Layout::Concat { tensors, .. } => tensors,
        };
        for tensor in tensors.iter().filter_map(|&tensor| manifest.tensors.get(tensor as usize)) {
            pairs.insert((order(tensor.dtype), order(ty.0)));
        }
    }
    pairs.into_iter().map(|(tensor, weight)| (TYPES[tensor], TYPES[weight])).collect()
}

const TYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::I32];

fn order(dtype: DType) -> usize {
    TYPES.iter().position(|&ty| ty == dtype).expect("all types are listed")
}

fn synthesize(tensor: DType, weight: DType) -> ServiceKernel {
    let mut builder = with_layout(tensor, weight);
    builder.parameter("to", ParamType::Out(weight));
    longs(&mut builder, &["first", "count", "key"]);
    builder.parameter("center", ParamType::Float).parameter("scale", ParamType::Float);
    longs(&mut builder, &PLACES);
    service(
        ServiceRole::Synthesize(tensor, weight),
        "synthesize",
        include_str!("../../../kernels/synthesize.cu"),
        builder,
    )
}

fn advance() -> ServiceKernel {
    let mut builder = Builder::service();
    let (read, write) = (ParamType::In(DType::I32), ParamType::Out(DType::I32));
    builder.parameter("next", read).parameter("tokens", write).parameter("pos", write).parameter("slot", write);
    builder.parameter("rows", read).parameter("last", write).parameter("stops", read);
    longs(&mut builder, &["ring", "number"]);
    for name in ["count", "moves", "depth", "width"] {
        builder.parameter(name, ParamType::Int);
    }
    service(ServiceRole::Advance, "advance", include_str!("../../../kernels/advance.cu"), builder)
}

fn feed() -> ServiceKernel {
    let mut builder = Builder::service();
    let (read, write) = (ParamType::In(DType::I32), ParamType::Out(DType::I32));
    builder.parameter("tokens", write).parameter("pos", write).parameter("slot", write);
    builder.parameter("last", read).parameter("count", ParamType::Int);
    service(ServiceRole::Feed, "feed", include_str!("../../../kernels/feed.cu"), builder)
}

/// What [`ServiceRole::Synthesize`] takes to know where elements go.
const PLACES: [&str; 5] = ["part", "whole", "run", "stride", "offset"];

fn with_layout(tensor: DType, weight: DType) -> Builder<'static> {
    let mut builder = Builder::service();
    builder.line("#include \"layout.cuh\"").alias("T", tensor).alias("W", weight);
    builder
}

fn longs(builder: &mut Builder, names: &[&str]) {
    for name in names {
        builder.parameter(name, ParamType::Long);
    }
}

fn service(role: ServiceRole, name: &'static str, source: &'static str, builder: Builder) -> ServiceKernel {
    ServiceKernel { role, name, source, specialised: builder.finish("", [1, 1, 1], SERVICE_THREADS, 0) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::write;
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::{CompileOptions, Recipe, Source, compile};

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
        assert_eq!(roles(&manifest), [synthetic, steps].concat());
        manifest.model.weights = WeightSource::Checkpoint;
        assert_eq!(roles(&manifest), steps);
        manifest.ranks[0].io.pop();
        assert_eq!(roles(&manifest), []);
    }

    #[test]
    fn parameters_are_what_the_source_takes() {
        let all = [synthesize(DType::BF16, DType::F16), advance(), feed()];
        for service in all {
            let text = service.text();
            write(service.name, &text);
            assert!(text.contains(&format!("{}(PARAMS)", service.name)), "{text}");
            for param in &service.specialised.params {
                assert!(service.source.contains(&param.0), "{} of {}", param.0, service.name);
            }
            assert_eq!(service.specialised.launch.block, SERVICE_THREADS);
        }
        for (tensor, weight) in [(DType::I32, DType::I32), (DType::F32, DType::F32), (DType::BF16, DType::BF16)] {
            write("synthesize", &synthesize(tensor, weight).text());
        }
    }
}
