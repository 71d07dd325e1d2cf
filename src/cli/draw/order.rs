//! Ranks, and the order of boxes within them: few edges cross.

use crate::cli::draw::layout::{Item, Net};

/// Room to each side of a bend.
const BEND: f64 = 5.0;

/// Rounds of barycentre sweeps; the best order seen is taken.
const ROUNDS: usize = 12;

/// What stands in ranks: the items first, in their order, then bends.
pub struct Layers {
    /// All vertices.
    pub vertices: Vec<Vertex>,
    /// Vertices of each rank from left to right.
    pub ranks: Vec<Vec<usize>>,
    /// The section of each rank.
    pub sections: Vec<usize>,
    /// Edges from a rank to the next.
    pub segments: Vec<Link>,
}

/// An item, or a bend of a value that passes its rank.
#[derive(Clone, PartialEq, Debug)]
pub struct Vertex {
    /// Its rank.
    pub rank: usize,
    /// Room to the left of its anchor.
    pub left: f64,
    /// Room to the right of its anchor.
    pub right: f64,
    /// Half the width in which edges may arrive; of a bend, 0.
    pub half: f64,
    /// A bend.
    pub bend: bool,
}

/// An edge between neighbouring ranks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Link {
    /// The value.
    pub net: usize,
    /// Where it comes from.
    pub upper: usize,
    /// Where it leaves `upper`, from its anchor.
    pub port: f64,
    /// Where it goes.
    pub lower: usize,
}

/// Ranks the items and orders each rank.
pub fn order(items: &[Item], nets: &[Net]) -> Layers {
    let rank = ranks(items, nets);
    let vertex = |(item, &rank): (&Item, &usize)| {
        let Item { left, right, half, .. } = *item;
        Vertex { rank, left, right, half, bend: false }
    };
    let mut vertices: Vec<Vertex> = items.iter().zip(&rank).map(vertex).collect();
    let mut segments = vec![];
    for (net, Net { from, port, to }) in nets.iter().enumerate() {
        let last = to.iter().map(|&at| rank[at]).max().unwrap_or(0);
        let (mut upper, mut port) = (*from, *port);
        for below in rank[*from] + 1..=last {
            let taken = to.iter().filter(|&&at| rank[at] == below);
            segments.extend(taken.map(|&lower| Link { net, upper, port, lower }));
            if below < last {
                let bend = vertices.len();
                vertices.push(Vertex { rank: below, left: BEND, right: BEND, half: 0.0, bend: true });
                segments.push(Link { net, upper, port, lower: bend });
                (upper, port) = (bend, 0.0);
            }
        }
    }
    let mut ranks = vec![vec![]; vertices.iter().map(|v| v.rank + 1).max().unwrap_or(0)];
    let mut sections = vec![0; ranks.len()];
    for (at, vertex) in vertices.iter().enumerate() {
        ranks[vertex.rank].push(at);
        if let Some(item) = items.get(at) {
            sections[vertex.rank] = item.section;
        }
    }
    let mut layers = Layers { vertices, ranks, sections, segments };
    uncross(&mut layers);
    layers
}

/// The rank of each item: below all that it takes from, and below all of earlier sections.
fn ranks(items: &[Item], nets: &[Net]) -> Vec<usize> {
    let mut sources: Vec<Vec<usize>> = vec![vec![]; items.len()];
    for net in nets {
        for &to in &net.to {
            sources[to].push(net.from);
        }
    }
    let mut rank = vec![0; items.len()];
    let (mut base, mut next, mut section) = (0, 0, 0);
    for (at, item) in items.iter().enumerate() {
        if item.section != section {
            (base, section) = (next, item.section);
        }
        rank[at] = sources[at].iter().map(|&from| rank[from] + 1).fold(base, usize::max);
        next = next.max(rank[at] + 1);
    }
    rank
}

/// Orders by barycentres, downwards and upwards in turn.
fn uncross(layers: &mut Layers) {
    let mut above: Vec<Vec<usize>> = vec![vec![]; layers.vertices.len()];
    let mut below = above.clone();
    let mut between: Vec<Vec<Link>> = vec![vec![]; layers.ranks.len()];
    for (at, segment) in layers.segments.iter().enumerate() {
        above[segment.lower].push(at);
        below[segment.upper].push(at);
        between[layers.vertices[segment.upper].rank].push(*segment);
    }
    let mut place = vec![0usize; layers.vertices.len()];
    let renumber = |order: &[usize], place: &mut [usize]| {
        order.iter().enumerate().for_each(|(i, &at)| place[at] = i);
    };
    layers.ranks.iter().for_each(|order| renumber(order, &mut place));
    let mut best = (crossings(layers, &between, &place), layers.ranks.clone());
    for round in 0..ROUNDS {
        if best.0 == 0 {
            break;
        }
        let downwards = round % 2 == 0;
        let count = layers.ranks.len();
        for step in 1..count {
            let rank = if downwards { step } else { count - 1 - step };
            let sizes =
                (layers.ranks[rank].len() as f64, layers.ranks[if downwards { rank - 1 } else { rank + 1 }].len());
            let key = |&at: &usize| {
                let links = if downwards { &above[at] } else { &below[at] };
                if links.is_empty() {
                    return (place[at] as f64 + 0.5) / sizes.0;
                }
                let of = |&link: &usize| {
                    let Link { upper, lower, port, .. } = layers.segments[link];
                    let width = layers.vertices[upper].left + layers.vertices[upper].right;
                    let lean = (port / width).clamp(-0.45, 0.45);
                    if downwards { place[upper] as f64 + lean } else { place[lower] as f64 - lean }
                };
                (links.iter().map(of).sum::<f64>() / links.len() as f64 + 0.5) / sizes.1 as f64
            };
            let mut keyed: Vec<(f64, usize)> = layers.ranks[rank].iter().map(|at| (key(at), *at)).collect();
            keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
            layers.ranks[rank] = keyed.into_iter().map(|(_, at)| at).collect();
            renumber(&layers.ranks[rank], &mut place);
        }
        let crossed = crossings(layers, &between, &place);
        if crossed < best.0 {
            best = (crossed, layers.ranks.clone());
        }
    }
    layers.ranks = best.1;
}

/// How many pairs of edges cross.
fn crossings(layers: &Layers, between: &[Vec<Link>], place: &[usize]) -> usize {
    let mut count = 0;
    let mut ends: Vec<(usize, f64, usize)> = vec![];
    for links in between {
        ends.clear();
        ends.extend(links.iter().map(|link| (place[link.upper], link.port, place[link.lower])));
        ends.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
        // Inversions of the lower ends, by a tree of counts.
        let size = links.iter().map(|link| layers.ranks[layers.vertices[link.lower].rank].len()).max().unwrap_or(0);
        let mut tree = vec![0usize; size + 1];
        for (seen, &(_, _, lower)) in ends.iter().enumerate() {
            let (mut at, mut at_most) = (lower + 1, 0);
            while at > 0 {
                at_most += tree[at];
                at &= at - 1;
            }
            count += seen - at_most;
            at = lower + 1;
            while at <= size {
                tree[at] += 1;
                at += at & at.wrapping_neg();
            }
        }
    }
    count
}
