//! A small model with a tokenizer, and calls of the binary.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const CONFIG: &str = r#"{"model_type": "lfm2_moe", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
 "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
 "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1, "num_experts": 4,
 "num_experts_per_tok": 2, "use_expert_bias": true, "norm_topk_prob": true, "conv_L_cache": 3, "conv_bias": false,
 "norm_eps": 1e-5, "rope_theta": 1000000.0, "max_position_embeddings": 2048, "tie_word_embeddings": true,
 "eos_token_id": 7, "dtype": "float32"}"#;

/// The sizes of a small plan; what the prompts are is said before.
const SIZES: &str =
    r#"dtype: "f32", prefill: [16, 64], decode: [1, 2, 4], max_sequences: 4, max_context: 128, kv_tokens: 512,"#;

/// A path of this project.
pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A folder with `tiny.ron`, whose model has synthetic weights and, in `model/`, the tokenizer of `tests/data/text/bytes`.
pub fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model");
    fs::create_dir(&model).expect("a folder");
    fs::write(model.join("config.json"), CONFIG).expect("written");
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        fs::copy(project("tests/data/text/bytes").join(name), model.join(name)).expect("copied");
    }
    recipe(folder.path(), "tiny.ron", "Directory(\"model\")", "weights: Synthetic(2026), prompt: \"The plan says\",");
    folder
}

/// Writes a recipe for a model, with `more` fields.
pub fn recipe(folder: &Path, name: &str, model: &str, more: &str) {
    fs::write(folder.join(name), format!("Recipe(name: \"tiny\", model: {model}, {more} {SIZES})")).expect("written");
}

/// Calls the binary with standard input.
pub fn call(folder: &Path, input: &[u8], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfm2c"));
    command.current_dir(folder).args(arguments);
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().expect("the binary starts");
    child.stdin.take().expect("a pipe").write_all(input).expect("it is read");
    child.wait_with_output().expect("it ends")
}

/// Standard output of a call that must succeed.
#[track_caller]
pub fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}
