use super::*;
use crate::ir::verify;

const OPTIONS: BuildOptions = BuildOptions {
    dtype: DType::BF16,
    max_sequences: 2,
    max_context: 100,
    pages: 3,
    page_tokens: 64,
    ring_columns: 4,
    forced_routing: false,
};

/// One convolution layer with a dense feed-forward, one attention layer with experts.
const TINY: &str = r#"{
    "model_type": "lfm2_moe", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 6,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
    "norm_eps": 1e-5, "rope_theta": 1e6, "routed_scaling_factor": 2.5
}"#;

fn graph(changes: &[(&str, &str)]) -> Graph {
    let text = changes.iter().fold(TINY.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    });
    let config = Config::from_json(&text).unwrap_or_else(|error| panic!("{error}"));
    let graph = build(&config, &OPTIONS, &|_| DType::BF16).expect("the sizes fit together");
    verify(&graph).unwrap_or_else(|faults| panic!("{faults}"));
    graph
}

fn weights(graph: &Graph) -> Vec<&str> {
    graph.weights.iter().map(|weight| weight.name.as_str()).collect()
}

fn states(graph: &Graph) -> Vec<&str> {
    graph.states.iter().map(|&state| graph.value(state).name.as_str()).collect()
}

/// The lines of the printed graph that hold one of the words.
fn lines(graph: &Graph, words: &[&str]) -> Vec<String> {
    let text = graph.to_string();
    let of_interest = text.lines().filter(|line| words.iter().any(|word| line.contains(word)));
    of_interest.map(|line| line.trim().to_owned()).collect()
}

/// Checked by hand against the reference implementation's forward functions.
#[test]
fn a_layer_of_each_kind() {
    assert_eq!(graph(&[]).to_string(), include_str!("../../../tests/data/tiny_lfm2.ir"));
}

#[test]
fn states_come_in_the_order_of_layers_with_one_block_table() {
    let mixed = graph(&[
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4"),
        (r#"["conv", "full_attention"]"#, r#"["full_attention", "conv", "full_attention", "conv"]"#),
    ]);
    assert_eq!(states(&mixed), ["pages", "kv.0", "conv.1", "kv.2", "conv.3", "sampling"]);
    let outputs: Vec<&str> = mixed.outputs.iter().map(|&output| mixed.value(output).name.as_str()).collect();
    assert_eq!(outputs, ["next", "logits", "kv.0.next", "conv.1.next", "kv.2.next", "conv.3.next"]);
    let convolutions = graph(&[(r#"["conv", "full_attention"]"#, r#"["conv", "conv"]"#)]);
    assert_eq!(states(&convolutions), ["conv.0", "conv.1", "sampling"], "no pages without attention");
}

#[test]
fn an_untied_head_has_its_own_weight() {
    let untied = graph(&[("\"norm_eps\"", "\"tie_word_embeddings\": false, \"norm_eps\"")]);
    assert_eq!(weights(&untied).last(), Some(&"lm_head.weight"));
    assert_eq!(lines(&untied, &["%logits ="]), ["%logits = matmul %n, @lm_head.weight : f32[R,32] in head"]);
}

#[test]
fn convolution_biases_are_three_a_layer_and_come_before_the_gate() {
    let biased = graph(&[("\"norm_eps\"", "\"conv_bias\": true, \"norm_eps\"")]);
    let biases: Vec<&str> = weights(&biased).into_iter().filter(|name| name.ends_with(".bias")).collect();
    let base = "model.layers.0.conv";
    assert_eq!(biases, ["in_proj", "conv", "out_proj"].map(|name| format!("{base}.{name}.bias")));
    let expected = [
        "%l0.biased.1 = add %l0.y, @model.layers.0.conv.conv.bias : bf16[T,8] in layers.0.conv",
        "%l0.g = mul %l0.c, %l0.biased.1 : bf16[T,8] in layers.0.conv",
    ];
    assert_eq!(lines(&biased, &["conv.conv.bias :", "%l0.g ="])[1..], expected[..]);
}

#[test]
fn the_router_selects_with_the_bias_and_weighs_without() {
    let plain = graph(&[(
        "\"routed_scaling_factor\": 2.5",
        "\"use_expert_bias\": false, \"norm_topk_prob\": false, \"routed_scaling_factor\": 1.0",
    )]);
    assert!(!weights(&plain).iter().any(|name| name.ends_with("expert_bias")));
    let expected = [
        "%l1.experts = top_k %l1.scores, %slot {k = 2} : i32[T,2] in layers.1.ffn",
        "%l1.weights = gather_columns %l1.scores, %l1.experts : f32[T,2] in layers.1.ffn",
        "%l1.weights.1 = mul %l1.weights, 1.0 : f32[T,2] in layers.1.ffn",
    ];
    assert_eq!(lines(&plain, &["%l1.experts =", "%l1.weights", "%l1.sum"])[..3], expected[..]);
}

#[test]
fn a_ring_shorter_than_the_convolution_is_refused() {
    let config = Config::from_json(TINY).expect("the description holds");
    let options = BuildOptions { ring_columns: 2, ..OPTIONS };
    let fault = build(&config, &options, &|_| DType::BF16).expect_err("three taps");
    assert_eq!(fault, "layers.0.conv: `conv1d_causal`: a ring of 2 columns does not hold the 3 taps");
}
