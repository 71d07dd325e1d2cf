//! What is fuzzed: one line a target.

use std::sync::Arc;

use anyhow::{Context, ensure};
use lfm2c::codegen::compile::{CompileOptions, Silent, Source, compile};
use lfm2c::codegen::recipe::Recipe;
use lfm2c::ir::{Extents, verify};
use lfm2c::passes::Target as Lowered;
use lfm2c::passes::{plan_memory, schedule};
use lfm2c::plan::file::{Kind, seal};
use lfm2c::plan::{ALIGNMENT, Bucket, Manifest, Phase, PlanFile, Program};
use lfm2c::runtime::cpu::{CpuEnsemble, CpuExecutor, HostPool};
use lfm2c::runtime::weights::{Origin, Room, Transfer, fill_synthetic, parse_header};
use lfm2c::runtime::{Batch, Executor, SamplingParams};

use crate::mutate::{Random, Tokens, bytes};

/// A reader of files.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Valid inputs.
    pub seeds: fn() -> Vec<Seed>,
    /// Reads an input, and uses what was read as far as that is cheap.
    pub run: fn(&[u8]) -> Outcome,
}

/// All targets.
pub const TARGETS: [Target; 4] = [
    Target { name: "plan", seeds: plan_seeds, run: plan },
    Target { name: "ir", seeds: ir_seeds, run: ir },
    Target { name: "checkpoint", seeds: checkpoint_seeds, run: checkpoint },
    Target { name: "recipe", seeds: recipe_seeds, run: recipe },
];

/// What became of an input.
pub enum Outcome {
    /// It was read and used.
    Accepted,
    /// It was refused with an error.
    Rejected,
    /// It was read, but what follows from that did not hold.
    Broken(String),
}

/// A valid input: its text, and how a changed text becomes a file again.
pub struct Seed {
    text: Tokens,
    original: String,
    wrap: fn(&str) -> Vec<u8>,
}

impl Seed {
    fn new(text: &str, wrap: fn(&str) -> Vec<u8>) -> Self {
        Seed { text: Tokens::new(text), original: text.to_owned(), wrap }
    }

    /// The valid input itself.
    pub fn bytes(&self) -> Vec<u8> {
        (self.wrap)(&self.original)
    }

    /// A changed input: mostly its text, one time in eight its bytes.
    pub fn mutated(&self, random: &mut Random) -> Vec<u8> {
        match random.below(8) {
            0 => bytes(&self.bytes(), random),
            _ => (self.wrap)(&self.text.mutated(random)),
        }
    }
}

const DEMO: &str = include_str!("../../plans/synthetic.ron");
const GELU: &str = include_str!("../../plans/gelu.ir");
const SMALL: &str = include_str!("../../tests/data/small_manifest.ron");

/// Compiles a small LFM2 in few buckets, fused or not, for one rank.
fn compiled_demo(target: Lowered, disabled: &[&str]) -> PlanFile {
    compiled_ranks(1, target, disabled)
}

fn compiled_ranks(ranks: u64, target: Lowered, disabled: &[&str]) -> PlanFile {
    let options = CompileOptions {
        target,
        expert_ranks: ranks,
        without_cubins: true,
        prefill: Some(vec![8]),
        decode: Some(vec![1, 2]),
        max_sequences: Some(2),
        max_context: Some(64),
        kv_tokens: Some(128),
        disabled: disabled.iter().map(|name| (*name).to_owned()).collect(),
        ..CompileOptions::default()
    };
    let small = [
        ("vocab_size: 512", "vocab_size: 48"),
        ("hidden_size: 128", "hidden_size: 32"),
        ("num_hidden_layers: 6", "num_hidden_layers: 3"),
        (
            r#"["conv", "conv", "full_attention", "conv", "full_attention", "conv"]"#,
            r#"["conv", "full_attention", "conv"]"#,
        ),
        ("num_dense_layers: 2", "num_dense_layers: 1"),
    ];
    let small = small.into_iter().fold(DEMO.to_owned(), |text, (from, to)| text.replace(from, to));
    let mut recipe = Recipe::parse(&small).expect("the demo recipe is valid");
    recipe.prompt = Default::default();
    compile(&Source::Recipe(Box::new(recipe), None), &options, &Silent).expect("the demo compiles").file
}

fn compiled_gelu() -> PlanFile {
    let graph = GELU.replace("1000,3072", "4,8").parse().expect("the graph is valid");
    let source = Source::Graph("gelu".into(), Box::new(graph));
    compile(&source, &CompileOptions::default(), &Silent).expect("the graph compiles").file
}

