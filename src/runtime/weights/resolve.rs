//! Finds the manifest's tensors in a checkpoint, and tells all that does not fit at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use super::WeightError;
use super::checkpoint::{Checkpoint, CheckpointTensor};
use super::layout::Elements;
use crate::plan::{DType, Manifest, Tensor, TensorSource};
use crate::runtime::convert::convert;

/// The most tensors that one tensor may be cut into; bounds the work that a damaged plan can ask for.
const MAX_INDICES: u64 = 1 << 20;

/// All differences between a checkpoint and what a plan needs, each list by name.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct CheckpointMismatch {
    /// The checkpoint's directory.
    pub dir: PathBuf,
    /// Tensors that the plan needs.
    pub missing: Vec<Missing>,
    /// Tensors of another shape.
    pub misshapen: Vec<Misshapen>,
    /// Tensors of another element type.
    pub mistyped: Vec<Mistyped>,
    /// Tensors that the plan does not know.
    pub unexpected: Vec<String>,
}

/// A tensor that a checkpoint lacks.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Missing {
    /// Its name in the plan, or in the checkpoint if others of the same form are there.
    pub name: String,
    /// Names under which a checkpoint may hold it; none if it can only be `name`.
    pub forms: Vec<String>,
}

/// A tensor of another shape.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Misshapen {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the plan.
    pub expected: Vec<u64>,
    /// Shape in the checkpoint.
    pub found: Vec<u64>,
}

/// A tensor of another element type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mistyped {
    /// Name in the checkpoint.
    pub name: String,
    /// Type in the plan.
    pub expected: DType,
    /// Type in the checkpoint.
    pub found: DType,
}

impl fmt::Display for CheckpointMismatch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let counts = [
            (self.missing.len(), "missing"),
            (self.misshapen.len(), "misshapen"),
            (self.mistyped.len(), "mistyped"),
            (self.unexpected.len(), "unexpected"),
        ];
        let counts: Vec<String> =
            counts.iter().filter(|(n, _)| *n > 0).map(|(n, kind)| format!("{n} {kind}")).collect();
        writeln!(f, "{}: the checkpoint does not fit the plan: tensors {}", self.dir.display(), counts.join(", "))?;
        for Missing { name, forms } in &self.missing {
            write!(f, "  missing `{name}`")?;
            if !forms.is_empty() {
                write!(f, ", expected as `{}`", forms.join("` or `"))?;
            }
            writeln!(f)?;
        }
        for Misshapen { name, expected, found } in &self.misshapen {
            writeln!(f, "  misshapen `{name}`: expected {expected:?}, found {found:?}")?;
        }
        for Mistyped { name, expected, found } in &self.mistyped {
            writeln!(f, "  mistyped `{name}`: expected {expected:?}, found {found:?}")?;
        }
        for name in &self.unexpected {
            writeln!(f, "  unexpected `{name}`")?;
        }
        write!(
            f,
            "name the checkpoint that the plan was compiled for, or compile again with `--model DIR` for this one"
        )
    }
}

impl std::error::Error for CheckpointMismatch {}

/// Where the elements of the manifest's tensors are, in its order.
pub(super) struct Stored<'a>(Vec<StoredTensor<'a>>);

/// A tensor in pieces of equal size, each adjacent in memory, in the order of its elements.
struct StoredTensor<'a> {
    piece_elements: u64,
    /// The element type of each, and its bytes.
    pieces: Vec<(DType, &'a [u8])>,
}

impl Elements for Stored<'_> {
    fn stored(&self, tensor: u32) -> Vec<(DType, u64)> {
        let StoredTensor { piece_elements, pieces } = &self.0[tensor as usize];
        let runs = pieces.chunk_by(|a, b| a.0 == b.0);
        runs.map(|run| (run[0].0, run.len() as u64 * piece_elements)).collect()
    }

    fn read(&self, tensor: u32, first: u64, dtype: DType, mut bytes: &mut [u8]) {
        let stored = &self.0[tensor as usize];
        let mut position = first;
        while !bytes.is_empty() {
            let (piece, within) = (position / stored.piece_elements, position % stored.piece_elements);
            let elements = (stored.piece_elements - within).min(bytes.len() as u64 / dtype.bytes());
            let (now, later) = bytes.split_at_mut((elements * dtype.bytes()) as usize);
            let (found, piece) = stored.pieces[piece as usize];
            let source = &piece[(within * found.bytes()) as usize..][..(elements * found.bytes()) as usize];
            convert(found, source, dtype, now);
            position += elements;
            bytes = later;
        }
    }
}

