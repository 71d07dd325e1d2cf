//! What is wrong with a graph, shown under the lines of its text.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use crate::ir::{Graph, Location, SourceMap};

/// Lines around a fault that are shown.
const NEAR: usize = 4;

/// Characters of a line that a fault keeps or underlines; a line may be very long and have very many faults.
const LINE_CHARS: usize = 160;

/// One fault.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The culprit.
    pub location: Location,
    /// The culprit's line in the printed graph, or its beginning.
    pub context: String,
    /// What is wrong: expected and found.
    pub message: String,
}

/// All faults of a graph, at least one. Displays the printed graph, without the parts that are far from any fault, with each
/// fault under its line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyErrors {
    /// The faults, in the order of their lines.
    pub faults: Vec<Fault>,
    text: String,
    lines: Box<SourceMap>,
}

impl VerifyErrors {
    /// The faults of a graph, if there are any.
    pub(crate) fn check(graph: &Graph, mut found: Vec<(Location, String)>) -> Result<(), VerifyErrors> {
        if found.is_empty() {
            return Ok(());
        }
        let (text, lines) = (graph.to_string(), SourceMap::of_printed(graph));
        found.sort_by_key(|(location, _)| lines.line(*location));
        let printed: Vec<&str> = text.lines().collect();
        let context = |location| {
            let line = lines.line(location).and_then(|line| printed.get(line.checked_sub(1)?));
            line.map_or_else(String::new, |line| line.trim().chars().take(LINE_CHARS).collect())
        };
        let fault = |(location, message)| Fault { location, context: context(location), message };
        let faults = found.into_iter().map(fault).collect();
        Err(VerifyErrors { faults, text, lines: Box::new(lines) })
    }

    /// The faults under the lines of the text that the graph was parsed from.
    pub fn show_in(&self, source: &str, lines: &SourceMap) -> String {
        let mut by_line: BTreeMap<usize, Vec<&Fault>> = BTreeMap::new();
        for fault in &self.faults {
            by_line.entry(lines.line(fault.location).unwrap_or(1)).or_default().push(fault);
        }
        let mut shown = String::new();
        let mut skipped = false;
        for (at, line) in source.lines().enumerate() {
            let number = at + 1;
            if by_line.range(number.saturating_sub(NEAR)..=number.saturating_add(NEAR)).next().is_none() {
                skipped = true;
                continue;
            }
            if std::mem::take(&mut skipped) {
                shown.push_str("  ...\n");
            }
            let _ = writeln!(shown, "{line}");
            let code = line.split(';').next().unwrap_or("").trim_end();
            let indent: String = code.chars().take(LINE_CHARS).take_while(|c| c.is_whitespace()).collect();
            let width = code.trim_start().chars().take(LINE_CHARS).count().max(1);
            for fault in by_line.get(&number).into_iter().flatten() {
                let _ = writeln!(shown, "{indent}^{:~<tail$} error: {}", "", fault.message, tail = width - 1);
            }
        }
        if skipped {
            shown.push_str("  ...\n");
        }
        shown
    }
}

impl fmt::Display for VerifyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.show_in(&self.text, &self.lines))?;
        let count = self.faults.len();
        write!(f, "{count} error{} in the graph", if count == 1 { "" } else { "s" })
    }
}

impl std::error::Error for VerifyErrors {}
