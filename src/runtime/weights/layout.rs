//! Writes weights in their layout: pieces of the region in parallel, each straight from the tensors' elements.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::{Progress, WeightError};
use crate::plan::{DType, Layout, Tensor, TensorType, Weight};

/// Bytes that one task writes: a multiple of every element's size.
pub(super) const TASK_BYTES: usize = 1 << 20;

/// The numbers of the manifest's tensors.
pub(super) trait Elements: Sync {
    /// The types that a tensor's elements are stored in, with how many are of each, in their order.
    fn stored(&self, tensor: u32) -> Vec<(DType, u64)>;

    /// Writes the elements of a tensor from `first` on, as elements of `dtype`, until `bytes` is full.
    fn read(&self, tensor: u32, first: u64, dtype: DType, bytes: &mut [u8]);
}

/// Fills the region with the weights.
pub(super) fn fill(
    tensors: &[Tensor],
    weights: &[Weight],
    elements: &impl Elements,
    region: &mut [u8],
    progress: Progress,
) -> Result<(), WeightError> {
    let mut tasks = Vec::new();
    for (weight, bytes) in split(weights, region)? {
        let gather = Gather::new(weight, tensors).map_err(|what| fault(weight, what))?;
        let tasks_of_weight = bytes.chunks_mut(TASK_BYTES).enumerate();
        tasks.extend(tasks_of_weight.map(|(i, bytes)| (weight.ty.0, gather.clone(), i * TASK_BYTES, bytes)));
    }
    let done = Mutex::new(0u64);
    tasks.into_par_iter().for_each(|(dtype, gather, offset_bytes, bytes)| {
        gather.write(elements, offset_bytes as u64 / dtype.bytes(), dtype, bytes);
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += bytes.len() as u64;
        progress(*done);
    });
    Ok(())
}

/// A weight's elements as they are in its layout.
pub(super) struct Reader {
    gather: Gather,
    dtype: DType,
}

impl Reader {
    /// Of a weight of a plan with these tensors.
    pub(super) fn new(weight: &Weight, tensors: &[Tensor]) -> Result<Reader, WeightError> {
        let gather = Gather::new(weight, tensors).map_err(|what| fault(weight, what))?;
        Ok(Reader { gather, dtype: weight.ty.0 })
    }

    /// Writes elements from `position` on until `bytes` is full.
    pub(super) fn read(&self, elements: &impl Elements, position: u64, bytes: &mut [u8]) {
        self.gather.write(elements, position, self.dtype, bytes);
    }
}

/// The bytes of each weight, by ascending offset.
fn split<'w, 'r>(weights: &'w [Weight], region: &'r mut [u8]) -> Result<Vec<(&'w Weight, &'r mut [u8])>, WeightError> {
    let length = region.len();
    let mut order = Vec::with_capacity(weights.len());
    for weight in weights {
        let bytes = weight.ty.bytes().ok_or_else(|| fault(weight, format!("size of {:?} overflows", weight.ty)))?;
        order.push((weight.offset, bytes, weight));
    }
    order.sort_by_key(|&(offset, bytes, _)| (offset, bytes));
    let (mut rest, mut at) = (region, 0);
    let mut slices = Vec::with_capacity(weights.len());
    for (offset, bytes, weight) in order {
        let gap = offset
            .checked_sub(at)
            .ok_or_else(|| fault(weight, format!("expected an offset of at least {at}, found {offset}")))?;
        let outside = || fault(weight, format!("expected a place within {length} bytes, found {bytes} at {offset}"));
        let (gap, size) = usize::try_from(gap).ok().zip(usize::try_from(bytes).ok()).ok_or_else(outside)?;
        let (slice, after) =
            rest.split_at_mut_checked(gap).and_then(|(_, r)| r.split_at_mut_checked(size)).ok_or_else(outside)?;
        slices.push((weight, slice));
        rest = after;
        at = offset + bytes;
    }
    Ok(slices)
}

/// Where the elements of a tensor lie in a weight; see [`Places::of`]. Devices write weights by this, tensor by tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Places {
    /// Position of the tensor in the manifest.
    pub tensor: u32,
    /// Elements of the tensor in a period of the weight.
    pub part: u64,
    /// Elements of a period.
    pub whole: u64,
    /// Elements that are adjacent in both.
    pub run: u64,
    /// From one run to the next, in the weight.
    pub stride: u64,
    /// The first run's place in a period.
    pub offset: u64,
    /// The elements that these are the places of: the first, and how many; all of the tensor unless the weight has but some indices.
    pub first: u64,
    /// See `first`.
    pub count: u64,
    /// Elements of the tensor before the first that the weight does not have: places are counted without them.
    pub skipped: u64,
}

