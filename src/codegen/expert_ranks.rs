//! Which rank has which experts, as `--ranks` asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::slice::from_ref;

use anyhow::{Context, Result, ensure};

use crate::codegen::compile::OptionError;
use crate::codegen::expert_placement::{Balance, Placed, place};
use crate::codegen::{CompileOptions, Source};
use crate::ir::config::{Config, FeedForward};
use crate::passes::ExpertShare;
use crate::passes::pipeline_parallel::layer;
use crate::plan::ExpertCounts;

/// How experts are spread over ranks.
#[derive(Default)]
pub(super) struct Spread {
    /// Over those of each stage; of a model whose layers are not spread, there is one. None if one rank has all experts.
    stages: Vec<OfStage>,
    /// How even that is, if choices were counted.
    pub(super) balance: Option<Balance>,
}

/// How experts are spread over the ranks of a stage.
#[derive(Default)]
struct OfStage {
    /// Of each rank, ascending.
    experts: Vec<Vec<u64>>,
    /// If several ranks have the same, the turns that each rank runs each of its experts at, by the scope of a layer's operators.
    parts: BTreeMap<String, Vec<Vec<(u64, u64)>>>,
}

impl Spread {
    /// The experts of each rank of the group.
    pub(super) fn experts(&self) -> Vec<Vec<u64>> {
        self.stages.iter().flat_map(|stage| stage.experts.clone()).collect()
    }

    /// What a rank has; none if one rank has all experts.
    pub(super) fn share(&self, rank: usize) -> Option<ExpertShare> {
        let ranks = self.stages.first()?.experts.len();
        let (stage, rank) = (self.stages.get(rank / ranks)?, rank % ranks);
        let of = stage.experts.iter().flatten().max().map_or(0, |last| last + 1);
        let parts = stage.parts.iter().map(|(scope, parts)| (scope.clone(), parts[rank].clone())).collect();
        Some(ExpertShare { ranks: ranks as u64, of, local: stage.experts[rank].clone(), parts })
    }
}

/// The experts of each rank, if they are to be spread over several, in each of these stages of layers if there are such: as even as can be,
/// neighbours together, or by counts.
pub(super) fn expert_ranks(source: &Source, options: &CompileOptions, stages: &[Range<u64>]) -> Result<Spread> {
    let (ranks, replicas) = (options.expert_ranks, options.expert_replicas);
    let refuse_replicas = |expected: String, found: String, fix: &str| {
        Err(OptionError(format!("--expert-replicas {replicas}: expected {expected}, found {found}; {fix}")).into())
    };
    if replicas > 0 && (ranks == 1 || options.expert_counts.is_none()) {
        let expected =
            "--ranks expert=M of 2 or more, and --expert-counts FILE, which says what experts are hot".into();
        let counts = if options.expert_counts.is_some() { "counts" } else { "no counts" };
        return refuse_replicas(expected, format!("{ranks} rank(s) and {counts}"), "give both, or leave replicas out");
    }
    if ranks == 1 {
        let fault =
            "--expert-counts: expected --ranks expert=M of 2 or more, found 1 rank; give that, or leave the counts out";
        ensure!(options.expert_counts.is_none(), OptionError(fault.into()));
        return Ok(Spread::default());
    }
    let refuse = |expected: String, found: &str, fix: &str| {
        Err(OptionError(format!("--ranks expert={ranks}: expected {expected}, found {found}; {fix}")).into())
    };
    let Source::Recipe(recipe, _) = source else {
        return refuse("a model".into(), "a graph in text form", "compile it without --ranks");
    };
    let config = recipe.config()?;
    let of_layers = config.layers.iter().filter_map(|layer| match &layer.feed_forward {
        FeedForward::Experts(experts) => Some((experts.count, experts.per_token)),
        FeedForward::Dense(_) => None,
    });
    let (counts, per_token): (BTreeSet<u64>, BTreeSet<u64>) = of_layers.unzip();
    let fix = "compile it without --ranks, and start any number of ranks, each with the whole model";
    match (counts.first(), counts.last()) {
        (Some(&experts), Some(&most)) if experts == most => {
            if ranks == 0 || ranks > experts {
                let expected = format!("1 to {experts} ranks, as many as the model has experts");
                return refuse(expected, &ranks.to_string(), "choose a number in between");
            }
            let first = |rank: u64| rank * experts / ranks;
            let neighbours: Vec<Vec<u64>> = (0..ranks).map(|rank| (first(rank)..first(rank + 1)).collect()).collect();
            let others = experts - experts.div_ceil(ranks);
            if replicas > others {
                let expected = format!("at most {others}, with which a rank has all {experts} experts");
                return refuse_replicas(expected, replicas.to_string(), "choose a number up to that");
            }
            if replicas > 0 && per_token.first() == Some(&1) {
                let expected = "rows that choose several experts each, whose weights say whose turn it is".into();
                return refuse_replicas(expected, "one expert a row".into(), "leave replicas out");
            }
            let all_layers = 0..u64::MAX;
            let stages = if stages.is_empty() { from_ref(&all_layers) } else { stages };
            match &options.expert_counts {
                None => {
                    let evenly = || OfStage { experts: neighbours.clone(), ..OfStage::default() };
                    Ok(Spread { stages: stages.iter().map(|_| evenly()).collect(), balance: None })
                }
                Some(path) => {
                    let counts = read(path, &config, experts as usize)
                        .with_context(|| format!("--expert-counts {}", path.display()))?;
                    let (stages, found): (Vec<OfStage>, Vec<(u64, Balance)>) =
                        stages.iter().map(|stage| by_counts(&counts, stage, &neighbours, replicas)).unzip();
                    Ok(Spread { stages, balance: Some(Balance::of_all(&found)) })
                }
            }
        }
        (Some(few), Some(many)) => refuse("layers of as many experts each".into(), &format!("{few} to {many}"), fix),
        _ => refuse("a model with experts".into(), "none", fix),
    }
}

