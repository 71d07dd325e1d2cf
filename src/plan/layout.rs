//! The weights of the pool, and how they are made of checkpoint tensors.

use serde::{Deserialize, Serialize};

use crate::plan::{DType, TensorType};

/// A weight in the pool.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// Name in the graph.
    pub name: String,
    /// Element type and shape in the pool.
    pub ty: TensorType,
    /// Offset in the weights region.
    pub offset: u64,
    /// How it is made of checkpoint tensors.
    pub layout: Layout,
    /// Of what the layout makes, the indices of the first axis that it has, ascending; all if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub indices: Vec<u64>,
}

/// How a weight is made of checkpoint tensors, each converted to the weight's element type.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Layout {
    /// One tensor, by position in [`crate::plan::Manifest::tensors`].
    Copy(u32),
    /// Several joined along an axis, in turn and `block` indices at a time if `block` is given.
    Concat {
        /// The axis.
        axis: u32,
        /// Interleaving.
        block: Option<u64>,
        /// Positions in [`crate::plan::Manifest::tensors`].
        tensors: Vec<u32>,
    },
}

impl Layout {
    /// Positions of the tensors, in turn.
    pub fn tensors(&self) -> &[u32] {
        match self {
            Layout::Copy(tensor) => std::slice::from_ref(tensor),
            Layout::Concat { tensors, .. } => tensors,
        }
    }
}

impl Weight {
    /// Whether elements of a tensor in this type are copied into the weight as they are: each tensor's elements are adjacent there,
    /// in their order. Others a device puts in their places by [`crate::plan::ServiceRole::Place`].
    pub fn is_copy_of(&self, dtype: DType) -> bool {
        let adjacent = match &self.layout {
            Layout::Copy(_) => true,
            Layout::Concat { axis, block, tensors } => {
                let one_period = self.ty.1.iter().take(*axis as usize).all(|&size| size == 1);
                tensors.len() == 1 || (block.is_none() && one_period)
            }
        };
        adjacent && self.indices.is_empty() && dtype == self.ty.0
    }
}