/// Finds all tensors; the first source that fits is taken.
pub(super) fn resolve<'a>(manifest: &Manifest, checkpoint: &'a Checkpoint) -> Result<Stored<'a>, WeightError> {
    let tensors = &manifest.tensors;
    let forced = manifest.model.forced_routing.is_some();
    let mut report = Report::default();
    let mut named = BTreeSet::new();
    let mut stored = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let mut forms = Vec::with_capacity(tensor.sources.len());
        for source in &tensor.sources {
            let form = Form::new(tensor, source)
                .map_err(|what| WeightError::Plan { entity: format!("tensor `{}`", tensor.name), what })?;
            named.extend(form.names.iter().cloned());
            forms.push(form);
        }
        stored.extend(locate(tensor, &forms, checkpoint, &mut report));
    }
    let unexpected =
        checkpoint.tensors().map(|t| t.name).filter(|name| !named.contains(*name) && !harmless(name, forced));
    let mismatch = CheckpointMismatch {
        dir: checkpoint.dir().to_owned(),
        missing: report.missing.into_iter().collect(),
        misshapen: report.misshapen.into_iter().collect(),
        mistyped: report.mistyped.into_values().collect(),
        unexpected: unexpected.map(str::to_owned).collect(),
    };
    // Every tensor that was not found left something in the report.
    let CheckpointMismatch { missing, misshapen, mistyped, unexpected, .. } = &mismatch;
    if missing.is_empty() && misshapen.is_empty() && mistyped.is_empty() && unexpected.is_empty() {
        Ok(Stored(stored))
    } else {
        Err(mismatch.into())
    }
}

/// Tensors that checkpoints carry without need: the head of a model that shares it with the embedding, and what older
/// libraries stored of position embeddings; and with forced routing, what only takes part in the choice of experts.
fn harmless(name: &str, forced: bool) -> bool {
    name == "lm_head.weight"
        || name.ends_with(".rotary_emb.inv_freq")
        || forced && name.ends_with(".feed_forward.expert_bias")
}

/// What is wrong; sets, because several of the plan's tensors may be parts of one.
#[derive(Default)]
struct Report {
    missing: BTreeSet<Missing>,
    misshapen: BTreeSet<Misshapen>,
    mistyped: BTreeMap<String, Mistyped>,
}

/// The checkpoint's tensors that together are one of the plan's.
struct Form<'a> {
    source: &'a TensorSource,
    names: Vec<String>,
    /// Shape of each.
    shape: Vec<u64>,
}

