//! What the fusion passes make of whole models: steps a bucket, their labels, and that fusing changes no operator.

use std::collections::BTreeMap;

use lfm2c::ir::build::{BuildOptions, build};
use lfm2c::ir::config::{Config, RawConfig};
use lfm2c::ir::{DType, Extents, Graph, OpKind, stage_list};
use lfm2c::passes::{BucketSpec, Driver, PassContext, Phase, Stage, Target};
use proptest::prelude::*;

const FUSIONS: [&str; 7] = [
    "fuse-norm-matmul",
    "fuse-shortconv",
    "fuse-swiglu",
    "fuse-attention",
    "fuse-residual",
    "fuse-combine-norm",
    "fuse-pointwise",
];

/// The layers of LFM2-8B-A1B in miniature: the same operators, and experts large enough to be worth sorting for.
fn moe(layers: u64) -> RawConfig {
    let attention = |i: u64| i % 4 == 2;
    let name = |i| if attention(i) { "full_attention" } else { "conv" }.to_owned();
    RawConfig {
        model_type: Some("lfm2_moe".into()),
        vocab_size: Some(96),
        hidden_size: Some(2048),
        intermediate_size: Some(320),
        moe_intermediate_size: Some(1792),
        num_hidden_layers: Some(layers),
        num_attention_heads: Some(32),
        num_key_value_heads: Some(8),
        layer_types: Some((0..layers).map(name).collect()),
        num_dense_layers: Some(2),
        num_experts: Some(32),
        num_experts_per_tok: Some(4),
        use_expert_bias: Some(true),
        norm_topk_prob: Some(true),
        routed_scaling_factor: Some(1.0),
        conv_l_cache: Some(3),
        norm_eps: Some(1e-5),
        rope_theta: Some(1e6),
        ..RawConfig::default()
    }
}

fn context(target: Target, phase: Phase, tokens: u64) -> PassContext {
    let extents = Extents { tokens, sequences: tokens.min(64), rows: tokens.min(64) };
    PassContext { target, bucket: BucketSpec { phase, extents }, experts: None, layers: None }
}

fn graph_of(raw: &RawConfig) -> Graph {
    let config = Config::resolve(raw).unwrap();
    let options = BuildOptions {
        forced_routing: false,
        dtype: DType::BF16,
        max_sequences: 64,
        max_context: 4096,
        pages: 64,
        page_tokens: 64,
        ring_columns: 8,
    };
    build(&config, &options, &|_| DType::BF16).unwrap()
}

fn compile(raw: &RawConfig, context: &PassContext, disabled: &[&str]) -> Graph {
    let mut graph = graph_of(raw);
    let disabled: Vec<String> = disabled.iter().map(|name| (*name).to_owned()).collect();
    let mut driver = Driver::new(&disabled, None, |_, _| ()).unwrap();
    driver.run_stage(Stage::Once, &mut graph, context).unwrap();
    driver.run_stage(Stage::PerBucket, &mut graph, context).unwrap();
    graph
}

fn labels(graph: &Graph) -> Vec<(String, String)> {
    let label = |kind: &OpKind| match kind {
        OpKind::Fused(stages) => stage_list(stages),
        other => other.mnemonic().to_owned(),
    };
    graph.ops.iter().map(|op| (op.scope.clone(), label(&op.kind))).collect()
}

/// A convolution's steps in decode: in the product that makes its rows, or in the one that reads its result.
fn convolution(target: Target) -> &'static str {
    match target {
        Target::Sm90a => "norm+matmul+shortconv, matmul+residual",
        Target::Cpu => "norm+matmul, shortconv+matmul+residual",
    }
}

/// The labels of the steps of one part of the model, in order.
fn part(graph: &Graph, scope: &str) -> String {
    let of_part = |(at, _): &(String, String)| at == scope;
    labels(graph).into_iter().filter(of_part).map(|(_, label)| label).collect::<Vec<_>>().join(", ")
}

#[test]
fn a_decode_step_of_one_sequence_reads_experts_directly() {
    for target in [Target::Sm90a, Target::Cpu] {
        let graph = compile(&moe(4), &context(target, Phase::Decode, 1), &[]);
        assert_eq!(part(&graph, "layers.0.conv"), convolution(target));
        assert_eq!(part(&graph, "layers.0.ffn"), "norm+matmul+swiglu, matmul+residual");
        assert_eq!(part(&graph, "layers.2.attention"), "norm+matmul, headrope+kvwrite+attention, matmul+residual");
        assert_eq!(part(&graph, "layers.3.ffn"), "norm+router, expert+swiglu, expert+combine+residual");
        assert_eq!(part(&graph, "head"), "gather+norm+matmul, sample");
    }
}

#[test]
fn a_decode_step_of_many_sequences_sorts_rows_by_expert() {
    for target in [Target::Sm90a, Target::Cpu] {
        let graph = compile(&moe(4), &context(target, Phase::Decode, 64), &[]);
        assert_eq!(part(&graph, "layers.3.conv"), convolution(target));
        assert_eq!(part(&graph, "layers.3.ffn"), "norm+router+group, expert+swiglu, grouped_matmul, combine+residual");
    }
}

