//! What the weights of a graph need from a checkpoint.

use crate::codegen::compile::CheckpointListing;
use crate::ir;
use crate::plan::{DType, Synthetic, Tensor, TensorSource};

/// The checkpoint tensor behind a weight that is one, with the element type `dtype` there.
pub fn tensor(weight: &ir::Weight, dtype: ir::DType) -> Result<Tensor, String> {
    let shape: Vec<u64> = weight
        .ty
        .shape
        .iter()
        .map(|dim| dim.as_fixed().ok_or_else(|| format!("@{}: weights have constant shapes", weight.name)))
        .collect::<Result<_, _>>()?;
    let digest = blake3::hash(weight.name.as_bytes());
    let salt = u64::from_le_bytes(std::array::from_fn(|i| digest.as_bytes()[i]));
    let (center, scale) = synthetic_range(&weight.name, &shape);
    Ok(Tensor {
        name: weight.name.clone(),
        dtype: super::lower::dtype(dtype),
        index_dtypes: vec![],
        sources: sources(&weight.name, &shape),
        shape,
        synthetic: Synthetic { salt, center, scale },
    })
}

/// Both expert layouts that are in the wild: one tensor an expert, or all packed, `w1` rows before `w3` rows.
fn sources(name: &str, shape: &[u64]) -> Vec<TensorSource> {
    let Some((base, part)) = name.rsplit_once(".experts.") else {
        return vec![TensorSource::Whole(name.to_owned())];
    };
    let packed = |start| TensorSource::Part { name: format!("{base}.experts.gate_up_proj"), start, of: 2 * shape[1] };
    let each = TensorSource::PerIndex(format!("{base}.experts.{{}}.{part}"));
    match part {
        "w1.weight" if shape.len() == 3 => vec![each, packed(0)],
        "w3.weight" if shape.len() == 3 => vec![each, packed(shape[1])],
        "w2.weight" => vec![each, TensorSource::Whole(format!("{base}.experts.down_proj"))],
        _ => vec![TensorSource::Whole(name.to_owned())],
    }
}

/// The element types of a weight in a checkpoint's listing, in the form that the checkpoint holds it in: one, or one for each
/// index.
pub fn listed_dtypes(listing: &CheckpointListing, name: &str) -> Vec<DType> {
    let dtype = |name: &str| listing.get(name).map(|(dtype, _)| *dtype);
    let forms = sources(name, &[1, 1, 1]).into_iter().map(|source| match source {
        TensorSource::Whole(name) | TensorSource::Part { name, .. } => dtype(&name).into_iter().collect(),
        TensorSource::PerIndex(pattern) => {
            (0..).map_while(|index| dtype(&pattern.replace("{}", &format!("{index}")))).collect::<Vec<_>>()
        }
    });
    forms.into_iter().find(|dtypes| !dtypes.is_empty()).unwrap_or_default()
}

/// Notes the types of a tensor that the checkpoint holds in differing ones.
pub fn note_mixed(tensor: &mut Tensor, listing: &CheckpointListing) {
    let mut dtypes = listed_dtypes(listing, &tensor.name);
    // A listing with fewer or more indices is told as missing or unexpected tensors when it is loaded.
    if dtypes.iter().any(|dtype| *dtype != dtypes[0]) {
        dtypes.resize(tensor.shape.first().map_or(0, |&indices| indices as usize), tensor.dtype);
        tensor.index_dtypes = dtypes;
    }
}

/// Mean and half width of a synthetic tensor, so that activations keep their size through the layers: norms near 1,
/// projections of unit gain, logits of a few units, biases small but not zero.
fn synthetic_range(name: &str, shape: &[u64]) -> (f32, f32) {
    // A uniform number in [-1, 1) has variance 1/3.
    let unit_gain = |fan_in: u64| (3.0 / fan_in.max(1) as f64).sqrt();
    let (center, scale) = match shape {
        [_] if name.ends_with("norm.weight") => (1.0, 0.1),
        [_] => (0.0, 0.05),
        [_, width] if name.ends_with("embed_tokens.weight") || name.ends_with("lm_head.weight") => {
            (0.0, 2.0 * unit_gain(*width))
        }
        [.., inner] => (0.0, unit_gain(*inner)),
        [] => (1.0, 0.1),
    };
    (center, scale as f32)
}
