//! Chat templates: Jinja, in the environment that `transformers` gives them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde_json::{Map, Value as Json};

use super::files::{self, Files};
use super::{json, python, time};

/// A chat template, and where it stands.
pub struct Template {
    path: PathBuf,
    source: String,
}

impl Template {
    /// The directory's template: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`, which is a text or
    /// a list of them by name, where `default` is taken.
    pub fn find(directory: &Path, files: &Files) -> Result<Option<Template>> {
        let path = directory.join(files::TEMPLATE);
        if let Some(bytes) = files::read(&path)? {
            let source = String::from_utf8(bytes).with_context(|| format!("{}: not UTF-8", path.display()))?;
            return Ok(Some(Template { path, source }));
        }
        let path = directory.join(files::TOKENIZER_CONFIG);
        let source = match files.config.get("chat_template") {
            None | Some(Json::Null) => return Ok(None),
            Some(Json::String(source)) => source.clone(),
            Some(Json::Array(named)) => {
                let default = named.iter().find(|template| template["name"] == "default");
                match default.and_then(|template| template["template"].as_str()) {
                    Some(source) => source.to_owned(),
                    None => {
                        let names: Vec<String> = named.iter().map(|template| template["name"].to_string()).collect();
                        let found = names.join(", ");
                        bail!("{}: chat_template: expected one named \"default\", found {found}", path.display())
                    }
                }
            }
            Some(_) => bail!("{}: chat_template: expected a text or a list of named texts", path.display()),
        };
        Ok(Some(Template { path, source }))
    }

    /// The text that it makes of variables.
    ///
    /// # Errors
    /// It is no template, or raises an error.
    pub fn render(&self, variables: &Map<String, Json>) -> Result<String> {
        // Jinja knows one kind of line end.
        let source = without_generation_tags(&self.source.replace("\r\n", "\n").replace('\r', "\n"));
        let environment = environment()?;
        let variables = Value::from(Serde(variables));
        // minijinja panics where a list without items is reversed by `[::-1]`; that ends no batch and no conversation.
        let rendered = catch_unwind(AssertUnwindSafe(|| environment.render_str(&source, variables)));
        let rendered = rendered.unwrap_or_else(|_| {
            let what = "the template engine failed; it cannot reverse a list without items by [::-1]";
            Err(Error::new(ErrorKind::InvalidOperation, what))
        });
        rendered.with_context(|| format!("chat template of {}", self.path.display()))
    }
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    python::teach(&mut environment);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |form: String| time::strftime_now(&form));
    Ok(environment)
}

