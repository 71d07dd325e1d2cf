//! A graph as SVG: boxes from top to bottom, layers in frames, types on the edges.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::cli::draw::DotOptions;
use crate::cli::draw::columns::{Section, columns, extent, groups};
use crate::cli::draw::layout::{Item, Layout, Net, Segment, Spacing, layout};
use crate::cli::draw::legend::Legend;
use crate::cli::draw::node::{Node, is_chip};
use crate::cli::draw::text::{Anchor, CHIP, CLUSTER, CODE, HEADING, SUBHEADING, Svg};
use crate::cli::draw::view::{Source, View, layer, part};
use crate::ir::{Graph, ValueId};

/// Around everything.
const MARGIN: f64 = 18.0;
/// Width of the strip with a layer's name, and with a part's.
const STRIPS: [f64; 2] = [24.0, 20.0];
/// From a frame to what it holds.
const PADDING: f64 = 12.0;
/// Height of an input or an output.
const PILL: f64 = 24.0;
/// Height of a label on an edge.
const LABEL: f64 = 15.0;

/// The graph as a self-contained SVG that a browser shows: boxes coloured by what they compute, fused operators with the
/// primitive operators they are made of, types on the edges, tooltips with the exact text form.
pub fn svg(graph: &Graph, options: &DotOptions) -> String {
    let view = View::new(graph, options);
    let picture = Picture::new(&view);
    picture.draw(options)
}

enum Body {
    Op(Node),
    Pill { value: ValueId, width: f64 },
}

struct Picture<'a> {
    view: &'a View<'a>,
    sections: Vec<Section>,
    bodies: Vec<Body>,
    items: Vec<Item>,
    nets: Vec<Net>,
    values: Vec<ValueId>,
}

impl<'a> Picture<'a> {
    fn new(view: &'a View<'a>) -> Self {
        let graph = view.graph;
        let chips: HashMap<ValueId, Source> =
            view.sources.iter().copied().filter(|&(value, source)| is_chip(view, value, source)).collect();
        let mut picture = Picture {
            view,
            sections: vec![Section::default()],
            bodies: vec![],
            items: vec![],
            nets: vec![],
            values: vec![],
        };
        let mut takers: HashMap<ValueId, Vec<usize>> = HashMap::new();
        let mut makers: HashMap<ValueId, usize> = HashMap::new();
        let taken: HashSet<ValueId> =
            view.ops.iter().flat_map(|&at| graph.ops[at].uses()).chain(view.leaving.iter().copied()).collect();
        for &(value, _) in view.sources.iter().filter(|(value, _)| !chips.contains_key(value) && taken.contains(value))
        {
            makers.insert(value, picture.pill(value, 0));
        }
        for &at in &view.ops {
            let op = &graph.ops[at];
            let section = Section { layer: layer(&op.scope), part: part(&op.scope).to_owned() };
            if picture.sections.len() == 1 || picture.sections.last() != Some(&section) {
                picture.sections.push(section);
            }
            let node = Node::new(view, op, &|value| chips.get(&value).copied());
            let item = picture.bodies.len();
            picture.items.push(Item {
                half: node.width / 2.0,
                left: node.width / 2.0,
                right: node.width / 2.0 + node.aside(),
                height: node.height,
                section: picture.sections.len() - 1,
            });
            picture.bodies.push(Body::Op(node));
            for value in op.uses().collect::<BTreeSet<_>>() {
                takers.entry(value).or_default().push(item);
            }
            makers.extend(op.results.iter().map(|&result| (result, item)));
        }
        picture.sections.push(Section::default());
        let last = picture.sections.len() - 1;
        for &value in view.leaving.iter().filter(|&&value| !view.is_state(value) && makers.contains_key(&value)) {
            let item = picture.pill(value, last);
            takers.entry(value).or_default().push(item);
        }
        picture.connect(&makers, &takers);
        picture
    }

    fn pill(&mut self, value: ValueId, section: usize) -> usize {
        let width = (CHIP.width(&self.view.graph.value(value).name) + 24.0).max(48.0).ceil();
        let half = width / 2.0;
        self.items.push(Item { half, left: half, right: half, height: PILL, section });
        self.bodies.push(Body::Pill { value, width });
        self.bodies.len() - 1
    }