impl Places {
    /// The place of element i of the tensor.
    pub fn of(&self, i: u64) -> u64 {
        let i = i - self.skipped;
        let rest = i % self.part;
        i / self.part * self.whole + rest / self.run * self.stride + self.offset + rest % self.run
    }
}

/// The places of all tensors of a weight, those without elements left out; of a weight that has but some indices, for each run of them.
///
/// # Errors
/// The plan is inconsistent.
pub fn places(weight: &Weight, tensors: &[Tensor]) -> Result<Vec<Places>, WeightError> {
    let gather = Gather::new(weight, tensors).map_err(|what| fault(weight, what))?;
    let count = gather.parts.len() as u64;
    let places =
        gather.parts.iter().zip(0..).filter(|(part, _)| part.elements > 0).map(|(part, index): (&Part, u64)| {
            let (run, stride, offset) = match gather.block {
                None => (part.elements, part.elements, part.start),
                Some(block) => (block, block * count, index * block),
            };
            let count = tensors[part.tensor as usize].shape.iter().product();
            let (part, whole) = (part.elements, gather.period);
            Places {
                tensor: gather.parts[index as usize].tensor,
                part,
                whole,
                run,
                stride,
                offset,
                first: 0,
                count,
                skipped: 0,
            }
        });
    let Some(Taken { indices, .. }) = &gather.taken else { return Ok(places.collect()) };
    let of_run = |places: Places, (local, first, count): (u64, u64, u64)| {
        // The layout joins no first axes, so each tensor has all indices.
        let each = places.count / tensors[places.tensor as usize].shape.first().copied().unwrap_or(1).max(1);
        Places { first: first * each, count: count * each, skipped: (first - local) * each, ..places }
    };
    Ok(places.flat_map(|places| runs(indices).into_iter().map(move |run| of_run(places, run))).collect())
}

/// Ascending indices as runs: position of the first among them, the first, and how many.
fn runs(indices: &[u64]) -> Vec<(u64, u64, u64)> {
    let mut runs: Vec<(u64, u64, u64)> = vec![];
    for (local, &index) in (0..).zip(indices) {
        match runs.last_mut() {
            Some((_, first, count)) if *first + *count == index => *count += 1,
            _ => runs.push((local, index, 1)),
        }
    }
    runs
}

fn fault(weight: &Weight, what: String) -> WeightError {
    WeightError::Plan { entity: format!("weight `{}`", weight.name), what }
}

/// Which element of which tensor each element of a weight is. A weight is a repetition of periods, one for each index of
/// the axes before the joined one; in a period, each part has a run of elements, cut into blocks if they interleave.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Gather {
    parts: Vec<Part>,
    /// Elements of a block.
    block: Option<u64>,
    /// Elements of a period.
    period: u64,
    /// Which of that the weight has, if not all.
    taken: Option<Taken>,
}

/// Some indices of a first axis.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Taken {
    indices: Vec<u64>,
    /// Elements of one index.
    elements: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Part {
    tensor: u32,
    /// Its first element in a period, if parts do not interleave.
    start: u64,
    /// Elements in a period.
    elements: u64,
}

/// Adjacent elements of a weight that are adjacent in a tensor.
#[derive(PartialEq, Eq, Debug)]
struct Run {
    tensor: u32,
    /// First element in the tensor.
    first: u64,
    elements: u64,
}

impl Gather {
    fn new(weight: &Weight, tensors: &[Tensor]) -> Result<Gather, String> {
        let tensor = |position: u32| {
            let tensor = tensors.get(position as usize).ok_or_else(|| {
                format!("expected the position of one of {} tensors, found {position}", tensors.len())
            })?;
            if (tensor.dtype == DType::I32) != (weight.ty.0 == DType::I32) {
                return Err(format!("type {:?} cannot be made of `{}`, {:?}", weight.ty.0, tensor.name, tensor.dtype));
            }
            Ok(tensor)
        };
        let taken = Taken::new(weight)?;
        // What the layout makes: of all indices.
        let whole = match (&taken, weight.layout.tensors()) {
            (Some(_), [first, ..]) => {
                let first = tensor(*first)?.shape.first().copied().unwrap_or(0);
                if let Some(index) = weight.indices.iter().find(|&&index| index >= first) {
                    return Err(format!("expected indices below {first}, found {index}"));
                }
                TensorType(weight.ty.0, [&[first], &weight.ty.1[1..]].concat())
            }
            _ => weight.ty.clone(),
        };
        let total = whole.elements().ok_or("number of elements overflows")?;
        let gather = match &weight.layout {
            Layout::Copy(position) => {
                let TensorType(_, shape) = &whole;
                let tensor = tensor(*position)?;
                if TensorType(tensor.dtype, tensor.shape.clone()).elements() != Some(total) {
                    let (name, found) = (&tensor.name, &tensor.shape);
                    return Err(format!("expected `{name}` with the elements of {shape:?}, found {found:?}"));
                }
                let part = Part { tensor: *position, start: 0, elements: total };
                Gather { parts: vec![part], block: None, period: total, taken: None }
            }
            Layout::Concat { axis, block, tensors: positions } => {
                let parts = positions.iter().map(|&p| Ok((p, tensor(p)?))).collect::<Result<Vec<_>, String>>()?;
                Gather::concat(&whole.1, *axis as usize, *block, &parts)?
            }
        };
        Ok(Gather { taken, ..gather })
    }

