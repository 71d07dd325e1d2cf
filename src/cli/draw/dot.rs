//! Graphviz DOT.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;

use crate::cli::draw::DotOptions;
use crate::cli::draw::family::Family;
use crate::cli::draw::view::{Source, View, details, layer, part, title};
use crate::ir::{Graph, Op, Operand, ValueId};

/// The graph as Graphviz DOT: a cluster for each layer and each part of one, a cluster for each fused operator with the
/// primitive operators that it is made of, an edge for each value from its definition to each use.
pub fn dot(graph: &Graph, options: &DotOptions) -> String {
    let view = View::new(graph, options);
    let mut writer = Writer { view: &view, text: String::new(), depth: 1 };
    writer.line(&format!("graph [label={}, labelloc=t, fontname=\"Helvetica\"]", quote(&format!("@{}", graph.name))));
    writer
        .line("node [shape=box, style=\"rounded,filled\", fontname=\"Helvetica\", fontsize=11, margin=\"0.12,0.06\"]");
    writer.line("edge [fontname=\"Courier\", fontsize=9, color=\"#66717e\", arrowsize=0.7]");
    writer.sources();
    writer.clusters();
    for &value in &view.leaving {
        let look = if view.is_state(value) { STATE } else { OUTPUT };
        writer.line(&format!("out{} [label={}, {look}]", value.0, writer.value_label(value)));
    }
    writer.edges();
    format!("digraph {} {{\n{}}}\n", quote(&graph.name), writer.text)
}

const INPUT: &str = "shape=ellipse, style=filled, fillcolor=\"#ffffff\", color=\"#33507a\"";
const OUTPUT: &str = "shape=ellipse, style=filled, fillcolor=\"#ffffff\", color=\"#33507a\", peripheries=2";
const STATE: &str = "shape=cylinder, style=\"dashed,filled\", fillcolor=\"#ffffff\", color=\"#5c6773\"";

struct Writer<'a> {
    view: &'a View<'a>,
    text: String,
    depth: usize,
}

