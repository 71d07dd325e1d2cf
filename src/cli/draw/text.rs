//! Text of a drawing: fonts with estimates of width that hold for the usual system fonts, escapes, numbers.

use std::fmt::Write;

/// A font of the drawings: a class of the style sheet.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Font {
    /// The class.
    pub class: &'static str,
    /// Size in pixels.
    pub size: f64,
    /// Fixed width.
    mono: bool,
    /// Weight.
    weight: u32,
    /// Colour.
    fill: &'static str,
}

/// Title of a drawing.
pub const HEADING: Font = Font { class: "h", size: 15.0, mono: false, weight: 600, fill: "#1c2530" };
/// Beside the title of a drawing.
pub const SUBHEADING: Font = Font { class: "s", size: 12.0, mono: false, weight: 400, fill: "#5c6773" };
/// Name of an operator.
pub const TITLE: Font = Font { class: "t", size: 12.5, mono: false, weight: 600, fill: "#1c2530" };
/// Name of a primitive operator inside a fused one.
pub const ROW: Font = Font { class: "r", size: 11.0, mono: false, weight: 500, fill: "#2a3542" };
/// Attributes.
pub const DETAIL: Font = Font { class: "d", size: 10.0, mono: false, weight: 400, fill: "#66717e" };
/// Weights and types.
pub const CODE: Font = Font { class: "c", size: 9.5, mono: true, weight: 400, fill: "#4a5663" };
/// Names of inputs and states.
pub const CHIP: Font = Font { class: "i", size: 9.5, mono: true, weight: 400, fill: "#33507a" };
/// Titles of clusters.
pub const CLUSTER: Font = Font { class: "k", size: 11.0, mono: false, weight: 600, fill: "#56616e" };

/// All fonts.
pub const FONTS: [Font; 8] = [HEADING, SUBHEADING, TITLE, ROW, DETAIL, CODE, CHIP, CLUSTER];

const SANS: &str = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue','DejaVu Sans',Arial,sans-serif";
const MONO: &str = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace";

impl Font {
    /// Width of a text in pixels, a little more than the widest of the usual fonts takes.
    pub fn width(&self, text: &str) -> f64 {
        let ems: f64 = text.chars().map(|c| if self.mono { 0.62 } else { ems(c) }).sum();
        let bold = if !self.mono && self.weight >= 600 { 1.1 } else { 1.0 };
        ems * bold * self.size
    }

    /// Distance from the middle of a line to its baseline.
    pub fn drop(&self) -> f64 {
        self.size * 0.36
    }
}

/// Width of a character in a wide sans-serif font, in units of the font size.
fn ems(c: char) -> f64 {
    match c {
        'i' | 'j' | 'l' | '\'' | '|' => 0.29,
        '.' | ',' | ':' | ';' | ' ' | '·' => 0.33,
        'f' | 't' | 'r' | '(' | ')' | '[' | ']' | '-' => 0.42,
        'm' | 'w' | 'M' | 'W' | '%' | '@' | '→' | '–' => 0.98,
        '+' | '=' | '<' | '>' | '×' | '≥' => 0.84,
        'A'..='Z' => 0.74,
        _ => 0.64,
    }
}

/// The style sheet of all fonts.
pub fn style() -> String {
    let mut css = format!("text{{font-family:{SANS}}}");
    for font in FONTS {
        let _ =
            write!(css, ".{}{{font-size:{}px;font-weight:{};fill:{}", font.class, font.size, font.weight, font.fill);
        if font.mono {
            let _ = write!(css, ";font-family:{MONO}");
        }
        css.push('}');
    }
    css
}

/// Text for XML, as content or attribute. Characters that XML does not allow become `?`.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push('?'),
            c if c.is_control() && !matches!(c, '\n' | '\t') => escaped.push('?'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A coordinate, to a tenth of a pixel.
pub fn px(x: f64) -> String {
    let text = format!("{x:.1}");
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Where a text is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Anchor {
    /// At its left end.
    Start,
    /// In its middle.
    Middle,
    /// At its right end.
    End,
}

/// An SVG under construction.
#[derive(Default)]
pub struct Svg {
    body: String,
}

impl Svg {
    /// Adds markup as it stands.
    pub fn raw(&mut self, markup: &str) {
        self.body.push_str(markup);
    }

    /// A text whose vertical middle is at `y`.
    pub fn text(&mut self, font: Font, anchor: Anchor, x: f64, y: f64, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let (x, y) = (px(x), px(y + font.drop()));
        let _ = write!(self.body, "<text class=\"{}\" x=\"{x}\" y=\"{y}\"{anchor}>{}</text>", font.class, escape(text));
    }

    /// A text turned to read upwards, its middle at `(x, y)`.
    pub fn upright(&mut self, font: Font, x: f64, y: f64, text: &str) {
        let (cx, cy, baseline) = (px(x), px(y), px(y + font.drop()));
        let _ = write!(
            self.body,
            "<text class=\"{}\" x=\"{cx}\" y=\"{baseline}\" text-anchor=\"middle\" \
             transform=\"rotate(-90 {cx} {cy})\">{}</text>",
            font.class,
            escape(text)
        );
    }

    /// A rectangle; `look` is further attributes.
    pub fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), radius: f64, look: &str) {
        let (x, y, width, height) = (px(x), px(y), px(width), px(height));
        let _ = write!(self.body, "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"");
        if radius > 0.0 {
            let _ = write!(self.body, " rx=\"{}\"", px(radius));
        }
        let _ = write!(self.body, " {look}/>");
    }

    /// A path; `look` is further attributes.
    pub fn path(&mut self, commands: &str, look: &str) {
        let _ = write!(self.body, "<path d=\"{commands}\" {look}/>");
    }

    /// Starts a group, with a tooltip.
    pub fn open(&mut self, class: &str, tooltip: &str) {
        let _ = write!(self.body, "<g class=\"{class}\">");
        if !tooltip.is_empty() {
            let _ = write!(self.body, "<title>{}</title>", escape(tooltip));
        }
    }

    /// Ends a group.
    pub fn close(&mut self) {
        self.body.push_str("</g>\n");
    }

    /// The whole document, on white.
    pub fn finish(self, width: f64, height: f64) -> String {
        let (width, height) = (width.ceil(), height.ceil());
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\">\n<style>{}</style>\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n{}</svg>\n",
            style(),
            self.body
        )
    }
}
