//! What templates expect of Jinja and of Python's text, and `minijinja` does not have or does in another way.

use anyhow::Result;
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Teaches them to an environment.
pub fn teach(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("trim", |value: &Value, ends: Option<String>| {
        strip(&value.to_string(), ends.as_deref(), true, true).to_owned()
    });
    environment.add_filter("replace", |value: &Value, old: &Value, new: &Value, count: Option<i64>| {
        let (text, old, new) = (value.to_string(), old.to_string(), new.to_string());
        text.replacen(&old, &new, most(count))
    });
}

/// What is not defined has no items.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    let found = value.len().ok_or_else(|| format!("expected text or something with items, found {}", value.kind()));
    found.map_err(|what| Error::new(ErrorKind::InvalidOperation, format!("length: {what}")))
}

/// A method of a value that `minijinja` does not know.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match value.as_str().map(|text| text_method(text, name, args)) {
        Some(Ok(None)) | None => unknown_method_callback(state, value, name, args),
        Some(Ok(Some(found))) => Ok(found),
        Some(Err(error)) => Err(error),
    }
}

/// A method of Python's `str`; none if it is not one of those here.
fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (ends,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, ends, name != "rstrip", name != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, count, named): (Option<&Value>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.cloned().or(named.get("sep")?).filter(|separator| !separator.is_none());
            let count = count.or(named.get("maxsplit")?);
            named.assert_all_used()?;
            let separator = separator.map(|separator| separator.to_string());
            if separator.as_deref() == Some("") {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("{name}: empty separator")));
            }
            split(text, separator.as_deref(), most(count), name == "rsplit").into_iter().collect()
        }
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(named.get("keepends")?).unwrap_or(false);
            named.assert_all_used()?;
            lines(text, keep).into_iter().collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (cut, whole) = match name {
                "partition" => (text.split_once(separator), [text, "", ""]),
                _ => (text.rsplit_once(separator), ["", "", text]),
            };
            Value::from(Tuple::from(cut.map_or(whole, |(a, b)| [a, separator, b]).map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "title" => {
            let () = from_args(args)?;
            Value::from(title(text))
        }
        "ljust" | "rjust" | "zfill" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let fill = if name == "zfill" { "0" } else { fill.unwrap_or(" ") };
            let padding = fill.repeat(width.min(MOST_WIDTH).saturating_sub(text.chars().count()));
            Value::from(match (name, text.strip_prefix(['-', '+'])) {
                ("ljust", _) => format!("{text}{padding}"),
                ("zfill", Some(digits)) => format!("{}{padding}{digits}", &text[..1]),
                _ => format!("{padding}{text}"),
            })
        }
        _ => return Ok(None),
    }))
}

/// No template pads a text to more.
const MOST_WIDTH: usize = 10_000;

/// How often at the most: where Python is told a negative number, always.
fn most(count: Option<i64>) -> usize {
    count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX)
}

/// White space as Python has it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip<'t>(text: &'t str, ends: Option<&str>, left: bool, right: bool) -> &'t str {
    let is_end = |c: char| ends.map_or_else(|| is_space(c), |ends| ends.contains(c));
    let text = if left { text.trim_start_matches(is_end) } else { text };
    if right { text.trim_end_matches(is_end) } else { text }
}

