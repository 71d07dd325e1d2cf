//! The parts of a manifest that no rank owns: model, limits, tensors.

use super::{Faults, MAX_DIM, type_bytes};
use crate::plan::{DType, Limits, Manifest, Phase, Tensor, TensorSource};

pub(super) fn check(manifest: &Manifest, faults: &mut Faults) {
    let model = &manifest.model;
    let language = manifest.ranks.iter().flat_map(|rank| &rank.buckets).any(|bucket| bucket.phase != Phase::Fixed);
    if manifest.ranks.is_empty() {
        faults.add("ranks", "expected at least one, found none");
    }
    if language && (model.vocab == 0 || model.vocab > MAX_DIM) {
        faults.add("model", format!("`vocab`: expected 1 to {MAX_DIM}, found {}", model.vocab));
    }
    if let Some(token) = model.prompt.iter().find(|&&token| u64::from(token) >= model.vocab) {
        faults.add("model", format!("`prompt`: expected tokens below {}, found {token}", model.vocab));
    }
    if model.config_hash.len() != 64 || !model.config_hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        faults.add("model", format!("`config_hash`: expected 64 hexadecimal digits, found `{}`", model.config_hash));
    }
    if manifest.dtype == DType::I32 && language {
        faults.add("dtype", "expected a float type, found I32");
    }
    limits(&manifest.limits, faults);
    faults.unique("tensors", manifest.tensors.iter().map(|tensor| tensor.name.as_str()));
    for tensor in &manifest.tensors {
        faults.note(format_args!("tensor {}", tensor.name), check_tensor(tensor));
    }
}

fn limits(limits: &Limits, faults: &mut Faults) {
    let fields = [
        ("max_sequences", limits.max_sequences),
        ("max_context", limits.max_context),
        ("kv_tokens", limits.kv_tokens),
        ("page_tokens", limits.page_tokens),
        ("ring_columns", limits.ring_columns),
    ];
    for (name, value) in fields {
        // One more than the largest index.
        if value == 0 || value > MAX_DIM + 1 {
            faults.add("limits", format!("`{name}`: expected 1 to {}, found {value}", MAX_DIM + 1));
        }
    }
    if limits.page_tokens != 0 && !limits.kv_tokens.is_multiple_of(limits.page_tokens) {
        faults.add(
            "limits",
            format!("`kv_tokens`: expected whole pages of {}, found {}", limits.page_tokens, limits.kv_tokens),
        );
    }
}

fn check_tensor(tensor: &Tensor) -> Result<(), String> {
    type_bytes(&crate::plan::TensorType(tensor.dtype, tensor.shape.clone()))?;
    let synthetic = &tensor.synthetic;
    if !synthetic.center.is_finite() || !synthetic.scale.is_finite() {
        return Err(format!("`synthetic`: expected finite numbers, found {synthetic:?}"));
    }
    let indices = tensor.shape.first().copied().unwrap_or(0);
    let mixed = &tensor.index_dtypes;
    if !mixed.is_empty() && (mixed.len() as u64 != indices || mixed.contains(&DType::I32) || tensor.dtype == DType::I32)
    {
        return Err(format!("`index_dtypes`: expected none or {indices} float types, found {}", mixed.len()));
    }
    if tensor.sources.is_empty() {
        return Err("expected at least one source".into());
    }
    for source in &tensor.sources {
        let (name, least_rank) = match source {
            TensorSource::Whole(name) => (name, 0),
            TensorSource::PerIndex(pattern) if pattern.matches("{}").count() != 1 => {
                return Err(format!("expected one `{{}}` in the source `{pattern}`"));
            }
            TensorSource::PerIndex(pattern) => (pattern, 1),
            TensorSource::Part { name, start, of } => {
                let end = tensor.shape.get(1).and_then(|size| start.checked_add(*size));
                if end.is_none_or(|end| end > *of || *of > MAX_DIM) {
                    return Err(format!("the part from {start} of {of} in `{name}` does not hold {:?}", tensor.shape));
                }
                (name, 2)
            }
        };
        if name.is_empty() || tensor.shape.len() < least_rank {
            return Err(format!("the source {source:?} does not fit the shape {:?}", tensor.shape));
        }
    }
    Ok(())
}
