//! What the weights of a graph need from a checkpoint.

use crate::codegen::compile::CheckpointListing;
use crate::codegen::types::plan_dtype;
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
        dtype: plan_dtype(dtype),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DType, Layout, Type};

    fn of(name: &str, shape: &[u64]) -> Tensor {
        let ty = Type::new(DType::BF16, shape.iter().copied());
        let weight = ir::Weight { name: name.into(), ty, layout: Layout::Tensor };
        tensor(&weight, DType::F16).expect("the shape is constant")
    }

    #[test]
    fn experts_are_stored_one_by_one_or_packed() {
        let base = "model.layers.2.feed_forward";
        let each = |part: &str| TensorSource::PerIndex(format!("{base}.experts.{{}}.{part}.weight"));
        let packed = |start| TensorSource::Part { name: format!("{base}.experts.gate_up_proj"), start, of: 12 };
        let sources = |part: &str, shape: &[u64]| of(&format!("{base}.experts.{part}.weight"), shape).sources;
        assert_eq!(sources("w1", &[4, 6, 8]), [each("w1"), packed(0)]);
        assert_eq!(sources("w3", &[4, 6, 8]), [each("w3"), packed(6)], "w3 rows follow w1 rows");
        let down = TensorSource::Whole(format!("{base}.experts.down_proj"));
        assert_eq!(sources("w2", &[4, 8, 6]), [each("w2"), down]);
        let listing = |names: &[String]| {
            let types = [crate::plan::DType::BF16, crate::plan::DType::F16];
            names.iter().zip(types).map(|(name, dtype)| (name.clone(), (dtype, vec![]))).collect::<CheckpointListing>()
        };
        let name = format!("{base}.experts.w3.weight");
        let one_by_one = listing(&[format!("{base}.experts.0.w3.weight"), format!("{base}.experts.1.w3.weight")]);
        assert_eq!(listed_dtypes(&one_by_one, &name), [crate::plan::DType::BF16, crate::plan::DType::F16]);
        let packed = listing(&[format!("{base}.experts.gate_up_proj")]);
        assert_eq!(listed_dtypes(&packed, &name), [crate::plan::DType::BF16]);
    }

    #[test]
    fn other_tensors_are_stored_under_their_names() {
        let found = of("model.layers.0.conv.conv.weight", &[8, 3]);
        assert_eq!(found.sources, [TensorSource::Whole(found.name.clone())]);
        assert_eq!((found.dtype, &found.shape[..]), (crate::plan::DType::F16, &[8, 3][..]), "the checkpoint's type");
    }

    #[test]
    fn synthetic_numbers_differ_by_tensor_and_are_never_constant() {
        let names = ["model.layers.0.ffn_norm.weight", "model.layers.0.feed_forward.expert_bias", "a.weight"];
        let synthetic: Vec<Synthetic> = names.iter().map(|name| of(name, &[8]).synthetic).collect();
        assert!(synthetic.iter().all(|numbers| numbers.scale > 0.0));
        assert_eq!([synthetic[0].center, synthetic[1].center], [1.0, 0.0]);
        assert_ne!(synthetic[0].salt, synthetic[1].salt);
        // The variance of a product over 48 uniform numbers of half width sqrt(3/48) is 1.
        assert_eq!(of("a.weight", &[4, 48]).synthetic.scale, 0.25);
    }
}