/// Spreads a stage's experts over its ranks by the counts of its layers: with that, how many choices these are, and how even it is.
fn by_counts(
    counts: &ExpertCounts,
    stage: &Range<u64>,
    neighbours: &[Vec<u64>],
    replicas: u64,
) -> (OfStage, (u64, Balance)) {
    let own = counts.layers.iter().filter(|(scope, _)| layer(scope).is_some_and(|layer| stage.contains(&layer)));
    let (scopes, layers): (Vec<String>, Vec<Vec<u64>>) =
        own.map(|(scope, counts)| (scope.clone(), counts.clone())).unzip();
    let Placed { experts, parts, balance } = place(neighbours, &layers, replicas);
    let shared = experts.iter().map(Vec::len).sum::<usize>() > neighbours.iter().map(Vec::len).sum();
    let parts = if shared { scopes.into_iter().zip(parts).collect() } else { BTreeMap::new() };
    (OfStage { experts, parts }, (layers.iter().flatten().sum(), balance))
}

/// Reads counts of the model's experts.
fn read(path: &Path, config: &Config, experts: usize) -> Result<ExpertCounts> {
    let counts: ExpertCounts = serde_json::from_slice(&std::fs::read(path)?)
        .context("expected what `lfm2c run --count-experts` writes; write it again")?;
    let (expected, found) = (config.hash(), &counts.config_hash);
    ensure!(
        expected == *found,
        "expected counts of this model, whose configuration is {expected:.12}, found {found:.12}; count with this model"
    );
    let expected =
        config.layers.iter().enumerate().filter(|(_, layer)| matches!(layer.feed_forward, FeedForward::Experts(_)));
    let expected: BTreeSet<String> = expected.map(|(i, _)| format!("layers.{i}.ffn")).collect();
    let found = counts.layers.keys().cloned().collect();
    if let Some(layer) = expected.symmetric_difference(&found).next() {
        let (yes, no) = if found.contains(layer) { ("no counts", "some") } else { ("counts", "none") };
        anyhow::bail!("{layer}: expected {yes}, found {no}; count again");
    }
    if let Some((layer, found)) = counts.layers.iter().find(|(_, counts)| counts.len() != experts) {
        anyhow::bail!("{layer}: expected counts of {experts} experts, found {}; count again", found.len());
    }
    ensure!(counts.layers.values().flatten().any(|&count| count > 0), "expected choices, found none; run more tokens");
    Ok(counts)
}
