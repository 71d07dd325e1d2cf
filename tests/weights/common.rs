//! Small manifests and checkpoints.

use std::path::Path;

use lfm2c::plan::{
    DType, Layout, Limits, Manifest, Model, Pool, Program, Region, Synthetic, Target, Tensor, TensorSource, TensorType,
    Weight, WeightSource,
};
use lfm2c::runtime::convert::{read_f32, write_f32};
use lfm2c::runtime::synthetic::{element, key};
use lfm2c::runtime::weights::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};

/// Seed of the numbers in all checkpoints.
pub const SEED: u64 = 11;

pub fn manifest(tensors: Vec<Tensor>, weights: Vec<Weight>) -> Manifest {
    let region = |bytes| Region { offset: 0, bytes };
    let end = weights.iter().map(|w| w.offset + w.ty.bytes().unwrap_or(0)).max().unwrap_or(0);
    let pool = Pool { weights: region(end), state: region(0), arena: region(0), io: region(0) };
    let program = Program { pool, weights, states: vec![], io: vec![], semantics: vec![], buckets: vec![] };
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
    Weight { name: format!("w{offset}"), ty: TensorType(dtype, shape.to_vec()), offset, layout }
}

/// The bytes that a checkpoint holds for the tensor's numbers.
pub fn stored(tensor: &Tensor) -> Vec<u8> {
    let key = key(SEED, tensor.synthetic.salt);
    let values: Vec<f32> = (0..tensor.shape.iter().product()).map(|i| element(key, &tensor.synthetic, i)).collect();
    written(tensor.dtype, &values)
}

pub fn written(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bytes() as usize];
    write_f32(dtype, values, &mut bytes);
    bytes
}

pub fn values(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.bytes() as usize];
    read_f32(dtype, bytes, &mut values);
    values
}

/// A tensor of a file: name, type, shape, bytes.
pub type Item = (String, DType, Vec<u64>, Vec<u8>);

pub fn item(name: &str, dtype: DType, shape: &[u64]) -> Item {
    (name.to_string(), dtype, shape.to_vec(), vec![1; (shape.iter().product::<u64>() * dtype.bytes()) as usize])
}

pub fn write(path: &Path, items: &[Item]) {
    let views = items.iter().map(|(name, dtype, shape, bytes)| {
        let dtype = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I32 => Dtype::I32,
        };
        let shape = shape.iter().map(|&dim| dim as usize).collect();
        (name, TensorView::new(dtype, shape, bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

pub fn single(items: &[Item]) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("model.safetensors"), items);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// The tensor as a checkpoint holds it in its first form.
pub fn items(tensor: &Tensor) -> Vec<Item> {
    let bytes = stored(tensor);
    let shape = &tensor.shape;
    match &tensor.sources[0] {
        TensorSource::Whole(name) => vec![(name.clone(), tensor.dtype, shape.clone(), bytes)],
        TensorSource::PerIndex(pattern) => bytes
            .chunks(bytes.len() / shape[0] as usize)
            .enumerate()
            .map(|(i, piece)| (pattern.replace("{}", &i.to_string()), tensor.dtype, shape[1..].to_vec(), piece.into()))
            .collect(),
        TensorSource::Part { name, start, of } => {
            let index_bytes = shape[2..].iter().product::<u64>() * tensor.dtype.bytes();
            let fill = |indices: u64| vec![0xee; (indices * index_bytes) as usize];
            let packed = bytes
                .chunks((shape[1] * index_bytes) as usize)
                .flat_map(|row| [fill(*start), row.to_vec(), fill(of - start - shape[1])].concat());
            vec![(name.clone(), tensor.dtype, [&[shape[0], *of], &shape[2..]].concat(), packed.collect())]
        }
    }
}

/// Writes an index.
pub fn index(dir: &Path, places: &[(&str, &str)]) {
    let map: Vec<String> = places.iter().map(|(name, file)| format!("{name:?}: {file:?}")).collect();
    let text = format!("{{\"metadata\": {{\"total_size\": 1}}, \"weight_map\": {{{}}}}}", map.join(", "));
    std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}
