//! `lfm2c dot`: draws the graph at any stage.

use std::io::Write;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail};

use crate::cli::draw::{DotOptions, dot, layer, svg};
use crate::cli::load::{self, Choices, find_bucket, has_extension, read_plan};
use crate::cli::output::keep_apart;
use crate::cli::usage;
use crate::codegen::compile::Observer;
use crate::codegen::{CompileOptions, Recipe, Source, compile};
use crate::ir::{self, Graph};
use crate::passes;
use crate::plan::PlanFile;

/// Draw the graph of a plan or recipe, at any stage of the pipeline, as Graphviz DOT or SVG.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A plan, a recipe (FILE.ron) or a graph in text form (FILE.ir)
    #[arg(value_name = "PLAN|RECIPE.ron")]
    input: Option<PathBuf>,
    /// A Hugging Face directory
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The stage: a pass, or `build` for the graph before all passes [default: the final graph]
    #[arg(long, value_name = "PASS")]
    after: Option<String>,
    /// The bucket, such as decode_1 or prefill_512 [default: the smallest decode bucket]
    #[arg(long, value_name = "NAME")]
    bucket: Option<String>,
    /// Draws only these layers, first to last, such as 2..3
    #[arg(long, value_name = "A..B", value_parser = parse_range)]
    layers: Option<RangeInclusive<u64>>,
    #[command(flatten)]
    choices: Choices,
    /// The file to write, .dot or .svg [default: DOT to standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// `2..3`: layers 2 and 3; `2`: layer 2.
fn parse_range(text: &str) -> Result<RangeInclusive<u64>, String> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("expected A..B, found `{text}`"));
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let range = number(first)?..=number(last)?;
    if range.is_empty() { Err(format!("expected A at most B, found `{text}`")) } else { Ok(range) }
}

/// Does it.
pub fn execute(arguments: &Arguments) -> Result<()> {
    keep_apart(&[("--output", arguments.output.as_deref())], &[arguments.input.as_deref()])?;
    let graph = graph(arguments)?;
    if let Some(layers) = &arguments.layers
        && !graph.ops.iter().any(|op| layer(&op.scope).is_some_and(|layer| layers.contains(&layer)))
    {
        let last = graph.ops.iter().filter_map(|op| layer(&op.scope)).max();
        let found = last.map_or("no layers".to_owned(), |last| format!("layers 0..{last}"));
        return usage(format!("--layers {}..{}: the graph has {found}", layers.start(), layers.end()));
    }
    let options = DotOptions { layers: arguments.layers.clone() };
    match &arguments.output {
        None => {
            std::io::stdout().lock().write_all(dot(&graph, &options).as_bytes())?;
        }
        Some(path) => {
            let drawing = if has_extension(path, "svg") {
                svg(&graph, &options)
            } else if has_extension(path, "dot") || has_extension(path, "gv") {
                dot(&graph, &options)
            } else {
                return usage(format!("-o {}: expected a name that ends in .dot or .svg", path.display()));
            };
            std::fs::write(path, drawing).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

fn graph(arguments: &Arguments) -> Result<Graph> {
    let from_plan = match &arguments.input {
        Some(path) if !has_extension(path, "ron") && !has_extension(path, "ir") => Some(read_plan(path)?),
        _ => None,
    };
    if from_plan.is_some() && (arguments.model.is_some() || arguments.choices.options() != Choices::default().options())
    {
        return usage("expected a plan alone: --model and choices of `lfm2c compile` are for what is not compiled yet");
    }
    match (&from_plan, &arguments.after) {
        (Some(file), None) => final_graph(file, arguments.bucket.as_deref()),
        (Some(file), Some(after)) => {
            if file.recipe.is_empty() {
                bail!(
                    "--after {after}: the plan was compiled from a graph and has no recipe; name the graph (FILE.ir) instead"
                );
            }
            let recipe = Recipe::parse(&file.recipe).context("the plan's recipe, to compile it again up to a pass")?;
            staged(&load::recipe_source(recipe)?, load::choices_of(&file.manifest), arguments, after)
        }
        (None, after) => {
            let source =
                load::source(arguments.input.as_deref(), arguments.model.as_deref(), arguments.choices.synthetic)?;
            match after {
                Some(after) => staged(&source, without_cubins(arguments)?, arguments, after),
                None => {
                    let compiled = load::compile_source(&source, &without_cubins(arguments)?)?;
                    final_graph(&compiled.file, arguments.bucket.as_deref())
                }
            }
        }
    }
}

fn final_graph(file: &PlanFile, bucket: Option<&str>) -> Result<Graph> {
    let buckets = &file.manifest.ranks[0].buckets;
    let names: Vec<&str> = buckets.iter().map(|bucket| bucket.name.as_str()).collect();
    let at = choose(&names, bucket)?;
    let text = file.texts.get(buckets[at].text as usize).ok_or_else(|| anyhow!("the bucket has no text"))?;
    Ok(ir::parse(text)?.graph)
}

/// A drawing needs no machine code.
fn without_cubins(arguments: &Arguments) -> Result<CompileOptions> {
    let options = match &arguments.input {
        Some(path) => arguments.choices.options_for(path)?,
        None => arguments.choices.options(),
    };
    Ok(CompileOptions { without_cubins: true, ..options })
}

/// The graph of a bucket as a pass left it.
fn staged(source: &Source, mut options: CompileOptions, arguments: &Arguments, after: &str) -> Result<Graph> {
    if after != "build" && !passes::names().contains(&after) {
        return usage(format!("--after {after}: expected `build` or one of {}", passes::names().join(", ")));
    }
    if after == "build" {
        options.stop_after_patch = Some(0);
    }
    let seen = Seen { after: after.to_owned(), graphs: Mutex::new(vec![]) };
    let compiled = compile(source, &options, &seen)?;
    if after == "build" {
        return final_graph(&compiled.file, arguments.bucket.as_deref());
    }
    let graphs = seen.graphs.into_inner().map_err(|_| anyhow!("a compiling thread failed"))?;
    if let [(None, graph)] = &graphs[..] {
        return Ok(graph.clone());
    }
    let buckets = compiled.buckets.iter().map(|bucket| bucket.name.as_str());
    let names: Vec<&str> =
        buckets.filter(|name| graphs.iter().any(|(bucket, _)| bucket.as_deref() == Some(name))).collect();
    let wanted = names[choose(&names, arguments.bucket.as_deref())?];
    let found = graphs.iter().find(|(bucket, _)| bucket.as_deref() == Some(wanted));
    found.map(|(_, graph)| graph.clone()).ok_or_else(|| anyhow!("the pass `{after}` did not run"))
}

struct Seen {
    after: String,
    graphs: Mutex<Vec<(Option<String>, Graph)>>,
}

impl Observer for Seen {
    fn pass(&self, bucket: Option<&str>, pass: &str, graph: &Graph) {
        if pass == self.after
            && let Ok(mut graphs) = self.graphs.lock()
        {
            graphs.push((bucket.map(str::to_owned), graph.clone()));
        }
    }
}

/// Position of the bucket of that name, or of the smallest decode bucket.
fn choose(names: &[&str], bucket: Option<&str>) -> Result<usize> {
    match bucket {
        None => Ok(names.iter().position(|name| name.starts_with("decode")).unwrap_or(0)),
        Some(bucket) => find_bucket(names, bucket),
    }
}
