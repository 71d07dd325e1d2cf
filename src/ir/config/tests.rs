use serde_json::{Value, json};

use super::*;

/// A small model with experts, with some fields replaced; null takes one away.
fn raw(changes: Value) -> RawConfig {
    let mut fields = json!({
        "model_type": "lfm2_moe", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1,
        "num_experts": 8, "num_experts_per_tok": 2, "conv_L_cache": 3, "norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    });
    let (Some(fields_of), Value::Object(changes)) = (fields.as_object_mut(), changes) else {
        panic!("expected an object of changes")
    };
    fields_of.extend(changes);
    serde_json::from_value(fields).expect("the changes have the types of fields")
}

fn config(changes: Value) -> Config {
    Config::resolve(&raw(changes)).unwrap_or_else(|error| panic!("{error}"))
}

fn faults(changes: Value) -> Vec<String> {
    Config::resolve(&raw(changes)).expect_err("the description is faulty").0
}

fn dense(width: u64, changes: Value) -> FeedForward {
    let mut all = json!({"model_type": "lfm2", "intermediate_size": width});
    if let (Some(all), Value::Object(changes)) = (all.as_object_mut(), changes) {
        all.extend(changes);
    }
    let config = config(all);
    assert!(config.layers.iter().all(|layer| layer.feed_forward == config.layers[0].feed_forward));
    config.layers[0].feed_forward.clone()
}

#[test]
fn layers_follow_their_types_and_the_number_of_dense_ones() {
    let config = config(json!({}));
    let mixers: Vec<Mixer> = config.layers.iter().map(|layer| layer.mixer).collect();
    assert_eq!(mixers, [Mixer::Conv, Mixer::Attention, Mixer::Conv, Mixer::Attention]);
    let experts = Experts { count: 8, per_token: 2, width: 16, bias: true, normalise: true, scaling: 1.0 };
    assert_eq!(config.layers[0].feed_forward, FeedForward::Dense(48), "lfm2_moe takes the width as it is");
    for layer in &config.layers[1..] {
        assert_eq!(layer.feed_forward, FeedForward::Experts(experts.clone()));
    }
    assert_eq!((config.head_dim, config.conv_bias, config.tied_head), (8, false, true));
}

#[test]
fn dense_layers_only_need_nothing_of_experts() {
    let without = json!({
        "num_dense_layers": 9, "num_experts": null, "num_experts_per_tok": null, "moe_intermediate_size": null,
    });
    assert!(config(without).layers.iter().all(|layer| layer.feed_forward == FeedForward::Dense(48)));
    let without = json!({"num_dense_layers": 0, "intermediate_size": null});
    assert!(config(without).layers.iter().all(|layer| matches!(layer.feed_forward, FeedForward::Experts(_))));
}

#[test]
fn the_dense_family_adjusts_its_width() {
    let off = json!({"block_auto_adjust_ff_dim": false});
    assert_eq!(dense(100, off), FeedForward::Dense(100));
    // Two thirds of 100, rounded down, then up to a multiple.
    assert_eq!(dense(100, json!({"block_multiple_of": 1})), FeedForward::Dense(66));
    assert_eq!(dense(100, json!({"block_multiple_of": 32})), FeedForward::Dense(96));
    assert_eq!(dense(100, json!({})), FeedForward::Dense(256));
    assert_eq!(dense(96, json!({"block_multiple_of": 32})), FeedForward::Dense(64), "a multiple stays");
    // 66 * 1.3 = 85.8.
    let scaled = json!({"block_multiple_of": 1, "block_ffn_dim_multiplier": 1.3});
    assert_eq!(dense(100, scaled), FeedForward::Dense(85));
}

#[test]
fn aliases_win_as_they_do_in_transformers() {
    let both = json!({"block_ff_dim": 60, "block_auto_adjust_ff_dim": false});
    assert_eq!(dense(48, both), FeedForward::Dense(60));
    assert_eq!(config(json!({"block_ff_dim": 60})).layers[0].feed_forward, FeedForward::Dense(48), "not for lfm2_moe");
    assert!(!config(json!({"tie_embedding": false, "tie_word_embeddings": true})).tied_head);
    assert!(!config(json!({"tie_word_embeddings": false})).tied_head);
    assert_eq!(config(json!({"rope_theta": 5.0})).rope_theta, 1e6, "the dictionary wins");
    assert_eq!(config(json!({"rope_theta": 5.0, "rope_parameters": {}})).rope_theta, 5.0);
    assert_eq!(config(json!({"rope_theta": 5.0, "rope_parameters": null})).rope_theta, 5.0);
    let scaling = json!({"rope_theta": 5.0, "rope_scaling": {"rope_theta": 7.0}});
    assert_eq!(config(scaling).rope_theta, 7.0, "replaces the parameters");
    assert_eq!(config(json!({"rope_theta": 5.0, "rope_scaling": {}})).rope_theta, 1e6, "empty replaces nothing");
    let dtypes = config(json!({"dtype": "float16", "torch_dtype": "float32"})).dtype;
    assert_eq!(dtypes.as_deref(), Some("float16"));
    assert_eq!(config(json!({"torch_dtype": "float32"})).dtype.as_deref(), Some("float32"));
    assert_eq!(config(json!({"eos_token_id": 7})).eos_tokens, [7]);
    assert_eq!(config(json!({"eos_token_id": [7, 2]})).eos_tokens, [7, 2]);
    assert_eq!(config(json!({"head_dim": 6})).head_dim, 6, "need not be hidden size over heads");
}

#[test]
fn attention_by_index_is_for_the_dense_family_without_types() {
    let by_index = json!({"model_type": "lfm2", "layer_types": null, "full_attn_idxs": [0, 3]});
    let mixers: Vec<Mixer> = config(by_index).layers.iter().map(|layer| layer.mixer).collect();
    assert_eq!(mixers, [Mixer::Attention, Mixer::Conv, Mixer::Conv, Mixer::Attention]);
    let both = json!({"model_type": "lfm2", "full_attn_idxs": [0]});
    assert_eq!(config(both).layers[0].mixer, Mixer::Conv, "the types win");
    let experts = json!({"layer_types": null, "full_attn_idxs": [0, 3]});
    assert_eq!(faults(experts), ["`layer_types` is missing"]);
}

#[test]
fn each_fault_says_what_was_expected_and_found() {
    let cases = [
        (
            json!({"model_type": "llama"}),
            "`model_type`: expected `lfm2` or `lfm2_moe`, found `llama`; other models are not supported",
        ),
        (
            json!({"model_type": null}),
            "`model_type`: expected `lfm2` or `lfm2_moe`, found none; other models are not supported",
        ),
        (json!({"hidden_size": null}), "`hidden_size` is missing"),
        (json!({"norm_eps": null}), "`norm_eps` is missing"),
        (json!({"rope_parameters": null}), "`rope_theta` is missing"),
        (json!({"num_dense_layers": null}), "`num_dense_layers` is missing"),
        (json!({"vocab_size": 0}), "`vocab_size`: expected 1 to 1048576, found 0"),
        (json!({"vocab_size": 1 << 21}), "`vocab_size`: expected 1 to 1048576, found 2097152"),
        (json!({"num_key_value_heads": 3}), "`num_attention_heads` 4 is not a multiple of `num_key_value_heads` 3"),
        (json!({"hidden_size": 34}), "`hidden_size` 34 is not a multiple of `num_attention_heads` 4"),
        (json!({"head_dim": 7}), "head size: expected an even number from 2 to 1048576, found 7"),
        (json!({"head_dim": 0}), "head size: expected an even number from 2 to 1048576, found 0"),
        (
            json!({"head_dim": u64::MAX - 1}),
            "head size: expected an even number from 2 to 1048576, found 18446744073709551614",
        ),
        (json!({"norm_eps": -1.0}), "`norm_eps`: expected a number of at least 0, found -1"),
        (json!({"rope_parameters": {"rope_theta": 0.0}}), "`rope_theta`: expected a positive number, found 0"),
        (
            json!({"rope_scaling": {"rope_theta": 1e6, "rope_type": "yarn"}}),
            "`rope_type`: expected `default`, found `yarn`; scaled rotary embeddings are not supported",
        ),
        (
            json!({"rope_scaling": {"rope_theta": 1e6, "type": "linear"}}),
            "`rope_type`: expected `default`, found `linear`; scaled rotary embeddings are not supported",
        ),
        (json!({"layer_types": ["conv"]}), "`layer_types`: expected 4 entries (`num_hidden_layers`), found 1"),
        (
            json!({"layer_types": ["conv", "conv", "sliding_attention", "conv"]}),
            "`layer_types[2]`: expected `conv` or `full_attention`, found `sliding_attention`",
        ),
        (
            json!({"model_type": "lfm2", "layer_types": null, "full_attn_idxs": [4]}),
            "`full_attn_idxs`: expected layers below 4, found 4",
        ),
        (json!({"num_experts_per_tok": 9}), "`num_experts_per_tok` 9 exceeds `num_experts` 8"),
        (
            json!({"model_type": "lfm2", "block_ffn_dim_multiplier": 1e300}),
            "`adjusted intermediate_size`: expected 1 to 1048576, found 18446744073709551615",
        ),
        (
            json!({"model_type": "lfm2", "block_ffn_dim_multiplier": -1.0}),
            "`adjusted intermediate_size`: expected 1 to 1048576, found 0",
        ),
    ];
    for (changes, expected) in cases {
        assert_eq!(faults(changes.clone()), [expected], "{changes}");
    }
    let scaling = Config::resolve(&RawConfig { routed_scaling_factor: Some(f64::NAN), ..raw(json!({})) });
    assert_eq!(scaling.expect_err("NaN").0, ["`routed_scaling_factor`: expected a number, found NaN"]);
}

#[test]
fn all_faults_are_told_at_once() {
    let found = faults(json!({"hidden_size": null, "num_experts_per_tok": null, "conv_L_cache": 0}));
    let expected = [
        "`hidden_size` is missing",
        "`conv_L_cache`: expected 1 to 1048576, found 0",
        "`num_experts_per_tok` is missing",
    ];
    assert_eq!(found, expected);
    let text = ConfigError(found.clone()).to_string();
    assert_eq!(text.lines().count(), 1 + found.len(), "{text}");
    let error = Config::from_json("{\"hidden_size\": -1}").expect_err("sizes are not negative");
    assert!(error.to_string().contains("line 1 column 18"), "{error}");
}

#[test]
fn the_hash_is_of_what_the_graph_depends_on() {
    let hash = |changes| config(changes).hash();
    let base = hash(json!({}));
    let same = [json!({"eos_token_id": 3}), json!({"dtype": "float16"}), json!({"max_position_embeddings": 5})];
    assert!(same.into_iter().all(|changes| hash(changes) == base));
    let spelled = json!({"rope_parameters": null, "rope_theta": 1e6, "tie_embedding": true, "use_expert_bias": true});
    assert_eq!(hash(spelled), base, "another spelling of the same model");
    for changes in [json!({"norm_eps": 1e-6}), json!({"use_expert_bias": false}), json!({"num_experts_per_tok": 3})] {
        assert_ne!(hash(changes.clone()), base, "{changes}");
    }
}