/// A manifest under hashes that hold, with as many texts as the seeds need.
fn sealed(manifest: &str) -> Vec<u8> {
    let texts: [&[u8]; 6] = [b"graph @a () {\n  return\n}\n", b"b", b"c", b"d", b"e", b"f"];
    let mut sections = vec![(Kind::Manifest, manifest.as_bytes()), (Kind::Recipe, &b""[..])];
    sections.extend(texts.map(|text| (Kind::Text, text)));
    seal(&sections)
}

fn plan_seeds() -> Vec<Seed> {
    let mut texts = vec![SMALL.to_owned(), SMALL.to_owned(), compiled_gelu().manifest_text()];
    texts.push(compiled_demo(Lowered::Cpu, &[]).manifest_text());
    texts.push(compiled_demo(Lowered::Cpu, &["group-experts", "fuse-attention"]).manifest_text());
    texts.push(compiled_demo(Lowered::Sm90a, &[]).manifest_text());
    texts.push(compiled_ranks(2, Lowered::Cpu, &[]).manifest_text());
    texts.iter().map(|text| Seed::new(text, sealed)).collect()
}

fn plan(input: &[u8]) -> Outcome {
    let Ok(file) = PlanFile::from_bytes(input) else { return Outcome::Rejected };
    match PlanFile::from_bytes(&file.to_bytes()) {
        Ok(again) if again.to_bytes() == file.to_bytes() => {}
        Ok(_) => return Outcome::Broken("it is another plan after writing and reading".into()),
        Err(error) => return Outcome::Broken(format!("written again, it is refused: {error}")),
    }
    match execute(file.manifest) {
        Ok(()) => Outcome::Accepted,
        Err(error) => Outcome::Broken(format!("a valid plan does not run: {error:#}")),
    }
}

/// Plans beyond these sizes are not run: it would be slow, not wrong.
const MAX_POOL_BYTES: u64 = 1 << 26;
const MAX_ROWS: u64 = 1 << 10;

fn execute(manifest: Manifest) -> anyhow::Result<()> {
    let manifest = Arc::new(manifest);
    let mut ranks = vec![];
    for (rank, program) in manifest.ranks.iter().enumerate() {
        let large = |bucket: &Bucket| bucket.tokens > MAX_ROWS && bucket.phase != Phase::Fixed;
        if program.pool.bytes() > MAX_POOL_BYTES || program.buckets.iter().any(large) {
            return Ok(());
        }
        let mut pool = HostPool::new(program)?;
        fill_synthetic(&manifest, program, 1, pool.weights_mut(), &|_| {})?;
        // Devices load no weights of some indices.
        if manifest.experts.is_empty() {
            transfer(&manifest, program)?;
        }
        ranks.push(CpuExecutor::new(Arc::clone(&manifest), rank, pool)?.with_poison(true));
    }
    let mut executor = CpuEnsemble::new(ranks)?;
    for (at, bucket) in manifest.ranks[0].buckets.iter().enumerate() {
        if bucket.phase == Phase::Fixed {
            executor.run_steps(at)?;
        } else {
            language(&mut executor, at, bucket)?;
        }
    }
    Ok(())
}

/// What a device would put where: every element once, within its weight.
fn transfer(manifest: &Manifest, program: &Program) -> anyhow::Result<()> {
    let room = Room { part_bytes: 1 << 16, placed_bytes: 1 << 12 };
    let transfer = Transfer::new(manifest, program, Origin::Synthetic(1), room)?;
    let mut left: Vec<u64> = program.weights.iter().map(|weight| weight.ty.elements().unwrap_or(0)).collect();
    for span in transfer.parts().iter().flatten() {
        let weight = &program.weights[span.weight];
        let last = span.places.of(span.first + span.elements - 1);
        ensure!(Some(last) < weight.ty.elements(), "element {last} of weight {}", weight.name);
        let rest = left[span.weight].checked_sub(span.elements);
        left[span.weight] = rest.with_context(|| format!("too many elements for weight {}", weight.name))?;
    }
    ensure!(left.iter().all(|&elements| elements == 0), "elements of weights that nothing fills: {left:?}");
    Ok(())
}

