//! Drawings of built, fused and random graphs, checked by what is in them, not by their bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;
use roxmltree::{Document, Node};

use crate::cli::draw::text::FONTS;
use crate::cli::draw::view::layer;
use crate::cli::draw::{DotOptions, dot, memory_svg, svg};
use crate::codegen::compile::Silent;
use crate::codegen::{CompileOptions, Recipe, Source, compile};
use crate::ir::testing::graphs;
use crate::ir::{self, DType, Graph, Op, OpKind, ValueId};
use crate::plan::{PlanFile, Program, Ref};

const DEMO: &str = include_str!("../../../plans/synthetic.ron");
const GELU: &str = include_str!("../../../plans/gelu.ir");

fn plan(disabled: &[&str]) -> PlanFile {
    let recipe = Recipe::parse(DEMO).expect("the demo is a recipe");
    let disabled = disabled.iter().map(|&name| name.to_owned()).collect();
    let options = CompileOptions { disabled, ..CompileOptions::default() };
    compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("the demo compiles").file
}

fn parse(text: &str) -> Graph {
    ir::parse(text).expect("a printed graph can be parsed").graph
}

/// Graphs of a model, fused and not, and one that is no model.
fn examples() -> Vec<Graph> {
    let fused = plan(&[]);
    let unfused = plan(&crate::passes::names());
    let mut graphs: Vec<Graph> = fused.texts.iter().chain(&unfused.texts[..1]).map(|text| parse(text)).collect();
    graphs.push(parse(GELU));
    graphs
}

fn layers(first: u64, last: u64) -> DotOptions {
    DotOptions { layers: Some(first..=last) }
}

/// The primitive operators that are drawn, with the names that their nodes should have.
fn nodes<'g>(graph: &'g Graph, options: &DotOptions) -> Vec<(String, &'g Op)> {
    let mut nodes = vec![];
    for (at, op) in graph.ops.iter().enumerate() {
        let wanted = |range: &std::ops::RangeInclusive<u64>| layer(&op.scope).is_some_and(|n| range.contains(&n));
        if options.layers.as_ref().is_some_and(|range| !wanted(range)) {
            continue;
        }
        if op.body.is_empty() {
            nodes.push((format!("op{at}"), op));
        }
        nodes.extend(op.body.iter().enumerate().map(|(inner, op)| (format!("op{at}_{inner}"), op)));
    }
    nodes
}

/// Attributes of the edges between two nodes.
type Edges = BTreeMap<(String, String), Vec<String>>;

/// Nodes and edges of DOT text; fails if quotes or braces are not balanced.
fn read_dot(text: &str) -> (Vec<String>, Edges) {
    let (mut depth, mut quoted, mut escaped) = (0i64, false, false);
    for c in text.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '{' if !quoted => depth += 1,
            '}' if !quoted => depth -= 1,
            _ => {}
        }
        assert!(depth >= 0 && !(quoted && c == '\n'), "unbalanced:\n{text}");
    }
    assert_eq!((depth, quoted), (0, false), "unbalanced:\n{text}");
    let (mut nodes, mut edges) = (vec![], Edges::new());
    for line in text.lines().map(str::trim) {
        let Some((head, attributes)) = line.split_once(" [") else { continue };
        match head.split_once(" -> ") {
            Some((from, to)) => edges.entry((from.to_owned(), to.to_owned())).or_default().push(attributes.to_owned()),
            None if ["graph", "node", "edge"].contains(&head) => {}
            None => nodes.push(head.to_owned()),
        }
    }
    (nodes, edges)
}