    /// Makes the nets, and the room for their labels under the boxes that they leave.
    fn connect(&mut self, makers: &HashMap<ValueId, usize>, takers: &HashMap<ValueId, Vec<usize>>) {
        let mut leaving: Vec<Vec<ValueId>> = vec![vec![]; self.items.len()];
        for (&value, &maker) in makers {
            if takers.get(&value).is_some_and(|takers| !takers.is_empty()) {
                leaving[maker].push(value);
            }
        }
        for (from, mut values) in leaving.into_iter().enumerate() {
            values.sort_unstable();
            let widths: Vec<f64> = values.iter().map(|&value| self.label_width(value) + 8.0).collect();
            let total: f64 = widths.iter().sum();
            let mut start = -total / 2.0;
            for (&value, width) in values.iter().zip(&widths) {
                let port = start + width / 2.0;
                start += width;
                self.nets.push(Net { from, port, to: takers[&value].clone() });
                self.values.push(value);
            }
            if let Body::Op(node) = &mut self.bodies[from]
                && values.len() > 1
            {
                node.width = node.width.max(total + 4.0);
                let item = &mut self.items[from];
                item.half = node.width / 2.0;
                item.right = item.half + node.aside();
            }
            let item = &mut self.items[from];
            item.left = item.half.max(total / 2.0);
            item.right = item.right.max(total / 2.0);
        }
    }

    fn label_width(&self, value: ValueId) -> f64 {
        CODE.width(&self.view.graph.ty(value).to_string()) + 8.0
    }

    fn titles(&self, section: usize) -> [Option<String>; 2] {
        let Section { layer, part } = &self.sections[section];
        [layer.map(|layer| format!("layer {layer}")), (!part.is_empty()).then(|| part.clone())]
    }

    fn draw(&self, options: &DotOptions) -> String {
        let framed = |section: usize| self.titles(section).iter().any(Option::is_some);
        let between = |a: usize, b: usize| match (framed(a), framed(b)) {
            (false, false) => 0.0,
            (true, true) if self.sections[a].layer == self.sections[b].layer => 8.0,
            (true, true) => 30.0,
            _ => 14.0,
        };
        let least = |section: usize| {
            self.titles(section).iter().flatten().map(|title| CLUSTER.width(title) - 6.0).fold(0.0, f64::max)
        };
        let spacing = Spacing { label: LABEL + 8.0, turn: 20.0, between: &between, section: &least };
        let layout = layout(&self.items, &self.nets, &spacing);
        let frames = self.sections.iter().any(|section| section.layer.is_some() || !section.part.is_empty());
        let strips = if frames { STRIPS.iter().sum::<f64>() + 2.0 * PADDING } else { 0.0 };
        let padding = if frames { 2.0 * PADDING } else { 0.0 };

        let legend = Legend::new(self.view);
        let heading = format!("@{}", self.view.graph.name);
        let subheading = self.subheading(options);
        let heads = HEADING.width(&heading) + 12.0 + SUBHEADING.width(&subheading);
        let content = layout.width + strips + padding;
        let columns = columns(&self.sections, &layout, content);
        let all = columns.width + content;
        let width = all.max(heads).max(legend.least()) + 2.0 * MARGIN;
        let left = MARGIN + strips + (width - 2.0 * MARGIN - all) / 2.0;
        let origin = (left, 58.0);
        let mut svg = Svg::default();
        svg.raw(
            "<style>.e{fill:none;stroke:#7b8794;stroke-width:1.2}.e.v{stroke:#5b6b8c;stroke-dasharray:4 3}\
             .a{fill:#7b8794}.b{fill:#5b6b8c}.l{fill:#ffffff;fill-opacity:.92}\
             .state{fill:#ffffff;stroke:#5b6b8c;stroke-width:1.1;stroke-dasharray:3.5 2.5}\
             .input{fill:#ffffff;stroke:#86a3cc;stroke-width:.9}</style>\n",
        );
        svg.text(HEADING, Anchor::Start, MARGIN, 22.0, &heading);
        svg.text(SUBHEADING, Anchor::Start, MARGIN + HEADING.width(&heading) + 12.0, 22.5, &subheading);
        let places: Vec<(f64, f64)> = columns.shifts.iter().map(|(dx, dy)| (origin.0 + dx, origin.1 + dy)).collect();
        self.draw_frames(&mut svg, &layout, &places);
        self.draw_edges(&mut svg, &layout, &places);
        for (at, body) in self.bodies.iter().enumerate() {
            let (left, top) = places[self.items[at].section];
            let (x, y) = (left + layout.x[at], top + layout.y[at]);
            match body {
                Body::Op(node) => node.draw(&mut svg, x, y),
                Body::Pill { value, width } => {
                    let value = self.view.graph.value(*value);
                    svg.open("pill", &format!("%{} : {}", value.name, value.ty));
                    svg.rect((x - width / 2.0, y), (*width, PILL), PILL / 2.0, "class=\"input\"");
                    svg.text(CHIP, Anchor::Middle, x, y + PILL / 2.0, &value.name);
                    svg.close();
                }
            }
        }
        self.draw_labels(&mut svg, &layout, &places);
        let bottom = origin.1 + columns.height + 22.0;
        let bottom = bottom + legend.draw(&mut svg, (MARGIN, bottom), width - MARGIN);
        svg.finish(width, bottom + MARGIN)
    }

