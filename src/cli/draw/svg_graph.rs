//! A graph as SVG: boxes from top to bottom, layers in frames, types on the edges.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::cli::draw::DotOptions;
use crate::cli::draw::family::Family;
use crate::cli::draw::layout::{Band, Item, Layout, Net, Spacing, layout};
use crate::cli::draw::node::{Node, is_chip};
use crate::cli::draw::text::{Anchor, CHIP, CLUSTER, CODE, DETAIL, HEADING, SUBHEADING, Svg};
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

/// A frame's names: the layer, and the part of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Section {
    layer: Option<u64>,
    part: String,
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

        let legend = Legend::new(self);
        let heading = format!("@{}", self.view.graph.name);
        let subheading = self.subheading(options);
        let heads = HEADING.width(&heading) + 12.0 + SUBHEADING.width(&subheading);
        let content = layout.width + strips + padding;
        let width = content.max(heads).max(legend.least()) + 2.0 * MARGIN;
        let left = MARGIN + strips + (width - 2.0 * MARGIN - content) / 2.0;
        let (x, y) = (left, 58.0);
        let mut svg = Svg::default();
        svg.raw(
            "<style>.e{fill:none;stroke:#7b8794;stroke-width:1.2}.e.v{stroke:#5b6b8c;stroke-dasharray:4 3}\
             .a{fill:#7b8794}.l{fill:#ffffff;fill-opacity:.92}\
             .state{fill:#ffffff;stroke:#5b6b8c;stroke-width:1.1;stroke-dasharray:3.5 2.5}\
             .input{fill:#ffffff;stroke:#86a3cc;stroke-width:.9}</style>\n",
        );
        svg.text(HEADING, Anchor::Start, MARGIN, 22.0, &heading);
        svg.text(SUBHEADING, Anchor::Start, MARGIN + HEADING.width(&heading) + 12.0, 22.5, &subheading);
        self.draw_frames(&mut svg, &layout, (left, left + layout.width), y);
        self.draw_edges(&mut svg, &layout, (x, y));
        for (at, body) in self.bodies.iter().enumerate() {
            let (x, y) = (x + layout.x[at], y + layout.y[at]);
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
        self.draw_labels(&mut svg, &layout, (x, y));
        let bottom = y + layout.height + 20.0;
        let bottom = bottom + legend.draw(&mut svg, bottom, width);
        svg.finish(width, bottom + MARGIN)
    }

    fn subheading(&self, options: &DotOptions) -> String {
        let view = self.view;
        let ops = view.ops.len();
        let fused = view.ops.iter().filter(|&&at| !view.graph.ops[at].body.is_empty()).count();
        let primitives: usize = view.ops.iter().map(|&at| view.graph.ops[at].primitives().len()).sum();
        let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mut parts = vec![];
        match &options.layers {
            Some(range) if range.start() == range.end() => parts.push(format!("layer {}", range.start())),
            Some(range) => parts.push(format!("layers {}–{}", range.start(), range.end())),
            None => {}
        }
        parts.push(count(ops, "operator"));
        if fused > 0 {
            parts.push(format!("{fused} of them fused, from {} in all", count(primitives, "primitive operator")));
        }
        parts.join(" · ")
    }

    /// Frames of layers, and in them of parts, each with its name on a strip at the left.
    fn draw_frames(&self, svg: &mut Svg, layout: &Layout, (left, right): (f64, f64), y: f64) {
        let extent = |sections: std::ops::RangeInclusive<usize>| {
            let bands: Vec<&Band> = layout.bands.iter().filter(|band| sections.contains(&band.section)).collect();
            Some((y + bands.first()?.top, y + bands.last()?.bottom))
        };
        let least = |title: &str| CLUSTER.width(title) + 6.0;
        let mut first = 0;
        while first < self.sections.len() {
            let layer = self.sections[first].layer;
            let same = |section: &&Section| layer.is_some() && section.layer == layer;
            let last = first + self.sections[first..].iter().take_while(same).count().max(1) - 1;
            if let (Some(layer), Some((top, bottom))) = (layer, extent(first..=last)) {
                let title = format!("layer {layer}");
                let bottom = bottom.max(top + least(&title) - 12.0);
                let x = left - PADDING - STRIPS[1] - PADDING - STRIPS[0];
                let size = (right + 2.0 * PADDING - x, bottom - top + 24.0);
                svg.rect((x, top - 14.0), size, 10.0, "fill=\"#f3f5f8\" stroke=\"#d5dbe3\"");
                svg.upright(CLUSTER, x + STRIPS[0] / 2.0 + 2.0, (top + bottom - 4.0) / 2.0, &title);
            }
            for section in first..=last {
                let part = &self.sections[section].part;
                if let Some((top, bottom)) = extent(section..=section).filter(|_| !part.is_empty()) {
                    let bottom = bottom.max(top + least(part) - 12.0);
                    let x = left - PADDING - STRIPS[1];
                    let size = (right + PADDING - x, bottom - top + 12.0);
                    svg.rect((x, top - 8.0), size, 7.0, "fill=\"#ffffff\" stroke=\"#e0e5eb\"");
                    svg.upright(CLUSTER, x + STRIPS[1] / 2.0 + 2.0, (top + bottom - 4.0) / 2.0, part);
                }
            }
            first = last + 1;
        }
    }

    fn draw_edges(&self, svg: &mut Svg, layout: &Layout, (x, y): (f64, f64)) {
        for (net, &value) in self.values.iter().enumerate() {
            let segments: Vec<_> = layout.segments.iter().filter(|segment| segment.net == net).collect();
            let ty = self.view.graph.ty(value);
            svg.open("edge", &format!("%{} : {ty}", self.view.graph.value(value).name));
            let (mut lines, mut heads) = (String::new(), String::new());
            for segment in segments {
                let ((ax, ay), turn) = ((x + segment.start.0, y + segment.start.1), y + segment.turn);
                let (bx, by) = (x + segment.end.0, y + segment.end.1);
                let tip = if segment.arrives.is_some() { by - 5.0 } else { by };
                if (ax - bx).abs() < 0.05 {
                    lines += &format!("M{ax:.1} {ay:.1}V{tip:.1}");
                } else {
                    let middle = (turn + tip) / 2.0;
                    lines +=
                        &format!("M{ax:.1} {ay:.1}V{turn:.1}C{ax:.1} {middle:.1} {bx:.1} {middle:.1} {bx:.1} {tip:.1}");
                }
                if segment.arrives.is_some() {
                    heads +=
                        &format!("M{:.1} {:.1}L{bx:.1} {by:.1}L{:.1} {:.1}Z", bx - 3.6, by - 7.0, bx + 3.6, by - 7.0);
                }
            }
            let class = if self.view.is_state(value) { "class=\"e v\"" } else { "class=\"e\"" };
            svg.path(&lines, class);
            svg.path(&heads, "class=\"a\"");
            svg.close();
        }
    }

    /// The type of each value, once, where it leaves its box.
    fn draw_labels(&self, svg: &mut Svg, layout: &Layout, (x, y): (f64, f64)) {
        for (net, &value) in self.nets.iter().zip(&self.values) {
            let width = self.label_width(value);
            let middle = x + layout.x[net.from] + net.port;
            let top = y + layout.y[net.from] + self.items[net.from].height + 6.0;
            svg.rect((middle - width / 2.0, top), (width, LABEL), 3.0, "class=\"l\"");
            svg.text(CODE, Anchor::Middle, middle, top + LABEL / 2.0, &self.view.graph.ty(value).to_string());
        }
    }
}

