//! What stands in an operator's box, and how large that makes it.

use crate::cli::draw::family::Family;
use crate::cli::draw::text::{Anchor, CHIP, CODE, DETAIL, ROW, Svg, TITLE};
use crate::cli::draw::view::{Source, View, details, layer, title};
use crate::ir::{DType, Op, Operand, ValueId};

/// Inner margin of a box, at its sides.
const MARGIN: f64 = 12.0;
/// Between pieces of a line.
const GAP: f64 = 7.0;
/// Height of a line with an operator's name.
const TITLE_LINE: f64 = 18.0;
/// Height of a line with a weight.
const WEIGHT_LINE: f64 = 14.0;
/// Height of a primitive operator inside a fused one, and the distance to the next.
const ROW_LINE: (f64, f64) = (19.0, 3.0);
/// Height of the head of a fused operator.
const HEAD: f64 = 24.0;
/// Least width.
const LEAST: f64 = 96.0;
/// From a box to the states beside it.
const ASIDE: f64 = 34.0;

/// The box of an operator.
pub struct Node {
    /// What it mostly is.
    pub family: Family,
    /// The text of a tooltip.
    tooltip: String,
    head: Line,
    rows: Vec<(Family, Line)>,
    fused: bool,
    /// States that it updates, drawn beside it.
    states: Vec<[String; 2]>,
    /// Width of the box, without states.
    pub width: f64,
    /// Height of the box.
    pub height: f64,
}

/// One operator's text.
#[derive(Default)]
struct Line {
    title: String,
    detail: String,
    weights: Vec<String>,
    /// Inputs and states that are named rather than connected; true for states.
    chips: Vec<(String, bool)>,
}

/// True for a source that is named in the boxes that take it, because edges to all of them would hide the rest.
pub fn is_chip(view: &View, value: ValueId, source: Source) -> bool {
    match source {
        Source::State => true,
        Source::Earlier => false,
        Source::Input => {
            view.graph.ty(value).dtype == DType::I32 && view.takers.get(&value).is_some_and(|&takers| takers > 1)
        }
    }
}

impl Node {
    /// The box of an operator. `chip` tells what is named in it; states that it updates stand beside it.
    pub fn new(view: &View, op: &Op, chip: &dyn Fn(ValueId) -> Option<Source>) -> Node {
        let updated: Vec<ValueId> = op.state_updates().into_iter().map(|(old, _)| old).collect();
        let named = |value: ValueId| {
            let source = chip(value).filter(|_| !updated.contains(&value))?;
            Some((view.graph.value(value).name.clone(), source == Source::State))
        };
        let mut head = Line { title: title(op), ..Line::default() };
        let mut rows = vec![];
        if op.body.is_empty() {
            head = Line::new(view, op, &op.scope, &named);
        } else {
            head.title = head.title.replace('+', " + ");
            rows.extend(op.body.iter().map(|inner| (Family::of(inner), Line::new(view, inner, &op.scope, &named))));
        }
        let states = updated
            .iter()
            .filter(|&&value| chip(value).is_some())
            .map(|&value| [view.graph.value(value).name.clone(), view.graph.ty(value).to_string()])
            .collect();
        let mut node = Node {
            family: Family::of(op),
            tooltip: view.graph.print_op(op, "").trim_end().to_owned(),
            head,
            rows,
            fused: !op.body.is_empty(),
            states,
            width: 0.0,
            height: 0.0,
        };
        (node.width, node.height) = node.size();
        node
    }

    fn size(&self) -> (f64, f64) {
        let title = self.head.title_width(false);
        if self.fused {
            let rows = self.rows.iter().map(|(_, line)| line.row_width()).fold(0.0, f64::max);
            let width = (title + 2.0 * MARGIN).max(rows + 16.0).max(LEAST);
            let (row, gap) = ROW_LINE;
            let height = HEAD + self.rows.len() as f64 * (row + gap) + 5.0;
            return (width.ceil(), height.max(self.states_height()));
        }
        let weights = self.head.weights.iter().map(|weight| CODE.width(weight)).fold(0.0, f64::max);
        let height = 10.0 + TITLE_LINE + self.head.weights.len() as f64 * WEIGHT_LINE;
        ((title.max(weights) + 2.0 * MARGIN).max(LEAST).ceil(), height.max(self.states_height()))
    }

    fn states_height(&self) -> f64 {
        if self.states.is_empty() { 0.0 } else { self.states.len() as f64 * 38.0 - 6.0 }
    }

