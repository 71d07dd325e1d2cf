//! Runs every `tests/filetests/**/*.ir` as a test of its own; `tests/filetests/README.md` describes the files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lfm2c::ir::{Extents, Graph, parse, verify};
use lfm2c::passes::{BucketSpec, Driver, ExpertShare, LayerShare, PassContext, Phase, Target, find};
use libtest_mimic::{Arguments, Failed, Trial};

/// Set to 1, expectations are rewritten to what is found.
const BLESS: &str = "LFM2C_BLESS";

/// The line between a graph and what is expected of it.
const EXPECT: &str = "; expect";

/// What begins the expectation of an error, at the end of the line that it is found on.
const ERROR: &str = "; error:";

fn main() {
    let arguments = Arguments::from_args();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests");
    let mut files = vec![];
    if let Err(error) = collect(&root, &mut files) {
        eprintln!("cannot list {}: {error}", root.display());
        std::process::exit(1);
    }
    files.sort();
    let trials = files.into_iter().map(|path| {
        let name = path.strip_prefix(&root).unwrap_or(&path).with_extension("").to_string_lossy().replace('\\', "/");
        Trial::test(name, move || run_file(&path).map_err(Failed::from))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "ir") {
            files.push(path);
        }
    }
    Ok(())
}

/// The one place that knows how passes are looked up and driven.
fn run_pass(name: &str, mut graph: Graph, context: &PassContext) -> Result<Graph, String> {
    let pass = find(name).ok_or_else(|| format!("unknown pass `{name}`"))?;
    let mut driver = Driver::new(&[], None, |_, _| ()).map_err(|error| error.to_string())?;
    driver.run_pass(pass, &mut graph, context).map_err(|error| error.to_string())?;
    Ok(graph)
}

enum Test {
    ParseError,
    Verify,
    Print,
    Pass(String, PassContext),
}

fn run_file(path: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let bless = std::env::var(BLESS).is_ok_and(|value| value == "1");
    let outcome = match header(&text)? {
        Test::ParseError => check_errors(&text, &parse_errors(&text)?, bless)?,
        Test::Verify => check_errors(&text, &verify_errors(&text)?, bless)?,
        Test::Print => check_graph(&text, printed, bless)?,
        Test::Pass(name, context) => {
            check_graph(&text, |graph| Ok(verified(run_pass(&name, graph, &context)?)?.to_string()), bless)?
        }
    };
    match outcome {
        Some(new) => std::fs::write(path, new).map_err(|error| format!("{}: {error}", path.display())),
        None => Ok(()),
    }
}

/// Reads the one `; test: ...` line.
fn header(text: &str) -> Result<Test, String> {
    let mut tests = text.lines().filter_map(|line| line.strip_prefix("; test:"));
    let (Some(test), None) = (tests.next(), tests.next()) else {
        return Err("expected one line `; test: verify|print|parse-error|pass NAME ...`".into());
    };
    let test = test.split(ERROR).next().unwrap_or(test);
    let mut words = test.split_whitespace();
    let test = match (words.next(), words.clone().next()) {
        (Some("parse-error"), None) => Test::ParseError,
        (Some("verify"), None) => Test::Verify,
        (Some("print"), None) => Test::Print,
        (Some("pass"), Some(name)) => {
            words.next();
            Test::Pass(name.to_owned(), pass_context(words)?)
        }
        _ => return Err(format!("unknown test `{}`", test.trim())),
    };
    Ok(test)
}

fn pass_context<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<PassContext, String> {
    let extents = Extents { tokens: 1, sequences: 1, rows: 1 };
    let bucket = BucketSpec { phase: Phase::Fixed, extents };
    let mut context = PassContext { target: Target::Cpu, bucket, experts: None, layers: None };
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("`{word}` needs a value"))?;
        match (word, value) {
            ("decode" | "prefill", tokens) => {
                let tokens =
                    tokens.parse().map_err(|_| format!("`{word}` needs a number of rows, found `{tokens}`"))?;
                let phase = if word == "decode" { Phase::Decode } else { Phase::Prefill };
                context.bucket = BucketSpec { phase, extents: Extents { tokens, sequences: tokens, rows: tokens } };
            }
            ("target", "cpu") => context.target = Target::Cpu,
            ("experts", share) => context.experts = Some(expert_share(share)?),
            ("layers", share) => context.layers = Some(layer_share(share)?),
            ("target", "sm_90a") => context.target = Target::Sm90a,
            _ => return Err(format!("unknown option `{word} {value}`")),
        }
    }
    Ok(context)
}

/// `4,5/8@2`: experts 4 and 5 of 8, which 2 ranks share. `4,5=0..512/8@2`: expert 5 at these turns alone.
fn expert_share(text: &str) -> Result<ExpertShare, String> {
    let mut parts = vec![];
    let mut expert = |text: &str| -> Option<u64> {
        let (expert, (from, to)) = match text.split_once('=') {
            Some((expert, part)) => (expert, part.split_once("..")?),
            None => (text, ("0", "1024")),
        };
        parts.push((from.parse().ok()?, to.parse().ok()?));
        expert.parse().ok()
    };
    let mut share = || {
        let (local, rest) = text.split_once('/')?;
        let (of, ranks) = rest.split_once('@')?;
        let local = local.split(',').map(&mut expert).collect::<Option<_>>()?;
        Some(ExpertShare { ranks: ranks.parse().ok()?, of: of.parse().ok()?, local, parts: BTreeMap::new() })
    };
    let mut share = share().ok_or_else(|| format!("`experts`: expected such as `4,5/8@2`, found `{text}`"))?;
    if text.contains('=') {
        share.parts.insert(String::new(), parts);
    }
    Ok(share)
}