impl Writer<'_> {
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "{}{line}", "  ".repeat(self.depth));
    }

    fn open(&mut self, id: &str, label: &str, look: &str) {
        self.line(&format!("subgraph {} {{", quote(&format!("cluster_{id}"))));
        self.depth += 1;
        self.line(&format!("label={}; fontname=\"Helvetica\"; {look}", quote(label)));
    }

    fn close(&mut self) {
        self.depth -= 1;
        self.line("}");
    }

    fn value_label(&self, value: ValueId) -> String {
        let value = self.view.graph.value(value);
        quote(&format!("%{}\n{}", value.name, value.ty))
    }

    fn sources(&mut self) {
        for &(value, source) in &self.view.sources {
            let look = if source == Source::State || self.view.is_state(value) { STATE } else { INPUT };
            self.line(&format!("in{} [label={}, {look}]", value.0, self.value_label(value)));
        }
    }

    /// Operators by layer, in the order of the first operator of each, and in it by part.
    fn clusters(&mut self) {
        let graph = self.view.graph;
        let scope = |at: &usize| graph.ops[*at].scope.as_str();
        let groups = grouped(&self.view.ops, |at| layer(scope(at)).map_or_else(|| scope(at).to_owned(), layer_name));
        for (name, ops) in groups {
            let is_layer = ops.first().is_some_and(|at| layer(scope(at)).is_some());
            if !name.is_empty() {
                let label = if is_layer { name.replace('.', " ").replace("layers", "layer") } else { name.clone() };
                self.open(&name, &label, "style=\"rounded,filled\"; color=\"#d3d9e0\"; fillcolor=\"#f5f7fa\"");
            }
            for (inner, ops) in grouped(&ops, |at| part(scope(at)).to_owned()) {
                let nested = is_layer && !inner.is_empty();
                if nested {
                    let look = "style=\"rounded,filled\"; color=\"#e1e6ec\"; fillcolor=\"#ffffff\"";
                    self.open(&format!("{name}.{inner}"), &inner, look);
                }
                for at in ops {
                    self.op(at);
                }
                if nested {
                    self.close();
                }
            }
            if !name.is_empty() {
                self.close();
            }
        }
    }

    fn op(&mut self, at: usize) {
        let op = &self.view.graph.ops[at];
        if op.body.is_empty() {
            let line = self.node(&node_name(at, None), op);
            self.line(&line);
            return;
        }
        let family = Family::of(op);
        let look = format!("style=\"rounded,filled\"; color=\"{}\"; fillcolor=\"{}\"", family.stroke(), family.fill());
        self.open(&format!("op{at}"), &title(op), &look);
        for (inner, primitive) in op.body.iter().enumerate() {
            let line = self.node(&node_name(at, Some(inner)), primitive);
            self.line(&line);
        }
        self.close();
    }

    fn node(&self, name: &str, op: &Op) -> String {
        let mut label = title(op);
        let details = details(op);
        if !details.is_empty() {
            let _ = write!(label, "\n{details}");
        }
        for operand in &op.operands {
            if let Operand::Weight(id) = operand {
                let weight = self.view.graph.weight(*id);
                let _ = write!(label, "\n@{} {}", weight.name, weight.ty);
            }
        }
        let family = Family::of(op);
        let (fill, stroke) = (family.fill(), family.stroke());
        format!("{name} [label={}, fillcolor=\"{fill}\", color=\"{stroke}\"]", quote(&label))
    }

    fn edges(&mut self) {
        let graph = self.view.graph;
        let mut made: HashMap<ValueId, String> =
            self.view.sources.iter().map(|&(value, _)| (value, format!("in{}", value.0))).collect();
        let primitives: Vec<(String, &Op)> = self.view.ops.iter().flat_map(|&at| named(graph, at)).collect();
        for (name, op) in &primitives {
            made.extend(op.results.iter().map(|&value| (value, name.clone())));
        }
        for (name, op) in &primitives {
            for value in op.uses().collect::<BTreeSet<_>>() {
                if let Some(from) = made.get(&value) {
                    self.edge(from, name, value);
                }
            }
        }
        for &value in &self.view.leaving {
            if let Some(from) = made.get(&value) {
                self.edge(from, &format!("out{}", value.0), value);
            }
        }
    }

    fn edge(&mut self, from: &str, to: &str, value: ValueId) {
        let style = if self.view.is_state(value) { ", style=dashed" } else { "" };
        let value = self.view.graph.value(value);
        let (label, tooltip) = (quote(&value.ty.to_string()), quote(&format!("%{}", value.name)));
        self.line(&format!("{from} -> {to} [label={label}, tooltip={tooltip}{style}]"));
    }
}

/// The primitive operators of an operator, with the names of their nodes.
fn named(graph: &Graph, at: usize) -> Vec<(String, &Op)> {
    let op = &graph.ops[at];
    if op.body.is_empty() {
        return vec![(node_name(at, None), op)];
    }
    op.body.iter().enumerate().map(|(inner, op)| (node_name(at, Some(inner)), op)).collect()
}

fn node_name(at: usize, inner: Option<usize>) -> String {
    match inner {
        None => format!("op{at}"),
        Some(inner) => format!("op{at}_{inner}"),
    }
}

fn layer_name(layer: u64) -> String {
    format!("layers.{layer}")
}

/// Positions by key, keys in the order of their first position.
fn grouped(ops: &[usize], key: impl Fn(&usize) -> String) -> Vec<(String, Vec<usize>)> {
    let mut groups: Vec<(String, Vec<usize>)> = vec![];
    let mut places: HashMap<String, usize> = HashMap::new();
    for at in ops {
        let key = key(at);
        let place = *places.entry(key.clone()).or_insert(groups.len());
        if place == groups.len() {
            groups.push((key, vec![]));
        }
        groups[place].1.push(*at);
    }
    groups
}

/// A quoted string of DOT; lines are centred.
fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