    /// Width of the states beside the box, with the distance to them.
    pub fn aside(&self) -> f64 {
        if self.states.is_empty() { 0.0 } else { ASIDE + self.state_width() }
    }

    fn state_width(&self) -> f64 {
        let width = |[name, ty]: &[String; 2]| CHIP.width(name).max(CODE.width(ty)) + 18.0;
        self.states.iter().map(width).fold(0.0, f64::max).ceil()
    }

    /// Draws the box, its top's middle at `(x, y)`.
    pub fn draw(&self, svg: &mut Svg, x: f64, y: f64) {
        let left = x - self.width / 2.0;
        let stroke = self.family.stroke();
        svg.open("op", &self.tooltip);
        if self.fused {
            let look = format!("class=\"box\" fill=\"#ffffff\" stroke=\"{stroke}\" stroke-width=\"1.5\"");
            svg.rect((left, y), (self.width, self.height), 9.0, &look);
            self.draw_head(svg, left, y);
            let (row, gap) = ROW_LINE;
            for (i, (family, line)) in self.rows.iter().enumerate() {
                let top = y + HEAD + i as f64 * (row + gap) + 1.0;
                let look = format!("fill=\"{}\"", family.fill());
                svg.rect((left + 6.0, top), (self.width - 12.0, row), 4.0, &look);
                let bar = format!("fill=\"{}\"", family.stroke());
                svg.rect((left + 6.0, top), (3.0, row), 1.5, &bar);
                line.draw_row(svg, left + 15.0, left + self.width - 12.0, top + row / 2.0);
            }
        } else {
            let look =
                format!("class=\"box\" fill=\"{}\" stroke=\"{stroke}\" stroke-width=\"1.1\"", self.family.fill());
            svg.rect((left, y), (self.width, self.height), 6.0, &look);
            let text = TITLE_LINE + self.head.weights.len() as f64 * WEIGHT_LINE;
            let top = y + (self.height - text) / 2.0;
            self.head.draw_title(svg, x, top + TITLE_LINE / 2.0);
            for (i, weight) in self.head.weights.iter().enumerate() {
                let middle = top + TITLE_LINE + (i as f64 + 0.42) * WEIGHT_LINE;
                svg.text(CODE, Anchor::Middle, x, middle, weight);
            }
        }
        self.draw_states(svg, left + self.width, y);
        svg.close();
    }

    /// The coloured head of a fused operator, its upper corners round.
    fn draw_head(&self, svg: &mut Svg, left: f64, y: f64) {
        let (l, r, t, b) = (left + 0.7, left + self.width - 0.7, y + 0.7, y + HEAD - 3.0);
        let commands = format!(
            "M{l:.1} {b:.1}V{:.1}Q{l:.1} {t:.1} {:.1} {t:.1}H{:.1}Q{r:.1} {t:.1} {r:.1} {:.1}V{b:.1}Z",
            t + 8.0,
            l + 8.0,
            r - 8.0,
            t + 8.0
        );
        svg.path(&commands, &format!("fill=\"{}\"", self.family.fill()));
        svg.text(TITLE, Anchor::Middle, left + self.width / 2.0, y + HEAD / 2.0 - 0.5, &self.head.title);
    }

    /// Updated states to the right of the box, with arrows both ways.
    fn draw_states(&self, svg: &mut Svg, right: f64, y: f64) {
        let width = self.state_width();
        let mut top = y + (self.height - self.states_height()) / 2.0;
        for [name, ty] in &self.states {
            let (x, middle) = (right + ASIDE, top + 16.0);
            let (a, b) = (right + 2.0, x - 2.0);
            svg.path(&format!("M{:.1} {middle:.1}H{:.1}", a + 5.0, b - 5.0), "class=\"e v\"");
            let (up, down) = (middle - 3.6, middle + 3.6);
            let heads = format!(
                "M{a:.1} {middle:.1}L{:.1} {up:.1}V{down:.1}ZM{b:.1} {middle:.1}L{:.1} {up:.1}V{down:.1}Z",
                a + 7.0,
                b - 7.0
            );
            svg.path(&heads, "class=\"b\"");
            svg.rect((x, top), (width, 32.0), 8.0, "class=\"state\"");
            svg.text(CHIP, Anchor::Middle, x + width / 2.0, middle - 6.5, name);
            svg.text(CODE, Anchor::Middle, x + width / 2.0, middle + 6.5, ty);
            top += 38.0;
        }
    }
}