fn check_dot(graph: &Graph, options: &DotOptions) {
    let text = dot(graph, options);
    assert_eq!(text, dot(&parse(&graph.to_string()), options), "the drawing depends on more than the graph's text");
    let (drawn, edges) = read_dot(&text);
    let expected = nodes(graph, options);
    let ops: Vec<&str> = drawn.iter().filter(|name| name.starts_with("op")).map(String::as_str).collect();
    let unique: BTreeSet<&str> = ops.iter().copied().collect();
    assert_eq!(unique.len(), ops.len(), "a node is drawn twice:\n{text}");
    assert_eq!(unique, expected.iter().map(|(name, _)| name.as_str()).collect());
    let mut made: HashMap<ValueId, &str> = HashMap::new();
    for (name, op) in &expected {
        made.extend(op.results.iter().map(|&value| (value, name.as_str())));
    }
    for (name, op) in &expected {
        for value in op.uses() {
            let outside = format!("in{}", value.0);
            let from = made.get(&value).copied().unwrap_or(&outside);
            let found = edges.get(&(from.to_owned(), name.clone())).expect("an edge from definition to use");
            let value = graph.value(value);
            let label = format!("label=\"{}\", tooltip=\"%{}\"", value.ty, value.name);
            assert!(found.iter().any(|attributes| attributes.starts_with(&label)), "{label} not in {found:?}");
        }
    }
    let ends = edges.keys().flat_map(|(from, to)| [from, to]);
    assert!(ends.into_iter().all(|end| drawn.contains(end)), "an edge to nowhere:\n{text}");
    for name in drawn.iter().filter(|name| name.starts_with("out")) {
        assert!(edges.keys().any(|(_, to)| to == name), "{name} has no edge");
    }
}

#[derive(Clone, Copy, Debug)]
struct Box {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

impl Box {
    fn of(rect: Node) -> Box {
        let number = |name: &str| -> f64 { rect.attribute(name).map_or(0.0, |text| text.parse().expect("a number")) };
        let (left, top) = (number("x"), number("y"));
        Box { left, top, right: left + number("width"), bottom: top + number("height") }
    }

    /// The estimated extent of a text.
    fn of_text(text: Node) -> Box {
        let class = text.attribute("class").expect("texts have a font");
        let font = FONTS.iter().find(|font| font.class == class).expect("a font of the style sheet");
        let number = |name: &str| -> f64 { text.attribute(name).expect("a place").parse().expect("a number") };
        let (x, baseline) = (number("x"), number("y"));
        let width = font.width(text.text().unwrap_or(""));
        let left = match text.attribute("text-anchor") {
            None => x,
            Some("middle") => x - width / 2.0,
            Some(_) => x - width,
        };
        Box { left, top: baseline - 0.72 * font.size, right: left + width, bottom: baseline + 0.2 * font.size }
    }

    fn contains(&self, other: &Box) -> bool {
        let slack = 0.2;
        self.left - slack <= other.left
            && self.top - slack <= other.top
            && other.right <= self.right + slack
            && other.bottom <= self.bottom + slack
    }