/// The parts between separators, or between white space, where parts are never empty; what is behind `most` cuts stays whole.
fn split<'t>(text: &'t str, separator: Option<&str>, most: usize, from_right: bool) -> Vec<&'t str> {
    let mut parts = vec![];
    let mut rest = if separator.is_none() { strip(text, None, true, true) } else { text };
    while parts.len() < most {
        let cut = match (separator, from_right) {
            (Some(separator), false) => rest.split_once(separator),
            (Some(separator), true) => rest.rsplit_once(separator),
            (None, false) => rest.split_once(is_space),
            (None, true) => rest.rsplit_once(is_space),
        };
        let Some((a, b)) = cut else { break };
        let (part, other) = if from_right { (b, a) } else { (a, b) };
        parts.push(part);
        rest = if separator.is_none() { strip(other, None, !from_right, from_right) } else { other };
    }
    if separator.is_some() || !rest.is_empty() {
        // With white space, only the outer side was cut off before.
        parts.push(rest);
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let (mut lines, mut rest) = (vec![], text);
    while let Some(at) = rest.find(is_end) {
        let width =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        lines.push(&rest[..if keep { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Every letter behind one that is none is a capital, others are not.
fn title(text: &str) -> String {
    let mut within = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if within {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        within = c.is_alphabetic();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    #[track_caller]
    fn gives(expression: &str, expected: &str) {
        let mut environment = Environment::new();
        teach(&mut environment);
        let variables = context! { tools => (), text => " a\u{1f} ", empty => Vec::<Value>::new() };
        let found = environment.render_str(&format!("{{{{ {expression} }}}}"), variables);
        assert_eq!(found.expect("it renders"), expected, "{expression}");
    }

    #[test]
    fn nothing_is_not_iterable_and_what_is_missing_is_empty() {
        gives("tools is iterable", "False");
        gives("tools is iterable and tools | length > 0", "False");
        gives("missing is iterable and missing | length == 0", "True");
        gives("[1] is iterable and 'a' is iterable and {} is iterable", "True");
        gives("['a' is sequence, {} is sequence, [1] is sequence, missing is sequence]", "[True, True, True, True]");
        gives("[tools is sequence, 1 is sequence]", "[False, False]");
        let mut environment = Environment::new();
        teach(&mut environment);
        let error = environment.render_str("{{ 1 | length }}", ()).expect_err("a number has none").to_string();
        assert!(error.contains("length: expected text or something with items, found number"), "{error}");
    }

    #[test]
    fn white_space_is_pythons() {
        gives("(text | trim) ~ '|' ~ text.strip() ~ '|' ~ text.rstrip()", "a|a| a");
        gives("'xxaxx'.lstrip('x') ~ ('-a-' | trim('-'))", "axxa");
        gives("'a\\x1fb\\u00a0c'.split()", "['a', 'b', 'c']");
        gives("'a\\r\\nb\\x0bc\\u2028d\\n'.splitlines()", "['a', 'b', 'c', 'd']");
        gives("'a\\r\\nb'.splitlines(true)", "['a\\r\\n', 'b']");
    }

    #[test]
    fn text_is_split_from_both_sides() {
        gives("'a,b,c'.split(',', 1) ~ 'a,b,c'.rsplit(',', 1)", "['a', 'b,c']['a,b', 'c']");
        gives("'a,b,c'.split(',', maxsplit=1) ~ 'a,b'.split(sep=',')", "['a', 'b,c']['a', 'b']");
        gives("' a  b c '.split(none, 1) ~ ' a b  c '.rsplit(maxsplit=1)", "['a', 'b c']['a b', 'c']");
        gives("''.split() ~ ''.split(',') ~ ','.split(',') ~ 'a'.rsplit('</think>')[-1]", "[]['']['', '']a");
        gives("'a=b=c'.partition('=') ~ 'a=b=c'.rpartition('=')", "('a', '=', 'b=c')('a=b', '=', 'c')");
        gives("'a'.partition('=') ~ 'a'.rpartition('=')", "('a', '', '')('', '', 'a')");
    }

    #[test]
    fn other_methods_are_known() {
        gives("'abc'.removeprefix('a') ~ 'abc'.removesuffix('c') ~ 'abc'.removeprefix('x')", "bcababc");
        gives("\"they're a-b c_d\".title()", "They'Re A-B C_D");
        gives("'7'.zfill(3) ~ '-7'.zfill(3) ~ 'a'.ljust(3, '.') ~ 'a'.rjust(3)", "007-07a..  a");
        gives("'aaa' | replace('a', 'b', 2)", "bba");
        gives("'abc'.upper() ~ {'a': 1}.get('b', 2)", "ABC2");
        gives("empty is sequence and not empty", "True");
    }
}