/// What the colours mean.
struct Legend {
    entries: Vec<(&'static str, String)>,
}

impl Legend {
    fn new(picture: &Picture) -> Legend {
        let view = picture.view;
        let ops = view.ops.iter().flat_map(|&at| view.graph.ops[at].primitives());
        let families: BTreeSet<Family> = ops.map(Family::of).collect();
        let used = Family::ALL.iter().filter(|family| families.contains(family));
        let mut entries: Vec<(&str, String)> = used
            .map(|family| (family.name(), format!("fill=\"{}\" stroke=\"{}\"", family.fill(), family.stroke())))
            .collect();
        if view.sources.iter().any(|&(value, _)| view.is_state(value)) {
            entries.push(("state", "class=\"state\"".to_owned()));
        }
        if view.sources.iter().any(|&(_, source)| source != Source::State) {
            entries.push(("input", "class=\"input\"".to_owned()));
        }
        Legend { entries }
    }

    fn width((name, _): &(&'static str, String)) -> f64 {
        16.0 + 6.0 + DETAIL.width(name) + 16.0
    }

    fn least(&self) -> f64 {
        self.entries.iter().map(Legend::width).fold(0.0, f64::max)
    }

    /// Draws it in as many lines as the width needs; returns its height.
    fn draw(&self, svg: &mut Svg, y: f64, width: f64) -> f64 {
        let (mut x, mut line) = (MARGIN, 0.0);
        svg.open("legend", "");
        for entry in &self.entries {
            if x > MARGIN && x + Legend::width(entry) > width - MARGIN {
                (x, line) = (MARGIN, line + 18.0);
            }
            svg.rect((x, y + line), (16.0, 11.0), 3.0, &entry.1);
            svg.text(DETAIL, Anchor::Start, x + 22.0, y + line + 5.5, entry.0);
            x += Legend::width(entry);
        }
        svg.close();
        line + 11.0
    }
}
