//! Checkpoints of the numbers that the tensors of a manifest have, and plans for checkpoints of several types.

use std::path::Path;

use lfm2c::codegen::compile::{CheckpointListing, Silent};
use lfm2c::codegen::recipe::ModelSource;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::plan::{DType, Manifest, PlanFile, Tensor, TensorSource};
use lfm2c::runtime::convert::{read_f32, write_f32};
use lfm2c::runtime::synthetic::{element, key};
use safetensors::tensor::{Dtype, TensorView};

/// Seed of the numbers in all checkpoints.
pub const SEED: u64 = 11;

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

/// The tensor as a checkpoint holds it in its first form.
pub fn items(tensor: &Tensor) -> Vec<Item> {
    let bytes = stored(tensor);
    let shape = &tensor.shape;
    match &tensor.sources[0] {
        TensorSource::Whole(name) => vec![(name.clone(), tensor.dtype, shape.clone(), bytes)],
        TensorSource::PerIndex(pattern) => bytes
            .chunks(bytes.len() / shape[0] as usize)
            .enumerate()
            .map(|(i, piece)| {
                let dtype = tensor.index_dtypes.get(i).copied().unwrap_or(tensor.dtype);
                let piece =
                    if dtype == tensor.dtype { piece.to_vec() } else { written(dtype, &values(tensor.dtype, piece)) };
                (pattern.replace("{}", &i.to_string()), dtype, shape[1..].to_vec(), piece)
            })
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

/// Types of a checkpoint's tensors, but for biases, which are f32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    Bf16,
    F32,
    /// Experts of the one type and the other, in turn.
    Mixed,
}

/// A recipe's plan for a checkpoint of these types.
pub fn plan(mut recipe: Recipe, stored: Stored, options: &CompileOptions) -> PlanFile {
    if let ModelSource::Config(raw) = &mut recipe.model {
        raw.dtype = Some(if stored == Stored::F32 { "float32" } else { "bfloat16" }.into());
    }
    let compiled = |listing, options: &CompileOptions| {
        compile(&Source::Recipe(Box::new(recipe.clone()), listing), options, &Silent).unwrap().file
    };
    let listing = (stored == Stored::Mixed).then(|| {
        let options = CompileOptions { without_cubins: true, ..options.clone() };
        mixed(&compiled(None, &options).manifest)
    });
    compiled(listing, options)
}

/// The listing of a checkpoint with experts of two types.
fn mixed(manifest: &Manifest) -> CheckpointListing {
    let mut listing = CheckpointListing::new();
    for tensor in &manifest.tensors {
        match &tensor.sources[0] {
            TensorSource::PerIndex(pattern) => {
                for i in 0..tensor.shape[0] {
                    let dtype = [DType::BF16, DType::F32][i as usize % 2];
                    listing.insert(pattern.replace("{}", &i.to_string()), (dtype, tensor.shape[1..].to_vec()));
                }
            }
            _ => {
                listing.insert(tensor.name.clone(), (tensor.dtype, tensor.shape.clone()));
            }
        }
    }
    listing
}
