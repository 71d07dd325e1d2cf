//! The manifest's text: RON, with a line for each thing that a person looks for.

use super::PlanError;
use crate::plan::Manifest;

/// Deeper than the manifest's types.
const MAX_RON_DEPTH: usize = 32;
/// Down to this depth the manifest's RON gets a line for each field; below, an item is one line.
const RON_LINE_DEPTH: usize = 6;
/// What is put onto one line although it lies above that depth: fields ...
const ONE_LINE: [&str; 9] = [
    "eos_tokens: [",
    "prompt: [",
    "inputs: [",
    "outputs: [",
    "temps: [",
    "weights: (",
    "state: (",
    "arena: (",
    "io: (",
];
/// ... and the items of lists.
const ONE_LINE_ITEMS: [&str; 5] = ["tensors: [", "weights: [", "packed: [", "states: [", "io: ["];

/// The text of a manifest.
pub(super) fn print(manifest: &Manifest) -> String {
    let config = ron::ser::PrettyConfig::new().depth_limit(RON_LINE_DEPTH).indentor("  ").new_line("\n");
    let text = ron::ser::to_string_pretty(manifest, config).expect("plain data, written to a String");
    join_lines(&text)
}

/// Reads a manifest's text.
pub(super) fn parse(text: &str) -> Result<Manifest, PlanError> {
    let options = ron::Options::default().with_recursion_limit(MAX_RON_DEPTH);
    options.from_str(text).map_err(|fault| {
        let at = fault.span.end;
        PlanError::Manifest { line: at.line, column: at.col, message: fault.code.to_string() }
    })
}

/// Joins lines: each of [`ONE_LINE`], and each item of [`ONE_LINE_ITEMS`].
fn join_lines(pretty: &str) -> String {
    let mut text = String::with_capacity(pretty.len());
    // What is being joined up to a line of this indentation or less, and what a list of items lies at.
    let (mut joining, mut items) = (None, None);
    for line in pretty.lines() {
        let content = line.trim_start();
        let indent = line.len() - content.len();
        if items.is_some_and(|items| indent <= items) {
            items = None;
        }
        if joining.is_none() {
            let begins = ONE_LINE.contains(&content) || (items.is_some() && content == "(");
            joining = begins.then_some(indent);
            if ONE_LINE_ITEMS.contains(&content) {
                items = Some(indent);
            }
            text.push_str(line);
            text.push_str(if begins { "" } else { "\n" });
            continue;
        }
        if content.starts_with([')', ']']) {
            text.truncate(text.trim_end_matches([' ', ',']).len());
        }
        text.push_str(content);
        if joining == Some(indent) {
            joining = None;
            text.push('\n');
        } else if !content.ends_with(['(', '[']) {
            text.push(' ');
        }
    }
    text
}