    /// The elements of the shape's product are known to be countable.
    fn concat(shape: &[u64], axis: usize, block: Option<u64>, tensors: &[(u32, &Tensor)]) -> Result<Gather, String> {
        let rank = shape.len();
        let size = *shape.get(axis).ok_or_else(|| format!("expected an axis below {rank}, found {axis}"))?;
        let overflow = || format!("a row of {shape:?} overflows");
        let inner = shape[axis + 1..].iter().try_fold(1u64, |n, &dim| n.checked_mul(dim)).ok_or_else(overflow)?;
        let mut parts = Vec::with_capacity(tensors.len());
        let (mut sum, mut first) = (0u64, None);
        for &(position, tensor) in tensors {
            let same = |a: &[u64]| a.len() == rank && a[..axis] == shape[..axis] && a[axis + 1..] == shape[axis + 1..];
            let (name, found) = (&tensor.name, &tensor.shape);
            if !same(found) {
                return Err(format!(
                    "expected `{name}` with the shape {shape:?} except on axis {axis}, found {found:?}"
                ));
            }
            let part = found[axis];
            if let Some(block) = block
                && (block == 0 || part % block != 0 || *first.get_or_insert(part) != part)
            {
                let rule = format!("parts of one size that `block = {block}` divides");
                return Err(format!("expected {rule}, found {part} of `{name}`"));
            }
            let elements = part.checked_mul(inner).ok_or_else(overflow)?;
            parts.push(Part { tensor: position, start: sum.saturating_mul(inner), elements });
            sum = sum.saturating_add(part);
        }
        if sum != size {
            return Err(format!("expected parts that add up to {size} on axis {axis}, found {sum}"));
        }
        let period = size.checked_mul(inner).ok_or_else(overflow)?;
        let block = block.map(|block| block.checked_mul(inner).ok_or_else(overflow)).transpose()?;
        Ok(Gather { parts, block, period, taken: None })
    }

    /// The run that starts at an element of a weight that is not empty.
    fn run(&self, position: u64) -> Run {
        let Some(Taken { indices, elements }) = &self.taken else { return self.run_of_all(position) };
        let (at, within) = (position / elements, position % elements);
        let run = self.run_of_all(indices[at as usize] * elements + within);
        Run { elements: run.elements.min(elements - within), ..run }
    }

    /// As [`Gather::run`], had the weight all indices.
    fn run_of_all(&self, position: u64) -> Run {
        let (repeat, at) = (position / self.period, position % self.period);
        match self.block {
            None => {
                // Parts ascend, and one that is empty starts where the next does.
                let index = self.parts.partition_point(|part| part.start <= at) - 1;
                let Part { tensor, start, elements } = self.parts[index];
                Run { tensor, first: repeat * elements + (at - start), elements: start + elements - at }
            }
            Some(block) => {
                let count = self.parts.len() as u64;
                let (index, within) = (at / block, at % block);
                let Part { tensor, elements, .. } = self.parts[(index % count) as usize];
                Run { tensor, first: repeat * elements + index / count * block + within, elements: block - within }
            }
        }
    }

    /// Writes elements of the weight from `position` on.
    fn write(&self, elements: &impl Elements, mut position: u64, dtype: DType, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let run = self.run(position);
            // A run may be longer than what is left to write, never by more than the weight's own size.
            let size = run.elements.saturating_mul(dtype.bytes()).min(bytes.len() as u64);
            let (now, later) = bytes.split_at_mut(size as usize);
            elements.read(run.tensor, run.first, dtype, now);
            position += size / dtype.bytes();
            bytes = later;
        }
    }
}

impl Taken {
    fn new(weight: &Weight) -> Result<Option<Taken>, String> {
        let (indices, shape) = (weight.indices.clone(), &weight.ty.1);
        if indices.is_empty() {
            return Ok(None);
        }
        if shape.first() != Some(&(indices.len() as u64)) {
            return Err(format!(
                "expected as many indices as its first axis has, found {} for {shape:?}",
                indices.len()
            ));
        }
        let elements = weight.ty.elements().ok_or("number of elements overflows")? / indices.len() as u64;
        Ok(Some(Taken { indices, elements }))
    }
}

#[cfg(test)]
mod tests;
