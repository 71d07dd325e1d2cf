//! Horizontal coordinates: chains of boxes and bends become straight columns ("blocks"), which then move towards what they
//! are connected with as far as their neighbours let them. Sections are placed one by one and then moved as a whole, within
//! the width of the widest, so that what leaves one goes straight into the next: many layers are no wider than one.

use crate::cli::draw::order::{Layers, Link};

/// Between two boxes, between a box and a bend, between two bends.
const GAPS: [f64; 3] = [26.0, 16.0, 12.0];
/// Between two edges that arrive at a box.
const ARRIVAL: f64 = 22.0;
/// How much wider than the widest section everything may become.
const SLACK: f64 = 48.0;
/// Rounds of moves.
const ROUNDS: usize = 60;

/// Coordinates.
pub struct Placed {
    /// Anchor of each vertex.
    pub x: Vec<f64>,
    /// Of each segment, where it arrives, from the anchor of its lower end.
    pub arrival: Vec<f64>,
}

/// Places the vertices of ordered layers.
pub fn place(layers: &Layers) -> Placed {
    let count = layers.vertices.len();
    let mut position = vec![0; count];
    for order in &layers.ranks {
        order.iter().enumerate().for_each(|(i, &at)| position[at] = i);
    }
    let aligned = align(layers, &position);
    let arrival = arrivals(layers, &position, &aligned);
    let mut blocks = Blocks { root: (0..count).collect(), shift: vec![0.0; count] };
    let section = |at: usize| layers.sections[layers.vertices[at].rank];
    let inside = |link: &Link| section(link.upper) == section(link.lower);
    let mut by_rank: Vec<usize> =
        (0..layers.segments.len()).filter(|&at| aligned[at] && inside(&layers.segments[at])).collect();
    by_rank.sort_by_key(|&at| layers.vertices[layers.segments[at].upper].rank);
    for at in by_rank {
        let Link { upper, lower, port, .. } = layers.segments[at];
        blocks.root[lower] = blocks.root[upper];
        blocks.shift[lower] = blocks.shift[upper] + port;
    }
    let mut x = blocks.solve(layers, &arrival);
    join(layers, &aligned, &arrival, &mut x);
    Placed { x, arrival }
}

/// Moves sections, so that the leftmost extent is 0, none reaches much farther than the widest, and edges between sections
/// are straight where that leaves room.
fn join(layers: &Layers, aligned: &[bool], arrival: &[f64], x: &mut [f64]) {
    let section = |at: usize| layers.sections[layers.vertices[at].rank];
    let count = layers.sections.iter().max().map_or(0, |last| last + 1);
    let mut extents = vec![(f64::INFINITY, f64::NEG_INFINITY); count];
    for (at, vertex) in layers.vertices.iter().enumerate() {
        let (low, high) = &mut extents[section(at)];
        (*low, *high) = (low.min(x[at] - vertex.left), high.max(x[at] + vertex.right));
    }
    // How far each section should move when the one before stays.
    let mut straight: Vec<Option<f64>> = vec![None; count];
    for (at, link) in layers.segments.iter().enumerate() {
        let lower = section(link.lower);
        if lower != section(link.upper) && (aligned[at] || straight[lower].is_none()) {
            straight[lower] = Some(x[link.upper] + link.port - x[link.lower] - arrival[at]);
        }
    }
    let width = |section: usize| extents[section].1 - extents[section].0;
    let Some(widest) = (0..count).max_by(|&a, &b| width(a).total_cmp(&width(b))) else { return };
    let room = width(widest) + SLACK;
    let within = |section: usize, ideal: f64| {
        let (low, high) = extents[section];
        if low > high { 0.0 } else { ideal.min(room - high).max(-low) }
    };
    let mut moves = vec![0.0; count];
    moves[widest] = SLACK / 2.0 - extents[widest].0;
    for at in widest + 1..count {
        let ideal = straight[at].map(|by| moves[at - 1] + by);
        moves[at] = within(at, ideal.unwrap_or((room - extents[at].0 - extents[at].1) / 2.0));
    }
    for at in (0..widest).rev() {
        let ideal = straight[at + 1].map(|by| moves[at + 1] - by);
        moves[at] = within(at, ideal.unwrap_or((room - extents[at].0 - extents[at].1) / 2.0));
    }
    let extent = |section: usize| extents[section].0 + moves[section];
    let leftmost = (0..count).map(extent).fold(f64::INFINITY, f64::min);
    for (at, x) in x.iter_mut().enumerate() {
        *x += moves[section(at)] - leftmost;
    }
}