/// A template without the tags `{% generation %}` and `{% endgeneration %}`, by which training finds the assistant's
/// words: they become a scope, which is what they are otherwise.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let word = tag.trim_start_matches(['-', '+']).trim_start();
        out.push_str(&tag[..tag.len() - word.len()]);
        rest = word;
        for (name, scope) in [("generation", "with"), ("endgeneration", "endwith")] {
            if let Some(after) = word.strip_prefix(name)
                && after.trim_start().trim_start_matches(['-', '+']).starts_with("%}")
            {
                out.push_str(scope);
                rest = after;
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;
    use serde_json::json;

    fn render(source: &str, variables: Json) -> Result<String> {
        let template = Template { path: "t".into(), source: source.to_owned() };
        template.render(variables.as_object().expect("an object"))
    }

    #[track_caller]
    fn renders(source: &str, variables: Json, expected: &str) {
        assert_eq!(render(source, variables).expect("it renders"), expected, "{source}");
    }

    #[test]
    fn blocks_leave_no_blank_lines() {
        renders(
            "{% for x in l %}\n    {% if x %}\n{{ x }}\n    {% endif %}\n{% endfor %}\nend\n",
            json!({"l": [1, 0, 2]}),
            "1\n2\nend",
        );
    }

    #[test]
    fn line_ends_are_all_the_same() {
        renders("{% if true %}\r\na\rb{{ x }}\r\n{% endif %}\r\n", json!({"x": "\r\n"}), "a\nb\r\n\n");
    }

    #[test]
    fn what_the_engine_cannot_do_is_an_error() {
        let error = render("{% for x in l[::-1] %}{{ x }}{% endfor %}", json!({"l": []})).expect_err("it panics");
        assert!(format!("{error:#}").contains("[::-1]"), "{error:#}");
        renders("{% for x in l[::-1] %}{{ x }}{% endfor %}", json!({"l": [1, 2]}), "21");
    }

    #[test]
    fn python_is_understood() {
        renders("{{ ' a '.strip() + 'b'.upper() }}{{ {'a': 1}.get('b', 2) }}", json!({}), "aB2");
        renders("{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}", json!({"d": {"z": 1, "a": 2}}), "z=1;a=2;");
        renders("{{ 'a</t>b</t>c'.split('</t>')[-1] }}{{ m[1:][0] }}{{ m[::-1][0] }}", json!({"m": [1, 2, 3]}), "c23");
        renders(
            "{% set ns = namespace(n=0) %}{% for x in l %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}",
            json!({"l": [1, 2]}),
            "3",
        );
        renders("{{ none }} {{ true }} {{ 1.0 }} {{ [1, 'a'] }}{{ missing }}", json!({}), "None True 1.0 [1, 'a']");
        renders("{{ x is defined and x is none }}{% if x is not string %}!{% endif %}", json!({"x": null}), "True!");
        renders("{% for x in l %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", json!({"l": [1, 2]}), "1");
        renders("{{ '<a&b>' }}", json!({}), "<a&b>");
    }

    #[test]
    fn json_is_as_python_writes_it() {
        let value = json!({"z": [1, 2.0, null, true], "a": {}, "t": "<\"é\u{1}\n>", "e": []});
        renders(
            "{{ v | tojson }}",
            json!({"v": value}),
            r#"{"z": [1, 2.0, null, true], "a": {}, "t": "<\"é\u0001\n>", "e": []}"#,
        );
        let lines = "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ]\n}";
        renders("{{ v | tojson(indent=2) }}", json!({"v": {"a": [1, {"b": 2}]}}), lines);
        renders(
            "{{ v | tojson(sort_keys=true, ensure_ascii=true) }}",
            json!({"v": {"b": "é😀", "a": 1}}),
            r#"{"a": 1, "b": "\u00e9\ud83d\ude00"}"#,
        );
        renders("{{ v | tojson(separators=(',', ':')) }}", json!({"v": {"b": [1, 2]}}), r#"{"b":[1,2]}"#);
    }

    #[test]
    fn tags_for_training_are_a_scope() {
        let source = "{% for x in l %}{%- generation -%} {{ x }} {%+ endgeneration %}\n{% endfor %}{% set generation = 1 %}{{ generation }}";
        renders(source, json!({"l": [1, 2]}), "1 2 1");
    }

    #[test]
    fn a_template_says_why_it_refuses() {
        let error = render("\n{{ raise_exception('roles must alternate') }}", json!({})).expect_err("it raises");
        let error = format!("{error:#}");
        assert!(error.contains("chat template of t") && error.contains("roles must alternate"), "{error}");
        let error = format!("{:#}", render("{% if %}", json!({})).expect_err("no template"));
        assert!(error.contains("syntax error"), "{error}");
        assert!(
            render("{{ strftime_now('%Y') }}", json!({})).expect("a year").parse::<u32>().expect("a number") > 2020
        );
    }

    #[test]
    fn a_file_goes_before_the_configuration() {
        let config = r#"{"chat_template": "config"}"#;
        let named =
            r#"{"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "named"}]}"#;
        let none = r#"{"chat_template": [{"name": "tool_use", "template": "x"}]}"#;
        let find = |entries: &[(&str, &str)]| -> Result<Option<String>> {
            let folder = fixture::folder(entries);
            let files = Files::read(folder.path())?.expect("it has a tokenizer");
            Ok(Template::find(folder.path(), &files)?.map(|template| template.source))
        };
        let jinja = ("chat_template.jinja", "file");
        assert_eq!(find(&[jinja, ("tokenizer_config.json", config)]).expect("found").as_deref(), Some("file"));
        assert_eq!(find(&[("tokenizer_config.json", config)]).expect("found").as_deref(), Some("config"));
        assert_eq!(find(&[("tokenizer_config.json", named)]).expect("found").as_deref(), Some("named"));
        assert_eq!(find(&[]).expect("nothing"), None);
        let error = find(&[("tokenizer_config.json", none)]).expect_err("no default").to_string();
        assert!(error.contains("\"default\"") && error.contains("tool_use"), "{error}");
    }
}