/// One step of all the sequences that a bucket and the pages hold.
fn language(executor: &mut CpuEnsemble, at: usize, bucket: &Bucket) -> anyhow::Result<()> {
    let limits = executor.manifest().limits.clone();
    let sequences = bucket.sequences.min(limits.pages()) as i32;
    let each = (bucket.tokens / bucket.sequences).min(limits.max_context).min(limits.page_tokens);
    let each = if bucket.phase == Phase::Decode { 1 } else { each as i32 };
    let mut batch = Batch::default();
    for slot in 0..sequences {
        executor.set_pages(slot as u32, &[slot as u32])?;
        executor.set_sampling(slot as u32, SamplingParams { temperature: slot as f32, ..SamplingParams::default() })?;
        for position in 0..each {
            batch.tokens.push(0);
            batch.positions.push(position);
            batch.slots.push(slot);
        }
        batch.rows.push(batch.tokens.len() as i32 - 1);
    }
    executor.run(at, &batch)?;
    executor.logits(&mut vec![])?;
    executor.run_head(at, &batch.rows[..1])
}

fn ir_seeds() -> Vec<Seed> {
    let mut texts = compiled_ranks(2, Lowered::Cpu, &[]).texts;
    texts.extend(compiled_demo(Lowered::Cpu, &[]).texts);
    texts.extend(compiled_demo(Lowered::Cpu, &["group-experts", "fuse-shortconv", "fuse-pointwise"]).texts);
    texts.push(GELU.to_owned());
    texts.iter().map(|text| Seed::new(text, |text| text.as_bytes().to_vec())).collect()
}

fn ir(input: &[u8]) -> Outcome {
    let Ok(text) = std::str::from_utf8(input) else { return Outcome::Rejected };
    let Ok(parsed) = lfm2c::ir::parse(text) else { return Outcome::Rejected };
    let graph = parsed.graph;
    let printed = graph.to_string();
    match lfm2c::ir::parse(&printed) {
        Ok(again) if again.graph.to_string() == printed => {}
        Ok(_) => return Outcome::Broken("printing what was parsed from print gives other bytes".into()),
        Err(error) => return Outcome::Broken(format!("what was printed does not parse: {error}")),
    }
    if verify(&graph).is_err() {
        return Outcome::Rejected;
    }
    let mut schedule = schedule(&graph);
    // Sizes beyond 64 bits are refused here, because only a bucket gives them.
    match plan_memory(&graph, &mut schedule, &Extents { tokens: 8, sequences: 2, rows: 2 }, ALIGNMENT) {
        Ok(_) => Outcome::Accepted,
        Err(_) => Outcome::Rejected,
    }
}

fn checkpoint_seeds() -> Vec<Seed> {
    let header = r#"{"__metadata__":{"format":"pt"},
"model.embed_tokens.weight":{"dtype":"BF16","shape":[16,8],"data_offsets":[0,256]},
"model.layers.0.conv.conv.weight":{"dtype":"F32","shape":[8,1,3],"data_offsets":[256,352]},
"model.layers.0.feed_forward.experts.0.w1.weight":{"dtype":"F16","shape":[4,8],"data_offsets":[352,416]},
"model.layers.0.feed_forward.expert_bias":{"dtype":"F32","shape":[4],"data_offsets":[416,432]}}"#;
    let wrap = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &[0x3C; 432]].concat();
    vec![Seed::new(header, wrap)]
}

fn checkpoint(input: &[u8]) -> Outcome {
    let Ok(entries) = parse_header(input) else { return Outcome::Rejected };
    match entries.iter().find(|entry| input.get(entry.bytes.clone()).is_none()) {
        Some(entry) => Outcome::Broken(format!("tensor `{}` lies outside of the file", entry.name)),
        None => Outcome::Accepted,
    }
}

fn recipe_seeds() -> Vec<Seed> {
    let texts = [DEMO, include_str!("../../plans/lfm2-8b-a1b.ron")];
    texts.iter().map(|text| Seed::new(text, |text| text.as_bytes().to_vec())).collect()
}

fn recipe(input: &[u8]) -> Outcome {
    let Ok(text) = std::str::from_utf8(input) else { return Outcome::Rejected };
    let Ok(recipe) = Recipe::parse(text) else { return Outcome::Rejected };
    match recipe.to_text().map(|text| Recipe::parse(&text)) {
        Ok(Ok(again)) if again.to_text().ok() == recipe.to_text().ok() => {}
        other => return Outcome::Broken(format!("written again, it is not the same: {other:?}")),
    }
    // A description that names a directory would read whatever lies there.
    let unusable = recipe.directory().is_some() || recipe.config().is_err();
    if unusable { Outcome::Rejected } else { Outcome::Accepted }
}
