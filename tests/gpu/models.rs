//! Models of random shapes, compiled for the GPU.

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::recipe::ModelSource;
use lfm2c::codegen::select::Pack;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::cuda::Device;
use lfm2c::ir::DType;
use lfm2c::ir::config::RawConfig;
use lfm2c::passes::Target;
use lfm2c::plan::{PlanFile, WeightSource};
use lfm2c::runtime::cpu::{CpuExecutor, HostPool};
use lfm2c::runtime::cuda::{CudaExecutor, Graphs};
use lfm2c::runtime::weights::{self, Origin};
use libtest_mimic::Failed;
use std::sync::Arc;

/// A model's sizes, as `config.json` spells them.
pub struct Shape {
    /// For messages.
    pub name: &'static str,
    text: &'static str,
}

/// Shapes that reach different kernels: sizes that tensor cores like, and sizes that only the general kernels take.
pub const SHAPES: &[Shape] = &[
    Shape {
        name: "even",
        text: r#"{"model_type": "lfm2_moe", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384,
            "moe_intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_dense_layers": 1, "num_experts": 8, "num_experts_per_tok": 2, "conv_L_cache": 3, "norm_eps": 1e-5,
            "use_expert_bias": true, "norm_topk_prob": true, "routed_scaling_factor": 1.0,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "eos_token_id": 7, "bos_token_id": 1}"#,
    },
    Shape {
        name: "odd",
        text: r#"{"model_type": "lfm2_moe", "vocab_size": 333, "hidden_size": 60, "intermediate_size": 52,
            "moe_intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "num_dense_layers": 1, "num_experts": 5, "num_experts_per_tok": 3, "conv_L_cache": 4, "norm_eps": 1e-5,
            "use_expert_bias": false, "norm_topk_prob": false, "routed_scaling_factor": 2.5,
            "layer_types": ["conv", "full_attention", "conv"],
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "eos_token_id": 7, "bos_token_id": 1}"#,
    },
    Shape {
        name: "wide",
        text: r#"{"model_type": "lfm2_moe", "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 1792,
            "moe_intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 4,
            "num_dense_layers": 1, "num_experts": 32, "num_experts_per_tok": 4, "conv_L_cache": 3, "conv_bias": true,
            "norm_eps": 1e-5,
            "use_expert_bias": true, "norm_topk_prob": true, "routed_scaling_factor": 1.0,
            "layer_types": ["conv", "conv", "full_attention"],
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "eos_token_id": 7, "bos_token_id": 1}"#,
    },
];

/// A shape with so few large experts that a prompt's rows are gathered by a step of their own.
pub const CROWDED: Shape = Shape {
    name: "crowded",
    text: r#"{"model_type": "lfm2_moe", "vocab_size": 512, "hidden_size": 1024, "intermediate_size": 512,
        "moe_intermediate_size": 1792, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4,
        "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "conv_L_cache": 3, "norm_eps": 1e-5,
        "use_expert_bias": true, "norm_topk_prob": true, "routed_scaling_factor": 1.0,
        "layer_types": ["conv", "full_attention"],
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "eos_token_id": 7, "bos_token_id": 1}"#,
};

/// A shape's description, with synthetic weights.
pub fn recipe(shape: &Shape) -> Recipe {
    let raw: RawConfig = serde_json::from_str(shape.text).expect("the shape is a configuration");
    Recipe {
        name: shape.name.into(),
        model: ModelSource::Config(Box::new(raw)),
        weights: WeightSource::Synthetic(5),
        prompt: Default::default(),
        dtype: None,
        prefill: None,
        decode: None,
        max_sequences: None,
        max_context: None,
        kv_tokens: None,
    }
}

/// A shape's plan for the GPU.
pub fn plan(shape: &Shape, options: &CompileOptions) -> PlanFile {
    let options = CompileOptions { target: Target::Sm90a, ..options.clone() };
    let compiled = compile(&Source::Recipe(Box::new(recipe(shape)), None), &options, &Silent);
    compiled.unwrap_or_else(|fault| panic!("{}: {fault:#}", shape.name)).file
}

/// The GPU executor of a plan, everything not live poisoned.
pub fn gpu(file: &PlanFile, graphs: Graphs) -> CudaExecutor {
    let device = Device::open(0).expect("a GPU is there");
    let mut executor = CudaExecutor::new(file, 0, &device, graphs).expect("the plan runs on the GPU");
    executor.load(Origin::Synthetic(5), &|_| ()).expect("weights fit");
    executor.poison(0xff).expect("memory can be filled");
    executor
}

/// The CPU executor of a plan.
pub fn cpu(file: &PlanFile) -> CpuExecutor {
    let program = &file.manifest.ranks[0];
    let mut pool = HostPool::new(program).expect("the pool fits");
    weights::fill_synthetic(&file.manifest, program, 5, pool.weights_mut(), &|_| ()).expect("weights fit");
    CpuExecutor::new(Arc::new(file.manifest.clone()), 0, pool).expect("every plan runs on the CPU")
}

/// Options of a plan with room for eight sequences of 256 positions.
pub fn small(prefill: &[u64], decode: &[u64], dtype: DType) -> CompileOptions {
    CompileOptions {
        dtype: Some(dtype),
        prefill: Some(prefill.to_vec()),
        decode: Some(decode.to_vec()),
        max_sequences: Some(8),
        max_context: Some(256),
        kv_tokens: Some(2048),
        // `LFM2C_TEST_PACK`: kernels of few rows read packed weights.
        pack: if std::env::var_os("LFM2C_TEST_PACK").is_some() { Pack::Asked } else { Pack::default() },
        ..CompileOptions::default()
    }
}

/// An error as the reason why a test fails.
pub fn fail(error: anyhow::Error) -> Failed {
    format!("{error:#}").into()
}