    fn overlaps(&self, other: &Box) -> bool {
        let touch = 0.2;
        self.left + touch < other.right
            && other.left + touch < self.right
            && self.top + touch < other.bottom
            && other.top + touch < self.bottom
    }
}

fn groups<'a, 'i>(document: &'a Document<'i>, class: &'static str) -> Vec<Node<'a, 'i>> {
    document.descendants().filter(|node| node.attribute("class") == Some(class)).collect()
}

fn rects<'a, 'i>(node: &Node<'a, 'i>) -> Vec<Node<'a, 'i>> {
    node.descendants().filter(|node| node.has_tag_name("rect")).collect()
}

fn check_svg(graph: &Graph, options: &DotOptions) {
    let text = svg(graph, options);
    assert_eq!(text, svg(graph, options));
    let document = Document::parse(&text).expect("well-formed XML");
    let root = document.root_element();
    let size = |name: &str| -> f64 { root.attribute(name).expect("a size").parse().expect("a number") };
    let page = Box { left: 0.0, top: 0.0, right: size("width"), bottom: size("height") };
    let ops = groups(&document, "op");
    let wanted = |op: &&Op| {
        options.layers.as_ref().is_none_or(|range| layer(&op.scope).is_some_and(|layer| range.contains(&layer)))
    };
    assert_eq!(ops.len(), graph.ops.iter().filter(wanted).count());
    let mut boxes = vec![];
    for op in &ops {
        let rects: Vec<Box> = rects(op).into_iter().map(Box::of).collect();
        for text in op.descendants().filter(|node| node.has_tag_name("text")) {
            let extent = Box::of_text(text);
            assert!(rects.iter().any(|rect| rect.contains(&extent)), "{:?} sticks out: {extent:?}", text.text());
        }
        let outer = rects[1..].iter().filter(|rect| !rects[0].contains(rect));
        boxes.push(rects[0]);
        boxes.extend(outer);
    }
    boxes.extend(groups(&document, "pill").iter().map(|pill| Box::of(rects(pill)[0])));
    boxes.extend(groups(&document, "l").into_iter().map(Box::of));
    for (at, one) in boxes.iter().enumerate() {
        assert!(page.contains(one), "{one:?} leaves the page {page:?}");
        for other in &boxes[at + 1..] {
            assert!(!one.overlaps(other), "{one:?} overlaps {other:?}:\n{graph}");
        }
    }
    // An arrow head for each value and box that takes it, unless the value is named in the box.
    let drawn: Vec<&Op> = graph.ops.iter().filter(wanted).collect();
    let made: BTreeSet<ValueId> = drawn.iter().flat_map(|op| op.results.iter().copied()).collect();
    let takers = |value: ValueId| graph.ops.iter().filter(|op| op.uses().any(|used| used == value)).count();
    let named = |value: ValueId| {
        let shared = graph.ty(value).dtype == DType::I32 && takers(value) > 1;
        !made.contains(&value) && (graph.states.contains(&value) || (graph.inputs.contains(&value) && shared))
    };
    let inner: usize =
        drawn.iter().map(|op| op.uses().filter(|&value| !named(value)).collect::<BTreeSet<_>>().len()).sum();
    let pills = groups(&document, "pill").len();
    let returned = graph.outputs.iter().copied().filter(|_| options.layers.is_none());
    let shown = drawn.iter().flat_map(|op| op.uses()).chain(returned);
    let sources: BTreeSet<ValueId> = shown.filter(|value| !made.contains(value) && !named(*value)).collect();
    let heads: usize =
        groups(&document, "a").iter().map(|path| path.attribute("d").unwrap_or("").matches('Z').count()).sum();
    assert_eq!(heads, inner + pills - sources.len());
}

#[test]
fn graphs_of_a_model_are_drawn_whole() {
    for graph in examples() {
        for options in [DotOptions::default(), layers(0, 0), layers(2, 2), layers(1, 4), layers(90, 99)] {
            check_dot(&graph, &options);
            check_svg(&graph, &options);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn random_graphs_are_drawn_whole(graph in graphs(), first in 0..7u64, count in 0..4u64) {
        let graph = parse(&graph.to_string());
        for options in [DotOptions::default(), layers(first, first + count)] {
            check_dot(&graph, &options);
            check_svg(&graph, &options);
        }
    }
}

#[test]
fn a_layer_range_shows_what_crosses_its_border() {
    let file = plan(&[]);
    let graph = parse(&file.texts[0]);
    let (drawn, edges) = read_dot(&dot(&graph, &layers(2, 2)));
    assert!(!drawn.is_empty());
    let scope = |name: &str| {
        let digits: String = name.trim_start_matches("op").chars().take_while(char::is_ascii_digit).collect();
        graph.ops[digits.parse::<usize>().expect("a position")].scope.clone()
    };
    assert!(drawn.iter().filter(|name| name.starts_with("op")).all(|name| scope(name).starts_with("layers.2.")));
    let h = graph.values.iter().position(|value| value.name == "l1.h.1").expect("the demo has two residuals a layer");
    assert!(edges.keys().any(|(from, _)| *from == format!("in{h}")), "the residual stream comes in");
    let leaving: Vec<&String> = drawn.iter().filter(|name| name.starts_with("out")).collect();
    assert_eq!(leaving.len(), 2, "the residual stream and the cache leave: {leaving:?}");
}

#[test]
fn names_are_escaped() {
    let mut graph = parse(
        "graph @odd (%x: f32[T,4]) {
           weight @w : f32[4]
           %y = rms_norm %x, @w {eps = 1e-5} : f32[T,4]
           return %y
         }",
    );
    graph.weights[0].name = "w\"<&>\\".into();
    graph.ops[0].scope = "\"<a & b>\"".into();
    graph.name = "\\".into();
    let (drawn, edges) = read_dot(&dot(&graph, &DotOptions::default()));
    assert_eq!((drawn.len(), edges.len()), (3, 2));
    let picture = svg(&graph, &DotOptions::default());
    let document = Document::parse(&picture).expect("well-formed XML");
    let texts: Vec<&str> = document.descendants().filter_map(|node| node.text()).collect();
    assert!(texts.contains(&"w\"<&>\\ [4]"));
}

#[test]
fn an_empty_graph_is_a_drawing_too() {
    let graph = Graph::new("empty");
    assert_eq!(read_dot(&dot(&graph, &DotOptions::default())), (vec![], BTreeMap::new()));
    Document::parse(&svg(&graph, &DotOptions::default())).expect("well-formed XML");
}

#[test]
fn fused_operators_list_what_they_are_made_of() {
    let graph = parse(&plan(&[]).texts[0]);
    let picture = svg(&graph, &DotOptions::default());
    let document = Document::parse(&picture).expect("well-formed XML");
    let fused: Vec<&Op> = graph.ops.iter().filter(|op| matches!(op.kind, OpKind::Fused(_))).collect();
    assert!(!fused.is_empty());
    let drawn = groups(&document, "op");
    for (op, group) in graph.ops.iter().zip(drawn).filter(|(op, _)| matches!(op.kind, OpKind::Fused(_))) {
        let rows: Vec<(f64, &str)> = group
            .descendants()
            .filter(|node| node.attribute("class") == Some("r"))
            .filter_map(|node| Some((node.attribute("y")?.parse().ok()?, node.text()?)))
            .collect();
        assert!(rows.windows(2).all(|pair| pair[0].0 < pair[1].0), "from top to bottom");
        let names: Vec<&str> = rows.iter().map(|row| row.1).collect();
        assert_eq!(names, op.body.iter().map(|op| op.kind.mnemonic()).collect::<Vec<_>>());
    }
}

fn check_memory(program: &Program) {
    for (at, bucket) in program.buckets.iter().enumerate() {
        let text = memory_svg(program, at);
        assert_eq!(text, memory_svg(program, at));
        let document = Document::parse(&text).expect("well-formed XML");
        let axes = groups(&document, "axis")
            .into_iter()
            .filter_map(|path| path.attribute("d"))
            .find_map(|d| {
                // The axes of the arena come as M left top V bottom H right.
                let (start, rest) = d.strip_prefix('M')?.split_once('V')?;
                let (bottom, right) = rest.split_once('H')?;
                let (left, top) = start.split_once(' ')?;
                let number = |text: &str| text.parse::<f64>().ok();
                Some(Box { left: number(left)?, top: number(top)?, right: number(right)?, bottom: number(bottom)? })
            })
            .expect("axes");
        let buffers = groups(&document, "buffer");
        assert_eq!(buffers.len(), bucket.buffers.len());
        let boxes: Vec<Box> = buffers
            .iter()
            .map(|buffer| {
                let rects = rects(buffer);
                assert_eq!(rects.len(), 1, "one rectangle a buffer");
                Box::of(rects[0])
            })
            .collect();
        let per_step = (axes.right - axes.left) / bucket.steps.len() as f64;
        for (id, (one, buffer)) in boxes.iter().zip(&bucket.buffers).enumerate() {
            assert!(axes.contains(one), "{buffer:?} at {one:?} leaves the axes {axes:?}");
            let touches = |place: &Ref| *place == Ref::Arena(id as u32);
            for (step, _) in
                bucket.steps.iter().enumerate().filter(|(_, s)| s.reads.iter().chain(&s.writes).any(touches))
            {
                let middle = axes.left + (step as f64 + 0.5) * per_step;
                assert!(
                    one.left < middle && middle < one.right,
                    "{buffer:?} is used at step {step} but not drawn there"
                );
            }
            if bucket.outputs.iter().any(|(_, place)| touches(place)) {
                assert!(axes.right - one.right < per_step / 2.0, "{buffer:?} is returned");
            }
        }
        // Buffers that share bytes and time would be a fault of the plan, and must not come from the drawing.
        for (a, one) in boxes.iter().enumerate() {
            for other in &boxes[a + 1..] {
                let thin = Box { top: one.top + 1.0, bottom: one.bottom - 1.0, ..*one };
                assert!(thin.bottom < thin.top || !thin.overlaps(other), "{one:?} overlaps {other:?}");
            }
        }
        assert_eq!(groups(&document, "region").len(), 4);
        assert_eq!(groups(&document, "live").len(), 2, "the plot and its legend");
    }
}

#[test]
fn memory_is_drawn_whole() {
    check_memory(&plan(&[]).manifest.ranks[0]);
    check_memory(&plan(&crate::passes::names()).manifest.ranks[0]);
}

#[test]
fn a_bucket_that_is_not_there_is_an_empty_drawing() {
    let text = memory_svg(&plan(&[]).manifest.ranks[0], 1000);
    assert!(groups(&Document::parse(&text).expect("well-formed XML"), "buffer").is_empty());
}
