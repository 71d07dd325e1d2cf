//! Weights on their way to a device: the tensors' elements as the checkpoint has them, in parts that threads of the host fill one
//! after the other. What the layout and the types of the weights ask for, the device does.

use std::ops::Range;

use rayon::prelude::*;

use super::layout::{Elements, Places, TASK_BYTES, places};
use super::synthetic::Numbers;
use super::{Origin, WeightError, resolve};
use crate::plan::{ALIGNMENT, DType, Manifest, Program};

/// How much goes at a time; at least [`ALIGNMENT`] of each.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Bytes of a part.
    pub part_bytes: usize,
    /// Bytes of a span whose elements the device puts in their places.
    pub placed_bytes: usize,
}

/// Adjacent elements of a tensor of one type, in a part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    /// Position of the weight in the program.
    pub weight: usize,
    /// The tensor, and where its elements lie in the weight.
    pub places: Places,
    /// First element in the tensor.
    pub first: u64,
    /// How many there are.
    pub elements: u64,
    /// Their type.
    pub dtype: DType,
    /// First byte in the part, aligned to [`ALIGNMENT`].
    pub start: usize,
    /// Whether its bytes are those of the weight from the first element's place on.
    pub is_copy: bool,
}

impl Span {
    /// Its bytes in the part.
    pub fn bytes(&self) -> Range<usize> {
        self.start..self.start + (self.elements * self.dtype.bytes()) as usize
    }
}

/// The parts of a program's weights.
pub struct Transfer<'a> {
    elements: Box<dyn Elements + 'a>,
    parts: Vec<Vec<Span>>,
}

impl<'a> Transfer<'a> {
    /// Of all weights, tensor by tensor.
    ///
    /// # Errors
    /// As [`super::load`].
    pub fn new(
        manifest: &'a Manifest,
        program: &Program,
        origin: Origin<'a>,
        room: Room,
    ) -> Result<Transfer<'a>, WeightError> {
        let elements: Box<dyn Elements + 'a> = match origin {
            Origin::Checkpoint(checkpoint) => Box::new(resolve::resolve(manifest, checkpoint)?),
            Origin::Synthetic(seed) => Box::new(Numbers::new(&manifest.tensors, seed)),
        };
        let aligned = |bytes: usize| (bytes as u64).max(ALIGNMENT) / ALIGNMENT * ALIGNMENT;
        let (part_bytes, placed_bytes) = (aligned(room.part_bytes), aligned(room.placed_bytes));
        let mut parts: Vec<Vec<Span>> = vec![];
        // The last part is full, as it were, so that there is a first one.
        let mut used = part_bytes;
        for (position, weight) in program.weights.iter().enumerate() {
            for places in places(weight, &manifest.tensors)? {
                let mut stored = 0;
                for (dtype, count) in elements.stored(places.tensor) {
                    let is_copy = weight.is_copy_of(dtype);
                    let most = if is_copy { part_bytes } else { placed_bytes };
                    let mut first = places.first.max(stored);
                    stored += count;
                    let end = stored.min(places.first + places.count);
                    while first < end {
                        if used == part_bytes {
                            parts.push(vec![]);
                            used = 0;
                        }
                        // Whole alignments, so that cutting takes no vectors of elements apart.
                        let elements = (most.min(part_bytes - used) / dtype.bytes()).min(end - first);
                        let start = used as usize;
                        used = (used + elements * dtype.bytes()).next_multiple_of(ALIGNMENT);
                        let span = Span { weight: position, places, first, elements, dtype, start, is_copy };
                        parts.last_mut().expect("there is one").push(span);
                        first += elements;
                    }
                }
            }
        }
        Ok(Transfer { elements, parts })
    }

    /// The parts, in turn.
    pub fn parts(&self) -> &[Vec<Span>] {
        &self.parts
    }

    /// Bytes of the largest part.
    pub fn part_bytes(&self) -> usize {
        self.parts.iter().flatten().map(|span| span.bytes().end).max().unwrap_or(0)
    }

    /// Writes a part's bytes, in parallel. Bytes between spans stay as they are.
    ///
    /// # Panics
    /// `bytes` is shorter than the part.
    pub fn read(&self, part: &[Span], mut bytes: &mut [u8]) {
        let mut tasks = vec![];
        let mut at = 0;
        for span in part {
            let Range { start, end } = span.bytes();
            let (bytes_of_span, rest) = std::mem::take(&mut bytes)[start - at..].split_at_mut(end - start);
            tasks.extend(bytes_of_span.chunks_mut(TASK_BYTES).enumerate().map(|(i, bytes)| (span, i, bytes)));
            (bytes, at) = (rest, end);
        }
        tasks.into_par_iter().for_each(|(span, i, bytes)| {
            let first = span.first + (i * TASK_BYTES) as u64 / span.dtype.bytes();
            self.elements.read(span.places.tensor, first, span.dtype, bytes);
        });
    }
}