    fn subheading(&self, options: &DotOptions) -> String {
        let view = self.view;
        let ops = view.ops.len();
        let fused = view.ops.iter().filter(|&&at| !view.graph.ops[at].body.is_empty()).count();
        let primitives: usize = view.ops.iter().map(|&at| view.graph.ops[at].primitives().len()).sum();
        let mut parts = vec![];
        match &options.layers {
            Some(range) if range.start() == range.end() => parts.push(format!("layer {}", range.start())),
            Some(range) => parts.push(format!("layers {}–{}", range.start(), range.end())),
            None => {}
        }
        let plural = if ops == 1 { "" } else { "s" };
        parts.push(match fused {
            0 => format!("{ops} operator{plural}"),
            _ if fused == ops => format!("{ops} fused operator{plural} of {primitives} primitive ones"),
            _ => format!("{ops} operators, {fused} of them fused, of {primitives} primitive ones"),
        });
        parts.join(" · ")
    }

    /// Frames of layers, and in them of parts, each with its name on a strip at the left.
    fn draw_frames(&self, svg: &mut Svg, layout: &Layout, places: &[(f64, f64)]) {
        let extent = |first: usize, last: usize| {
            let (top, bottom) = extent(layout, first, last)?;
            Some((places[first].1 + top, places[first].1 + bottom))
        };
        let least = |title: &str| CLUSTER.width(title) + 6.0;
        for (first, last) in groups(&self.sections) {
            let layer = self.sections[first].layer;
            let (left, right) = (places[first].0, places[first].0 + layout.width);
            if let (Some(layer), Some((top, bottom))) = (layer, extent(first, last)) {
                let title = format!("layer {layer}");
                let bottom = bottom.max(top + least(&title) - 12.0);
                let x = left - PADDING - STRIPS[1] - PADDING - STRIPS[0];
                let size = (right + 2.0 * PADDING - x, bottom - top + 24.0);
                svg.rect((x, top - 14.0), size, 10.0, "fill=\"#f3f5f8\" stroke=\"#d5dbe3\"");
                svg.upright(CLUSTER, x + STRIPS[0] / 2.0 + 2.0, (top + bottom - 4.0) / 2.0, &title);
            }
            for section in first..=last {
                let part = &self.sections[section].part;
                if let Some((top, bottom)) = extent(section, section).filter(|_| !part.is_empty()) {
                    let bottom = bottom.max(top + least(part) - 12.0);
                    let x = left - PADDING - STRIPS[1];
                    let size = (right + PADDING - x, bottom - top + 12.0);
                    svg.rect((x, top - 8.0), size, 7.0, "fill=\"#ffffff\" stroke=\"#e0e5eb\"");
                    svg.upright(CLUSTER, x + STRIPS[1] / 2.0 + 2.0, (top + bottom - 4.0) / 2.0, part);
                }
            }
        }
    }