/// `1@2,3,1`: rank 1 of three, whose stages have 2, 3 and 1 layers; `3@1,1/2`: rank 3 of two stages with a layer each, on two ranks each.
fn layer_share(text: &str) -> Result<LayerShare, String> {
    let parts = || {
        let (rank, rest) = text.split_once('@')?;
        let (counts, width) = rest.split_once('/').unwrap_or((rest, "1"));
        let mut end = 0;
        let stage = |count: &str| {
            let first = end;
            end += count.parse::<u64>().ok()?;
            Some(first..end)
        };
        let stages = counts.split(',').map(stage).collect::<Option<_>>()?;
        Some(LayerShare { rank: rank.parse().ok()?, width: width.parse().ok()?, stages })
    };
    parts().ok_or_else(|| format!("`layers`: expected such as `1@2,3,1`, found `{text}`"))
}

/// An error as (line, message).
type Found = (usize, String);

fn parse_errors(text: &str) -> Result<Vec<Found>, String> {
    match parse(text) {
        Ok(_) => Ok(vec![]),
        Err(error) if !error.to_string().contains('^') => Err(format!("the error shows no place: {error}")),
        Err(error) => Ok(vec![(error.line, error.message)]),
    }
}

fn verify_errors(text: &str) -> Result<Vec<Found>, String> {
    let parsed = parse(text).map_err(|error| error.to_string())?;
    let Err(errors) = verify(&parsed.graph) else { return Ok(vec![]) };
    let line = |location| parsed.lines.line(location).ok_or_else(|| format!("{location:?} has no line"));
    errors.faults.into_iter().map(|fault| Ok((line(fault.location)?, fault.message))).collect()
}

/// Compares the errors with the annotations; the new text if it is to be blessed.
fn check_errors(text: &str, found: &[Found], bless: bool) -> Result<Option<String>, String> {
    let mut faults = vec![];
    let mut expected = vec![];
    for (at, line) in text.lines().enumerate() {
        expected.extend(line.split(ERROR).skip(1).map(|message| (at + 1, message.trim())));
    }
    for (line, message) in found {
        if !expected.iter().any(|(at, part)| at == line && message.contains(part)) {
            faults.push(format!("line {line}: not annotated: {message}"));
        }
    }
    for (line, part) in &expected {
        if part.is_empty() || !found.iter().any(|(at, message)| at == line && message.contains(part)) {
            faults.push(format!("line {line}: not found: {part}"));
        }
    }
    if faults.is_empty() {
        return Ok(None);
    }
    if !bless {
        return Err(format!("{}\n{BLESS}=1 rewrites the annotations", faults.join("\n")));
    }
    let mut new = String::new();
    for (at, line) in text.lines().enumerate() {
        new += line.split(ERROR).next().unwrap_or("").trim_end();
        for (_, message) in found.iter().filter(|(line, _)| *line == at + 1) {
            new += &format!(" {ERROR} {message}");
        }
        new += "\n";
    }
    Ok(Some(new))
}

fn verified(graph: Graph) -> Result<Graph, String> {
    verify(&graph).map(|()| graph).map_err(|errors| errors.to_string())
}

fn printed(graph: Graph) -> Result<String, String> {
    let text = graph.to_string();
    let again = parse(&text).map_err(|error| format!("what was printed is not read:\n{error}"))?;
    if again.graph.to_string() != text || again.graph != graph {
        return Err(format!("what was printed is read as another graph:\n{text}{}", again.graph));
    }
    Ok(text)
}

/// Compares the text of a graph after `change` with the expected one; the new text if it is to be blessed.
fn check_graph(
    text: &str,
    change: impl FnOnce(Graph) -> Result<String, String>,
    bless: bool,
) -> Result<Option<String>, String> {
    let lines = || text.split_inclusive('\n');
    let separator = lines().position(|line| line.trim_end() == EXPECT || line.starts_with("; expect "));
    let source: String = lines().take(separator.unwrap_or(usize::MAX)).collect();
    let graph = verified(parse(&source).map_err(|error| error.to_string())?.graph)?;
    let unchanged = match separator.and_then(|at| lines().nth(at)).map(str::trim_end) {
        Some("; expect unchanged") => true,
        Some(EXPECT) | None => false,
        Some(other) => return Err(format!("`{other}`: expected `{EXPECT}` or `{EXPECT} unchanged`")),
    };
    let before = graph.to_string();
    let found = change(graph)?;
    let expected = if unchanged { before } else { lines().skip(separator.unwrap_or(usize::MAX)).skip(1).collect() };
    if found == expected.trim_start_matches('\n') {
        return Ok(None);
    }
    if bless {
        return Ok(Some(format!("{}\n\n{EXPECT}\n{found}", source.trim_end())));
    }
    let first = found.lines().zip(expected.trim_start_matches('\n').lines()).take_while(|(a, b)| a == b).count();
    let differing = |text: &str| text.lines().nth(first).unwrap_or("(nothing)").to_owned();
    let expected_line = differing(expected.trim_start_matches('\n'));
    let found_line = differing(&found);
    Err(format!(
        "line {} of the graph: expected\n{expected_line}\nfound\n{found_line}\n\nthe whole graph found:\n{found}\n{BLESS}=1 rewrites the expectation",
        first + 1
    ))
}
