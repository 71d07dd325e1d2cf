//! The legend of a graph.

use std::collections::BTreeSet;

use crate::cli::draw::family::Family;
use crate::cli::draw::text::{Anchor, DETAIL, Svg};
use crate::cli::draw::view::{Source, View};

/// What the colours mean.
pub struct Legend {
    entries: Vec<(&'static str, String)>,
}

impl Legend {
    /// What a drawing of this needs.
    pub fn new(view: &View) -> Legend {
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
            entries.push(("input, output", "class=\"input\"".to_owned()));
        }
        Legend { entries }
    }

    fn width((name, _): &(&'static str, String)) -> f64 {
        14.0 + 5.0 + DETAIL.width(name) + 11.0
    }

    /// Width of the widest entry.
    pub fn least(&self) -> f64 {
        self.entries.iter().map(Legend::width).fold(0.0, f64::max)
    }

    /// Draws it from `left` to `right` in as many lines as that needs; returns its height.
    pub fn draw(&self, svg: &mut Svg, (left, y): (f64, f64), right: f64) -> f64 {
        let (mut x, mut line) = (left, 0.0);
        svg.open("legend", "");
        for entry in &self.entries {
            if x > left && x + Legend::width(entry) > right {
                (x, line) = (left, line + 18.0);
            }
            svg.rect((x, y + line), (14.0, 11.0), 3.0, &entry.1);
            svg.text(DETAIL, Anchor::Start, x + 19.0, y + line + 5.5, entry.0);
            x += Legend::width(entry);
        }
        svg.close();
        line + 11.0
    }
}