    fn draw_edges(&self, svg: &mut Svg, layout: &Layout, places: &[(f64, f64)]) {
        let mut segments: Vec<Vec<&Segment>> = vec![vec![]; self.nets.len()];
        layout.segments.iter().for_each(|segment| segments[segment.net].push(segment));
        // Of each column's first section: how many values came from the column before.
        let mut crossed: HashMap<usize, usize> = HashMap::new();
        for (value, segments) in self.values.iter().zip(segments) {
            let (mut lines, mut heads) = (String::new(), String::new());
            let mut crosses = BTreeSet::new();
            for segment in segments {
                let (from, to) = (places[segment.sections.0], places[segment.sections.1]);
                let start = (from.0 + segment.start.0, from.1 + segment.start.1);
                let end = (to.0 + segment.end.0, to.1 + segment.end.1);
                let tip = (end.0, if segment.arrives { end.1 - 5.0 } else { end.1 });
                let turn = from.1 + segment.turn;
                if from == to {
                    lines += &curve(start, turn, tip);
                } else {
                    crosses.insert(segment.sections.1);
                    let beside = 5.0 * crossed.get(&segment.sections.1).map_or(0.0, |&nets| nets as f64);
                    let gutter = to.0 - STRIPS.iter().sum::<f64>() - 2.0 * PADDING - 12.0 - beside;
                    lines += &detour(start, turn + 22.0 + beside, gutter, end.1 - 26.0 - beside, tip);
                }
                if segment.arrives {
                    let (x, y) = end;
                    heads += &format!("M{:.1} {:.1}L{x:.1} {y:.1}L{:.1} {:.1}Z", x - 3.6, y - 7.0, x + 3.6, y - 7.0);
                }
            }
            crosses.into_iter().for_each(|section| *crossed.entry(section).or_default() += 1);
            svg.open("edge", &format!("%{} : {}", self.view.graph.value(*value).name, self.view.graph.ty(*value)));
            svg.path(&lines, if self.view.is_state(*value) { "class=\"e v\"" } else { "class=\"e\"" });
            svg.path(&heads, "class=\"a\"");
            svg.close();
        }
    }

    /// The type of each value, once, where it leaves its box.
    fn draw_labels(&self, svg: &mut Svg, layout: &Layout, places: &[(f64, f64)]) {
        for (net, &value) in self.nets.iter().zip(&self.values) {
            let (x, y) = places[self.items[net.from].section];
            let width = self.label_width(value);
            let middle = x + layout.x[net.from] + net.port;
            let top = y + layout.y[net.from] + self.items[net.from].height + 6.0;
            svg.rect((middle - width / 2.0, top), (width, LABEL), 3.0, "class=\"l\"");
            svg.text(CODE, Anchor::Middle, middle, top + LABEL / 2.0, &self.view.graph.ty(value).to_string());
        }
    }
}

/// Straight down to `turn`, then in a curve.
fn curve((ax, ay): (f64, f64), turn: f64, (bx, by): (f64, f64)) -> String {
    if (ax - bx).abs() < 0.05 {
        return format!("M{ax:.1} {ay:.1}V{by:.1}");
    }
    let middle = (turn + by) / 2.0;
    format!("M{ax:.1} {ay:.1}V{turn:.1}C{ax:.1} {middle:.1} {bx:.1} {middle:.1} {bx:.1} {by:.1}")
}

/// From the foot of a column through the gutter to the head of the next, with round corners.
fn detour((ax, ay): (f64, f64), low: f64, gutter: f64, high: f64, (bx, by): (f64, f64)) -> String {
    let r = 8.0;
    format!(
        "M{ax:.1} {ay:.1}V{:.1}Q{ax:.1} {low:.1} {:.1} {low:.1}H{:.1}Q{gutter:.1} {low:.1} {gutter:.1} {:.1}\
         V{:.1}Q{gutter:.1} {high:.1} {:.1} {high:.1}H{:.1}Q{bx:.1} {high:.1} {bx:.1} {:.1}V{by:.1}",
        low - r,
        ax + r,
        gutter - r,
        low - r,
        high + r,
        gutter + r,
        bx - r,
        high + r,
    )
}