#[test]
fn prefill_keeps_rows_out_of_prologues_on_a_gpu_and_fuses_everything_on_a_cpu() {
    let graph = compile(&moe(4), &context(Target::Sm90a, Phase::Prefill, 512), &[]);
    assert_eq!(part(&graph, "layers.0.conv"), "rms_norm, matmul, shortconv, matmul+residual");
    assert_eq!(part(&graph, "layers.0.ffn"), "rms_norm, matmul+swiglu, matmul+residual");
    assert_eq!(part(&graph, "layers.2.attention"), "rms_norm, matmul, headrope+kvwrite, attention, matmul+residual");
    // Experts normalise what the next layer begins with.
    let experts = "rms_norm, router, group_rows, expert+swiglu, grouped_matmul, combine+residual";
    assert_eq!(part(&graph, "layers.2.ffn"), experts.to_owned() + "+norm");
    assert_eq!(part(&graph, "layers.3.conv"), "matmul, shortconv, matmul+residual");
    assert_eq!(part(&graph, "layers.3.ffn"), experts);
    assert_eq!(part(&graph, "head"), "gather+norm, matmul, sample");
    let (cpu_prefill, cpu_decode) =
        [Phase::Prefill, Phase::Decode].map(|phase| compile(&moe(4), &context(Target::Cpu, phase, 512), &[])).into();
    assert_eq!(labels(&cpu_prefill), labels(&cpu_decode));
}

/// The layer pattern of the 24-layer model: 6 attention layers, 2 dense ones.
#[test]
fn every_decode_bucket_of_24_layers_has_at_most_150_steps() {
    let raw = moe(24);
    let unfused: Vec<&str> = FUSIONS.iter().copied().chain(["group-experts"]).collect();
    for rows in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] {
        let context = context(Target::Sm90a, Phase::Decode, rows);
        let steps = compile(&raw, &context, &[]).ops.len();
        assert_eq!(steps, if rows == 1 { 127 } else { 149 }, "{rows} rows");
        assert!(compile(&raw, &context, &unfused).ops.len() > 3 * steps);
    }
    assert_eq!(compile(&raw, &context(Target::Sm90a, Phase::Prefill, 512), &[]).ops.len(), 223);
}

/// How often each primitive operator occurs, ids of values and weights included.
fn primitives(graph: &Graph) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for op in graph.ops.iter().flat_map(|op| op.primitives()) {
        *counts.entry(format!("{:?} {:?} -> {:?}", op.kind, op.operands, op.results)).or_default() += 1;
    }
    counts
}

fn model() -> impl Strategy<Value = RawConfig> {
    let layers = prop::collection::vec(prop::bool::ANY, 1..4);
    let switches = prop::array::uniform7(prop::bool::ANY);
    (layers, switches, 0u64..3, prop::sample::select(vec![1u64, 2, 4])).prop_map(
        |(attention, [experts, bias, normalise, scaled, conv_bias, odd, large], dense_layers, kv_heads)| RawConfig {
            model_type: Some(if experts { "lfm2_moe" } else { "lfm2" }.into()),
            vocab_size: Some(if odd { 37 } else { 64 }),
            hidden_size: Some(if odd { 20 } else { 32 }),
            intermediate_size: Some(if odd { 27 } else { 48 }),
            moe_intermediate_size: Some(if large {
                1 << 18
            } else if odd {
                9
            } else {
                16
            }),
            num_hidden_layers: Some(attention.len() as u64),
            num_attention_heads: Some(4),
            num_key_value_heads: Some(kv_heads),
            head_dim: Some(6),
            layer_types: Some(
                attention.iter().map(|&it| if it { "full_attention" } else { "conv" }.to_owned()).collect(),
            ),
            num_dense_layers: Some(dense_layers),
            num_experts: Some(5),
            num_experts_per_tok: Some(2),
            use_expert_bias: Some(bias),
            norm_topk_prob: Some(normalise),
            routed_scaling_factor: Some(if scaled { 2.5 } else { 1.0 }),
            conv_bias: Some(conv_bias),
            conv_l_cache: Some(3),
            norm_eps: Some(1e-5),
            rope_theta: Some(1e4),
            block_auto_adjust_ff_dim: Some(false),
            ..RawConfig::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Any passes left out, on any model of the family, in any bucket: the driver accepts what the others propose, and the
    /// operators inside the fused ones are those of the graph that was not fused.
    #[test]
    fn fusing_changes_no_operator(
        raw in model(),
        off in prop::collection::vec(prop::bool::ANY, lfm2c::passes::names().len()),
        decode in prop::bool::ANY,
        cpu in prop::bool::ANY,
        rows in prop::sample::select(vec![1u64, 3, 64, 512]),
    ) {
        let phase = if decode { Phase::Decode } else { Phase::Prefill };
        let context = context(if cpu { Target::Cpu } else { Target::Sm90a }, phase, rows);
        let disabled: Vec<&str> = lfm2c::passes::names().into_iter().zip(&off).filter(|(_, off)| **off).map(|(name, _)| name).collect();
        let fused = compile(&raw, &context, &disabled);
        let plain = compile(&raw, &context, &disabled.iter().copied().chain(FUSIONS).collect::<Vec<_>>());
        prop_assert_eq!(primitives(&fused), primitives(&plain));
        prop_assert_eq!(&fused.outputs, &plain.outputs);
        prop_assert!(fused.ops.len() <= plain.ops.len());
    }
}