impl<'a> Form<'a> {
    fn new(tensor: &Tensor, source: &'a TensorSource) -> Result<Form<'a>, String> {
        let (names, shape) = match (source, tensor.shape.as_slice()) {
            (TensorSource::Whole(name), shape) => (vec![name.clone()], shape.to_vec()),
            (TensorSource::PerIndex(pattern), [indices, shape @ ..]) => {
                if *indices > MAX_INDICES {
                    return Err(format!("expected at most {MAX_INDICES} indices for `{pattern}`, found {indices}"));
                }
                if !pattern.contains("{}") {
                    return Err(format!("expected `{{}}` for the index in the name, found `{pattern}`"));
                }
                ((0..*indices).map(|i| pattern.replacen("{}", &i.to_string(), 1)).collect(), shape.to_vec())
            }
            (TensorSource::Part { name, start, of }, [first, size, rest @ ..]) => {
                if start.checked_add(*size).is_none_or(|end| end > *of) {
                    return Err(format!("expected a part of {of} indices of `{name}`, found {size} from {start} on"));
                }
                (vec![name.clone()], [&[*first, *of], rest].concat())
            }
            (source, shape) => return Err(format!("expected more axes than {shape:?} has, for {source:?}")),
        };
        Ok(Form { source, names, shape })
    }

    /// The pieces of a tensor, given the bytes of each of the checkpoint's, whose shapes are right.
    fn pieces<'d>(&self, tensor: &Tensor, data: Vec<&'d [u8]>) -> StoredTensor<'d> {
        let typed = |pieces: Vec<&'d [u8]>| -> Vec<(DType, &'d [u8])> {
            pieces.into_iter().enumerate().map(|(index, piece)| (self.dtype(tensor, index), piece)).collect()
        };
        let pieces: Vec<&[u8]> = match (self.source, tensor.shape.as_slice()) {
            (TensorSource::Part { start, of, .. }, [first, size, ..]) => {
                let whole = data.first().copied().unwrap_or_default();
                // The divisors are zero only if there are no bytes either.
                let index_bytes = whole.len().checked_div((first * of) as usize).unwrap_or(0);
                let (skip, take) = (*start as usize * index_bytes, *size as usize * index_bytes);
                let row_bytes = (*of as usize * index_bytes).max(1);
                whole.chunks_exact(row_bytes).map(|row| &row[skip..][..take]).collect()
            }
            _ => data,
        };
        let pieces = typed(pieces);
        let piece_elements = pieces.first().map_or(0, |(dtype, piece)| piece.len() as u64 / dtype.bytes());
        StoredTensor { piece_elements, pieces }
    }

    /// Element type of one of the checkpoint's tensors.
    fn dtype(&self, tensor: &Tensor, index: usize) -> DType {
        match self.source {
            TensorSource::PerIndex(_) => tensor.index_dtypes.get(index).copied().unwrap_or(tensor.dtype),
            _ => tensor.dtype,
        }
    }
}

/// Finds a tensor in the first form that fits; if there is none, reports the first form of which anything is there.
fn locate<'a>(
    tensor: &Tensor,
    forms: &[Form],
    checkpoint: &'a Checkpoint,
    report: &mut Report,
) -> Option<StoredTensor<'a>> {
    let mut best: Option<(&Form, Vec<Option<CheckpointTensor>>)> = None;
    for form in forms {
        let found: Vec<_> = form.names.iter().map(|name| checkpoint.tensor(name)).collect();
        let fits = |index: usize, found: &CheckpointTensor| {
            found.dtype == form.dtype(tensor, index) && same_shape(&form.shape, found.shape)
        };
        let data = found.iter().enumerate().map(|(i, t)| t.filter(|t| fits(i, t)).map(|t| t.data));
        if let Some(data) = data.collect() {
            return Some(form.pieces(tensor, data));
        }
        if best.is_none() && found.iter().any(Option::is_some) {
            best = Some((form, found));
        }
    }
    let Some((form, found)) = best else {
        let patterns = forms.iter().map(|form| match form.source {
            TensorSource::Whole(name) | TensorSource::PerIndex(name) | TensorSource::Part { name, .. } => name.clone(),
        });
        let forms = patterns.collect::<Vec<_>>();
        let forms = if forms == [tensor.name.as_str()] { Vec::new() } else { forms };
        report.missing.insert(Missing { name: tensor.name.clone(), forms });
        return None;
    };
    for (index, (name, found)) in form.names.iter().zip(found).enumerate() {
        let name = name.clone();
        let Some(found) = found else {
            report.missing.insert(Missing { name, forms: Vec::new() });
            continue;
        };
        let expected = form.dtype(tensor, index);
        if found.dtype != expected {
            let mistyped = Mistyped { name: name.clone(), expected, found: found.dtype };
            report.mistyped.insert(name.clone(), mistyped);
        }
        if !same_shape(&form.shape, found.shape) {
            report.misshapen.insert(Misshapen { name, expected: form.shape.clone(), found: found.shape.to_vec() });
        }
    }
    None
}

/// Equal but for dimensions of size 1, which do not change the order of elements.
fn same_shape(a: &[u64], b: &[u64]) -> bool {
    a.iter().filter(|&&dim| dim != 1).eq(b.iter().filter(|&&dim| dim != 1))
}