/// Chooses the segments that become vertical: no two share an end on the same side, and no two cross.
fn align(layers: &Layers, position: &[usize]) -> Vec<bool> {
    let mut above: Vec<Vec<usize>> = vec![vec![]; layers.vertices.len()];
    let mut below = above.clone();
    for (at, segment) in layers.segments.iter().enumerate() {
        above[segment.lower].push(at);
        below[segment.upper].push(at);
    }
    for links in &mut above {
        links.sort_by(|&a, &b| {
            let key = |at: usize| (position[layers.segments[at].upper], layers.segments[at].port);
            key(a).0.cmp(&key(b).0).then(key(a).1.total_cmp(&key(b).1))
        });
    }
    for links in &mut below {
        links.sort_by_key(|&at| position[layers.segments[at].lower]);
    }
    let off_centre = |links: &[usize], at: usize| {
        let place = links.iter().position(|&link| link == at).unwrap_or(0);
        (2 * place).abs_diff(links.len() - 1)
    };
    let mut candidates: Vec<(usize, usize, usize, usize)> = layers
        .segments
        .iter()
        .enumerate()
        .map(|(at, segment)| {
            let (upper, lower) = (&layers.vertices[segment.upper], &layers.vertices[segment.lower]);
            let class = match (upper.bend, lower.bend) {
                (true, true) => 0,
                (false, false) => 1,
                _ => 2,
            };
            let skew = off_centre(&above[segment.lower], at) + off_centre(&below[segment.upper], at);
            (upper.rank, class, skew, at)
        })
        .collect();
    candidates.sort_unstable();
    let mut aligned = vec![false; layers.segments.len()];
    let mut used = vec![(false, false); layers.vertices.len()];
    let mut accepted: Vec<(usize, usize)> = vec![];
    let mut rank = 0;
    for (at_rank, _, _, at) in candidates {
        if at_rank != rank {
            accepted.clear();
            rank = at_rank;
        }
        let Link { upper, lower, .. } = layers.segments[at];
        let (u, l) = (position[upper], position[lower]);
        let crosses = accepted.iter().any(|&(other_u, other_l)| (other_u < u) != (other_l < l));
        if !used[upper].1 && !used[lower].0 && !crosses {
            (used[upper].1, used[lower].0) = (true, true);
            accepted.push((u, l));
            aligned[at] = true;
        }
    }
    aligned
}

/// Where each segment arrives: a vertical one at the anchor, the others beside it in the order in which they come.
fn arrivals(layers: &Layers, position: &[usize], aligned: &[bool]) -> Vec<f64> {
    let mut above: Vec<Vec<usize>> = vec![vec![]; layers.vertices.len()];
    for (at, segment) in layers.segments.iter().enumerate() {
        above[segment.lower].push(at);
    }
    let mut arrival = vec![0.0; layers.segments.len()];
    for (lower, links) in above.iter_mut().enumerate().filter(|(_, links)| links.len() > 1) {
        let key = |at: usize| (position[layers.segments[at].upper], layers.segments[at].port);
        links.sort_by(|&a, &b| key(a).0.cmp(&key(b).0).then(key(a).1.total_cmp(&key(b).1)));
        let last = links.len() - 1;
        let middle = links.iter().position(|&at| aligned[at]).map_or(last as f64 / 2.0, |at| at as f64);
        let room = (layers.vertices[lower].half - 8.0).max(0.0);
        let step = ARRIVAL.min(room / last as f64);
        for (place, &at) in links.iter().enumerate() {
            arrival[at] = (place as f64 - middle) * step;
        }
    }
    arrival
}

