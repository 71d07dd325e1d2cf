//! Which ranks have which layers, as `--ranks pipeline=K` asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anyhow::Result;

use crate::codegen::compile::OptionError;
use crate::codegen::{CompileOptions, Source};
use crate::ir::{Extents, Graph, Operand};
use crate::passes::pipeline_parallel::layer;

/// The layers of each stage, if they are to be spread over ranks: neighbours, such that the stage whose layers have most bytes of weights
/// has as few as can be, and the others as even as that allows.
pub(super) fn pipeline_ranks(source: &Source, options: &CompileOptions, graph: &Graph) -> Result<Vec<Range<u64>>> {
    let ranks = options.pipeline_ranks;
    if ranks == 1 {
        return Ok(vec![]);
    }
    let refuse = |expected: String, found: &str, fix: &str| {
        Err(OptionError(format!("--ranks pipeline={ranks}: expected {expected}, found {found}; {fix}")).into())
    };
    if !matches!(source, Source::Recipe(..)) {
        return refuse("a model".into(), "a graph in text form", "compile it without --ranks");
    }
    if options.forced_routing {
        return refuse("routers that choose experts".into(), "--forced-routing", "compile it without --ranks");
    }
    let layers = layer_bytes(graph);
    let count = layers.len() as u64;
    if ranks == 0 || ranks > count {
        let expected = format!("1 to {count} stages, as many as the model has layers");
        return refuse(expected, &ranks.to_string(), "choose a number in between");
    }
    Ok(even(&layers, ranks as usize))
}

/// The bytes of each layer's weights.
fn layer_bytes(graph: &Graph) -> Vec<u64> {
    let mut weights: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
    for op in &graph.ops {
        if let Some(layer) = layer(&op.scope) {
            let taken = op
                .operands
                .iter()
                .filter_map(|operand| if let Operand::Weight(id) = operand { Some(id.0) } else { None });
            weights.entry(layer).or_default().extend(taken);
        }
    }
    let unbound = Extents { tokens: 1, sequences: 1, rows: 1 };
    let bytes = |id: &u32| graph.weights[*id as usize].ty.bytes(&unbound).unwrap_or(0);
    weights.values().map(|ids| ids.iter().map(bytes).sum()).collect()
}

/// Layers in so many runs, none empty, of which the heaviest is as light as can be; of those, the ones with the least sum of squares.
fn even(layers: &[u64], runs: usize) -> Vec<Range<u64>> {
    let weigh = |first: usize, end: usize| layers[first..end].iter().map(|&bytes| u128::from(bytes)).sum::<u128>();
    // For so many first layers: the heaviest run, where they are one run, two, ...
    let mut heaviest: Vec<u128> = (0..=layers.len()).map(|end| weigh(0, end)).collect();
    for run in 1..runs {
        let with = |first: usize, end: usize| heaviest[first].max(weigh(first, end));
        let least = |end: usize| (run..end).map(|first| with(first, end)).min();
        heaviest = (0..=layers.len()).map(|end| least(end).unwrap_or(u128::MAX)).collect();
    }
    let limit = heaviest[layers.len()];
    // Again, the sum of squares (of KiB, to stay small) and the runs themselves, as far as none is heavier than that.
    let mut best: Vec<Option<(u128, Vec<Range<u64>>)>> = vec![None; layers.len() + 1];
    best[0] = Some((0, vec![]));
    for _ in 0..runs {
        let with = |first: usize, end: usize| {
            let (squares, stages) = best[first].as_ref()?;
            let own = weigh(first, end);
            let square = (own >> 10).saturating_mul(own >> 10);
            (own <= limit).then(|| (squares.saturating_add(square), first, stages))
        };
        let least = |end: usize| {
            let (squares, first, stages) =
                (0..end).filter_map(|first| with(first, end)).min_by_key(|found| (found.0, found.1))?;
            let last = first as u64..end as u64;
            Some((squares, stages.iter().cloned().chain([last]).collect()))
        };
        best = (0..=layers.len()).map(least).collect();
    }
    best.pop().flatten().map(|(_, stages)| stages).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(layers: &[u64], runs: usize) -> Vec<u64> {
        even(layers, runs).into_iter().map(|run| run.end).collect()
    }

    #[test]
    fn the_heaviest_is_as_light_as_can_be_and_the_others_even() {
        const K: u64 = 1 << 12;
        assert_eq!(ends(&[K; 6], 3), [2, 4, 6]);
        assert_eq!(ends(&[K; 3], 3), [1, 2, 3]);
        assert_eq!(ends(&[K; 3], 1), [3]);
        assert_eq!(ends(&[9 * K, K, K, K, K], 3), [1, 3, 5], "9, 2, 2: as even as the first allows");
        assert_eq!(ends(&[K, K, 2 * K, 2 * K], 2), [2, 4], "2 and 4, as 4 and 2 would be");
    }

    proptest::proptest! {
        #[test]
        fn no_other_runs_are_lighter(layers in proptest::collection::vec(0u64..50, 1..9), runs in 1usize..9) {
            let runs = runs.min(layers.len());
            let found = even(&layers, runs);
            let follow = found.iter().map(|run| run.start).eq(std::iter::once(0).chain(found.iter().map(|run| run.end)).take(runs));
            proptest::prop_assert!(follow && found.iter().all(|run| !run.is_empty()) && found.len() == runs, "{:?}", found);
            proptest::prop_assert_eq!(found[runs - 1].end, layers.len() as u64);
            let weigh = |run: Range<usize>| layers[run].iter().sum::<u64>();
            let most = found.iter().map(|run| weigh(run.start as usize..run.end as usize)).max();
            // All ways to cut: a bit for each gap.
            let gaps = layers.len() - 1;
            let ways = (0..1u32 << gaps).filter(|cuts| cuts.count_ones() as usize == runs - 1);
            let least = ways.map(|cuts| {
                let ends: Vec<usize> = (0..gaps).filter(|gap| cuts >> gap & 1 == 1).map(|gap| gap + 1).chain([layers.len()]).collect();
                let firsts = std::iter::once(0).chain(ends.iter().copied());
                firsts.zip(&ends).map(|(first, &end)| weigh(first..end)).max()
            });
            proptest::prop_assert_eq!(most, least.min().flatten());
        }
    }
}