impl Line {
    fn new(view: &View, op: &Op, scope: &str, named: &dyn Fn(ValueId) -> Option<(String, bool)>) -> Line {
        let mut chips = vec![];
        for value in op.uses() {
            if let Some(chip) = named(value)
                && !chips.contains(&chip)
            {
                chips.push(chip);
            }
        }
        let weight = |operand: &Operand| {
            let weight = view.graph.weight(operand.weight()?);
            let sizes: Vec<String> = weight.ty.shape.iter().map(ToString::to_string).collect();
            Some(format!("{} [{}]", short_weight(&weight.name, scope), sizes.join(",")))
        };
        Line { title: title(op), detail: details(op), weights: op.operands.iter().filter_map(weight).collect(), chips }
    }

    fn chips_width(&self) -> f64 {
        self.chips.iter().map(|(name, _)| GAP + CHIP.width(name) + 10.0).sum()
    }

    fn detail_width(&self) -> f64 {
        if self.detail.is_empty() { 0.0 } else { GAP + DETAIL.width(&self.detail) }
    }

    fn title_width(&self, row: bool) -> f64 {
        (if row { ROW } else { TITLE }).width(&self.title) + self.detail_width() + self.chips_width()
    }

    fn row_width(&self) -> f64 {
        let weights: f64 = self.weights.iter().map(|weight| 10.0 + CODE.width(weight)).sum();
        15.0 + self.title_width(true) + weights
    }

    fn draw_title(&self, svg: &mut Svg, middle: f64, y: f64) {
        let mut x = middle - self.title_width(false) / 2.0;
        svg.text(TITLE, Anchor::Start, x, y, &self.title);
        x += TITLE.width(&self.title);
        if !self.detail.is_empty() {
            svg.text(DETAIL, Anchor::Start, x + GAP, y + 0.5, &self.detail);
            x += self.detail_width();
        }
        self.draw_chips(svg, x, y);
    }

    /// Name and attributes from the left, weights and chips up to the right.
    fn draw_row(&self, svg: &mut Svg, left: f64, right: f64, y: f64) {
        svg.text(ROW, Anchor::Start, left, y, &self.title);
        if !self.detail.is_empty() {
            svg.text(DETAIL, Anchor::Start, left + ROW.width(&self.title) + GAP, y + 0.3, &self.detail);
        }
        let mut x = right - self.chips_width();
        self.draw_chips(svg, x, y);
        for weight in self.weights.iter().rev() {
            svg.text(CODE, Anchor::End, x, y, weight);
            x -= 10.0 + CODE.width(weight);
        }
    }

    fn draw_chips(&self, svg: &mut Svg, mut x: f64, y: f64) {
        for (name, state) in &self.chips {
            let width = CHIP.width(name) + 10.0;
            let class = if *state { "class=\"state\"" } else { "class=\"input\"" };
            svg.rect((x + GAP, y - 6.5), (width, 13.0), 6.5, class);
            svg.text(CHIP, Anchor::Middle, x + GAP + width / 2.0, y, name);
            x += GAP + width;
        }
    }
}

/// The part of a weight's name that its place in the drawing does not say: `in_proj` for
/// `model.layers.3.conv.in_proj.weight`.
fn short_weight(name: &str, scope: &str) -> String {
    let prefix = layer(scope).map(|layer| format!("model.layers.{layer}."));
    let inner = prefix.as_deref().and_then(|prefix| name.strip_prefix(prefix));
    let inner = match inner.and_then(|inner| inner.split_once('.')) {
        Some((_, rest)) if rest != "weight" => Some(rest),
        _ => inner,
    };
    let short = inner.unwrap_or(name);
    short.strip_suffix(".weight").unwrap_or(short).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_named_by_what_their_place_does_not_say() {
        let short = |name| short_weight(name, "layers.3.conv");
        assert_eq!(short("model.layers.3.conv.in_proj.weight"), "in_proj");
        assert_eq!(short("model.layers.3.operator_norm.weight"), "operator_norm");
        assert_eq!(short("model.layers.3.feed_forward.experts.w1.weight"), "experts.w1");
        assert_eq!(short("model.layers.3.feed_forward.expert_bias"), "expert_bias");
        assert_eq!(short("model.layers.4.conv.in_proj.weight"), "model.layers.4.conv.in_proj");
        assert_eq!(short("w"), "w");
    }
}
