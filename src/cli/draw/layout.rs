//! Layered layout: from boxes and the values between them to coordinates.
//!
//! Boxes are ranked by longest path, section by section, so that sections never share a rank. A value that skips ranks
//! passes through a bend in each, shared by all that take it; see [`crate::cli::draw::order`] for the order within ranks and
//! [`crate::cli::draw::place`] for the horizontal coordinates.

use crate::cli::draw::{order, place};

/// A box. Its anchor is the middle of its top; what it takes arrives near the anchor.
#[derive(Clone, PartialEq, Debug)]
pub struct Item {
    /// Half the width of the box, to both sides of the anchor.
    pub half: f64,
    /// Room needed to the left of the anchor, labels included.
    pub left: f64,
    /// Room needed to the right of the anchor, labels and what hangs beside the box included.
    pub right: f64,
    /// Height of the box.
    pub height: f64,
    /// The section it belongs to; items come by ascending section.
    pub section: usize,
}

/// A value: from one box to others, all later in the list.
#[derive(Clone, PartialEq, Debug)]
pub struct Net {
    /// The box that makes it.
    pub from: usize,
    /// Where it leaves that box, from the anchor.
    pub port: f64,
    /// The boxes that take it, each once.
    pub to: Vec<usize>,
}

/// Vertical distances.
pub struct Spacing<'a> {
    /// Room for labels under a box that values leave.
    pub label: f64,
    /// Between ranks, for edges to turn.
    pub turn: f64,
    /// Further distance between the ranks of one section and the next.
    pub between: &'a dyn Fn(usize, usize) -> f64,
    /// Least height of a section.
    pub section: &'a dyn Fn(usize) -> f64,
}

/// Coordinates. The leftmost extent of all boxes is at x = 0, the first rank at y = 0.
pub struct Layout {
    /// Of each box, the anchor.
    pub x: Vec<f64>,
    /// Of each box, the top.
    pub y: Vec<f64>,
    /// The ranks from top to bottom.
    pub bands: Vec<Band>,
    /// The parts of all edges.
    pub segments: Vec<Segment>,
    /// Width of everything.
    pub width: f64,
    /// Height of everything.
    pub height: f64,
}

/// A rank.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Band {
    /// Top of the tallest box.
    pub top: f64,
    /// Bottom, labels included.
    pub bottom: f64,
    /// Its section.
    pub section: usize,
}

/// A part of an edge: straight down from `start` to `turn`, from there in a curve to `end`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Segment {
    /// The value.
    pub net: usize,
    /// Start.
    pub start: (f64, f64),
    /// Vertical coordinate where the curve begins.
    pub turn: f64,
    /// End.
    pub end: (f64, f64),
    /// True if it ends at a box, false if it goes on.
    pub arrives: bool,
    /// The sections of its ends.
    pub sections: (usize, usize),
}

/// Lays out.
pub fn layout(items: &[Item], nets: &[Net], spacing: &Spacing) -> Layout {
    let layers = order::order(items, nets);
    let placed = place::place(&layers);
    let (bands, y) = rows(items, nets, &layers, &placed, spacing);
    let segments = layers
        .segments
        .iter()
        .zip(&placed.arrival)
        .map(|(segment, arrival)| {
            let (upper, lower) = (&layers.vertices[segment.upper], &layers.vertices[segment.lower]);
            let top = match items.get(segment.upper) {
                Some(item) => y[segment.upper] + item.height,
                None => bands[upper.rank].top,
            };
            let (end, arrives) = match y.get(segment.lower) {
                Some(&top) => (top, true),
                None => (bands[lower.rank].top, false),
            };
            Segment {
                net: segment.net,
                start: (placed.x[segment.upper] + segment.port, top),
                turn: bands[upper.rank].bottom,
                end: (placed.x[segment.lower] + arrival, end),
                arrives,
                sections: (bands[upper.rank].section, bands[lower.rank].section),
            }
        })
        .collect();
    let right = |(at, vertex): (usize, &order::Vertex)| placed.x[at] + vertex.right;
    Layout {
        x: placed.x[..items.len()].to_vec(),
        width: layers.vertices.iter().enumerate().map(right).fold(0.0, f64::max),
        height: bands.last().map_or(0.0, |band| band.bottom),
        y,
        bands,
        segments,
    }
}

/// Bands of the ranks, and the top of each item.
fn rows(
    items: &[Item],
    nets: &[Net],
    layers: &order::Layers,
    placed: &place::Placed,
    spacing: &Spacing,
) -> (Vec<Band>, Vec<f64>) {
    let mut reach = vec![0.0f64; layers.ranks.len()];
    for (segment, arrival) in layers.segments.iter().zip(&placed.arrival) {
        let across = placed.x[segment.upper] + segment.port - placed.x[segment.lower] - arrival;
        let rank = layers.vertices[segment.upper].rank;
        reach[rank] = reach[rank].max(across.abs());
    }
    let mut labelled = vec![false; items.len()];
    for net in nets {
        labelled[net.from] = true;
    }
    let mut bands: Vec<Band> = vec![];
    let mut y = vec![0.0; items.len()];
    let mut top = 0.0;
    let mut section_top = 0.0;
    for (rank, order) in layers.ranks.iter().enumerate() {
        let here: Vec<usize> = order.iter().copied().filter(|&at| at < items.len()).collect();
        let section = layers.sections[rank];
        if let Some(last) = bands.last()
            && last.section != section
        {
            let missing = section_top + (spacing.section)(last.section) - last.bottom;
            top += missing.max(0.0) + (spacing.between)(last.section, section);
            section_top = top;
        }
        let height = here.iter().map(|&at| items[at].height).fold(0.0, f64::max);
        for &at in &here {
            y[at] = top + (height - items[at].height) / 2.0;
        }
        let label = if here.iter().any(|&at| labelled[at]) { spacing.label } else { 0.0 };
        bands.push(Band { top, bottom: top + height + label, section });
        top += height + label + spacing.turn + (reach[rank] * 0.06).min(22.0);
    }
    (bands, y)
}
