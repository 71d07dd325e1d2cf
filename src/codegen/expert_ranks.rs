//! Which rank has which experts, as `--ranks` asks for.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::codegen::compile::OptionError;
use crate::codegen::{CompileOptions, Source};
use crate::ir::config::{Config, FeedForward};
use crate::plan::ExpertCounts;

/// How even the work of ranks is: of all layers together, the rows of the busiest rank beside the mean of the ranks, at least 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Balance {
    /// With neighbours together, as without counts.
    pub neighbours: f64,
    /// As they are spread.
    pub placed: f64,
}

/// The experts of each rank, if they are to be spread over several: as even as can be, neighbours together, or by counts.
pub(super) fn expert_ranks(source: &Source, options: &CompileOptions) -> Result<(Vec<Vec<u64>>, Option<Balance>)> {
    let ranks = options.expert_ranks;
    if ranks == 1 {
        return Ok((vec![], None));
    }
    let refuse = |expected: String, found: &str, fix: &str| {
        Err(OptionError(format!("--ranks expert={ranks}: expected {expected}, found {found}; {fix}")).into())
    };
    let Source::Recipe(recipe, _) = source else {
        return refuse("a model".into(), "a graph in text form", "compile it without --ranks");
    };
    let config = recipe.config()?;
    let counts: BTreeSet<u64> = config
        .layers
        .iter()
        .filter_map(|layer| match &layer.feed_forward {
            FeedForward::Experts(experts) => Some(experts.count),
            FeedForward::Dense(_) => None,
        })
        .collect();
    let fix = "compile it without --ranks, and start any number of ranks, each with the whole model";
    match (counts.first(), counts.last()) {
        (Some(&experts), Some(&most)) if experts == most => {
            if ranks == 0 || ranks > experts {
                let expected = format!("1 to {experts} ranks, as many as the model has experts");
                return refuse(expected, &ranks.to_string(), "choose a number in between");
            }
            let first = |rank: u64| rank * experts / ranks;
            let neighbours = (0..ranks).map(|rank| (first(rank)..first(rank + 1)).collect()).collect();
            match &options.expert_counts {
                None => Ok((neighbours, None)),
                Some(path) => {
                    let counts = read(path, &config, experts as usize)
                        .with_context(|| format!("--expert-counts {}", path.display()))?;
                    let (placed, balance) = place(&neighbours, &counts.layers.into_values().collect::<Vec<_>>());
                    Ok((placed, Some(balance)))
                }
            }
        }
        (Some(few), Some(many)) => refuse("layers of as many experts each".into(), &format!("{few} to {many}"), fix),
        _ => refuse("a model with experts".into(), "none", fix),
    }
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
    if let Some((layer, found)) = counts.layers.iter().find(|(_, counts)| counts.len() != experts) {
        anyhow::bail!("{layer}: expected counts of {experts} experts, found {}; count again", found.len());
    }
    ensure!(counts.layers.values().flatten().any(|&count| count > 0), "expected choices, found none; run more tokens");
    Ok(counts)
}

/// Spreads experts, the same for all layers and as many on each rank as before, by exchanging two of them as long as the busiest ranks
/// of all layers together get fewer rows; of exchanges that are equally good, the first.
fn place(neighbours: &[Vec<u64>], layers: &[Vec<u64>]) -> (Vec<Vec<u64>>, Balance) {
    let ranks = neighbours.len();
    let mut rank_of: Vec<usize> = (0..ranks).flat_map(|rank| vec![rank; neighbours[rank].len()]).collect();
    let busiest = |rank_of: &[usize]| -> u128 {
        let of_layer = |counts: &Vec<u64>| {
            let mut rows = vec![0; ranks];
            counts.iter().zip(rank_of).for_each(|(&count, &rank)| rows[rank] += u128::from(count));
            rows.into_iter().max().unwrap_or(0)
        };
        layers.iter().map(of_layer).sum()
    };
    let before = busiest(&rank_of);
    let mut least = before;
    loop {
        let mut best = None;
        for a in 0..rank_of.len() {
            for b in (a + 1..rank_of.len()).filter(|&b| rank_of[a] != rank_of[b]) {
                let mut exchanged = rank_of.clone();
                exchanged.swap(a, b);
                let found = busiest(&exchanged);
                if found < least {
                    (least, best) = (found, Some(exchanged));
                }
            }
        }
        match best {
            Some(exchanged) => rank_of = exchanged,
            None => break,
        }
    }
    let all: u128 = layers.iter().flatten().map(|&count| u128::from(count)).sum();
    let beside_mean = |rows: u128| rows as f64 * ranks as f64 / all.max(1) as f64;
    let of_rank = |rank| (0..).zip(&rank_of).filter(|&(_, &found)| found == rank).map(|(expert, _)| expert).collect();
    let balance = Balance { neighbours: beside_mean(before), placed: beside_mean(least) };
    ((0..ranks).map(of_rank).collect(), balance)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evenly(experts: u64, ranks: u64) -> Vec<Vec<u64>> {
        (0..ranks).map(|rank| (rank * experts / ranks..(rank + 1) * experts / ranks).collect()).collect()
    }

    #[test]
    fn hot_experts_are_parted() {
        let (placed, balance) = place(&evenly(4, 2), &[vec![9, 7, 1, 3]]);
        assert_eq!(placed, [vec![1, 3], vec![0, 2]], "10 rows each");
        assert_eq!(balance, Balance { neighbours: 1.6, placed: 1.0 });
        // What is even stays.
        let (placed, balance) = place(&evenly(4, 2), &[vec![5, 5, 5, 5]]);
        assert_eq!((placed, balance), (evenly(4, 2), Balance { neighbours: 1.0, placed: 1.0 }));
        // One rank an expert: there is nothing to choose.
        assert_eq!(place(&evenly(3, 3), &[vec![9, 0, 0]]).1, Balance { neighbours: 3.0, placed: 3.0 });
    }

    #[test]
    fn layers_count_each_by_itself() {
        // In sum, every expert is chosen as often; in each layer, two are.
        let layers = [vec![8, 8, 0, 0], vec![0, 0, 8, 8]];
        let (placed, balance) = place(&evenly(4, 2), &layers);
        assert_eq!(balance, Balance { neighbours: 2.0, placed: 1.0 });
        assert!(placed.iter().all(|local| (local[0] < 2) && (local[1] >= 2)), "{placed:?}");
    }

    proptest::proptest! {
        #[test]
        fn every_expert_is_on_one_rank_and_no_rank_gets_more(
            layers in proptest::collection::vec(proptest::collection::vec(0u64..1000, 9), 1..4),
            ranks in 2u64..9,
        ) {
            let neighbours = evenly(9, ranks);
            let (placed, balance) = place(&neighbours, &layers);
            let sizes = |experts: &[Vec<u64>]| experts.iter().map(Vec::len).collect::<Vec<_>>();
            proptest::prop_assert_eq!(sizes(&placed), sizes(&neighbours));
            let mut all = placed.concat();
            all.sort_unstable();
            proptest::prop_assert_eq!(all, (0..9).collect::<Vec<u64>>());
            proptest::prop_assert!(placed.iter().all(|local| local.is_sorted()));
            proptest::prop_assert!(balance.placed <= balance.neighbours);
        }
    }
}
