//! Drawings: a graph as Graphviz DOT or SVG, the memory of a plan's bucket as SVG. No external program is needed.

mod columns;
mod dot;
mod family;
mod layout;
mod legend;
mod node;
mod order;
mod place;
mod svg_graph;
mod svg_memory;
#[cfg(test)]
mod tests;
mod text;
mod view;

use std::ops::RangeInclusive;

pub use dot::dot;
pub use svg_graph::svg;
pub use svg_memory::memory_svg;
pub use view::layer;

/// What of a graph is drawn.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DotOptions {
    /// Only operators whose scope lies in these layers; none outside of layers, such as the embedding and the head.
    pub layers: Option<RangeInclusive<u64>>,
}