/// Columns: each vertex stands at the coordinate of its root, shifted.
struct Blocks {
    root: Vec<usize>,
    shift: Vec<f64>,
}

impl Blocks {
    /// Coordinates of all vertices; those of different sections have nothing to do with each other.
    fn solve(&self, layers: &Layers, arrival: &[f64]) -> Vec<f64> {
        let count = layers.vertices.len();
        // For each block: what stands to the left and to the right of it, and at which distance at least.
        let (mut left, mut right) = (vec![vec![]; count], vec![vec![]; count]);
        for order in &layers.ranks {
            for pair in order.windows(2) {
                let (a, b) = (&layers.vertices[pair[0]], &layers.vertices[pair[1]]);
                let gap = GAPS[usize::from(a.bend) + usize::from(b.bend)];
                let distance = a.right + gap + b.left + self.shift[pair[0]] - self.shift[pair[1]];
                left[self.root[pair[1]]].push((self.root[pair[0]], distance));
                right[self.root[pair[0]]].push((self.root[pair[1]], distance));
            }
        }
        // For each block: the blocks it is connected with, how far it stands from them ideally, and how much that matters.
        let mut pulls: Vec<Vec<(usize, f64, f64)>> = vec![vec![]; count];
        for (segment, arrival) in layers.segments.iter().zip(arrival) {
            let (upper, lower) = (self.root[segment.upper], self.root[segment.lower]);
            let section = |at: usize| layers.sections[layers.vertices[at].rank];
            if upper == lower || section(segment.upper) != section(segment.lower) {
                continue;
            }
            let distance = self.shift[segment.upper] + segment.port - self.shift[segment.lower] - arrival;
            let bends = layers.vertices[segment.upper].bend || layers.vertices[segment.lower].bend;
            let weight = if bends { 1.0 } else { 2.0 };
            pulls[lower].push((upper, distance, weight));
            pulls[upper].push((lower, -distance, weight));
        }
        let order = self.left_to_right(&left, &right);
        let mut x = vec![0.0f64; count];
        for &block in &order {
            x[block] = left[block].iter().map(|&(other, distance)| x[other] + distance).fold(0.0, f64::max);
        }
        for round in 0..ROUNDS {
            let mut step = |block: usize| {
                let (mut sum, mut weights) = (0.0, 0.0);
                for &(other, distance, weight) in &pulls[block] {
                    sum += (x[other] + distance) * weight;
                    weights += weight;
                }
                if weights > 0.0 {
                    let low = left[block].iter().map(|&(other, d)| x[other] + d).fold(f64::NEG_INFINITY, f64::max);
                    let high = right[block].iter().map(|&(other, d)| x[other] - d).fold(f64::INFINITY, f64::min);
                    x[block] = (sum / weights).min(high).max(low);
                }
            };
            if round % 2 == 0 { order.iter().rev().for_each(|&b| step(b)) } else { order.iter().for_each(|&b| step(b)) }
        }
        (0..count).map(|at| x[self.root[at]] + self.shift[at]).collect()
    }

    /// The roots, each after all that stands to its left: possible because vertical segments do not cross.
    fn left_to_right(&self, left: &[Vec<(usize, f64)>], right: &[Vec<(usize, f64)>]) -> Vec<usize> {
        let mut missing: Vec<usize> = left.iter().map(Vec::len).collect();
        let mut order: Vec<usize> = (0..left.len()).filter(|&at| self.root[at] == at && missing[at] == 0).collect();
        let mut next = 0;
        while next < order.len() {
            for &(other, _) in &right[order[next]] {
                missing[other] -= 1;
                if missing[other] == 0 {
                    order.push(other);
                }
            }
            next += 1;
        }
        order
    }
}
