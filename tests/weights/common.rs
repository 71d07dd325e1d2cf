//! Small manifests and checkpoints.

#[path = "../common/checkpoint.rs"]
mod checkpoint;

use std::path::Path;

use lfm2c::plan::{
    DType, Layout, Limits, Manifest, Model, Pool, Program, Region, Synthetic, Target, Tensor, TensorSource, TensorType,
    Weight, WeightSource,
};
use lfm2c::runtime::weights::Checkpoint;

pub use self::checkpoint::{Item, SEED, Stored, items, plan, stored, values, write, written};

pub fn manifest(tensors: Vec<Tensor>, weights: Vec<Weight>) -> Manifest {
    let region = |bytes| Region { offset: 0, bytes };
    let end = weights.iter().map(|w| w.offset + w.ty.bytes().unwrap_or(0)).max().unwrap_or(0);
    let pool = Pool { weights: region(end), state: region(0), arena: region(0), io: region(0) };
    let program =
        Program { pool, weights, packed: vec![], states: vec![], io: vec![], semantics: vec![], buckets: vec![] };
    Manifest {
        compiler: String::new(),
        model: Model {
            name: String::new(),
            model_type: String::new(),
            config_hash: String::new(),
            vocab: 0,
            eos_tokens: vec![],
            weights: WeightSource::Checkpoint,
            prompt: vec![],
            forced_routing: None,
        },
        target: Target::Cpu,
        toolkit: None,
        dtype: DType::F32,
        limits: Limits { max_sequences: 1, max_context: 1, kv_tokens: 1, page_tokens: 1, ring_columns: 1 },
        tensors,
        kernels: vec![],
        services: vec![],
        experts: vec![],
        stages: vec![],
        ranks: vec![program],
    }
}

pub fn tensor(name: &str, dtype: DType, shape: &[u64], sources: Vec<TensorSource>) -> Tensor {
    let salt = name.bytes().fold(0, |sum, byte| sum * 31 + u64::from(byte));
    let synthetic = Synthetic { salt, center: 0.5, scale: 3.0 };
    Tensor { name: name.to_string(), dtype, index_dtypes: vec![], shape: shape.to_vec(), sources, synthetic }
}

pub fn whole(name: &str, dtype: DType, shape: &[u64]) -> Tensor {
    tensor(name, dtype, shape, vec![TensorSource::Whole(name.to_string())])
}

pub fn weight(dtype: DType, shape: &[u64], offset: u64, layout: Layout) -> Weight {
    Weight { name: format!("w{offset}"), ty: TensorType(dtype, shape.to_vec()), offset, layout, indices: vec![] }
}

pub fn item(name: &str, dtype: DType, shape: &[u64]) -> Item {
    (name.to_string(), dtype, shape.to_vec(), vec![1; (shape.iter().product::<u64>() * dtype.bytes()) as usize])
}

pub fn single(items: &[Item]) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("model.safetensors"), items);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// Writes an index.
pub fn index(dir: &Path, places: &[(&str, &str)]) {
    let map: Vec<String> = places.iter().map(|(name, file)| format!("{name:?}: {file:?}")).collect();
    let text = format!("{{\"metadata\": {{\"total_size\": 1}}, \"weight_map\": {{{}}}}}", map.join(", "));
    std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}
