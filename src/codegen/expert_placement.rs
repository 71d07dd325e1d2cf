//! Which ranks get which experts, by how often each was chosen.

use rayon::prelude::*;

use crate::ir::TURNS;

/// How even the work of ranks is: of all layers together, the rows of the busiest rank beside the mean of the ranks, at least 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Balance {
    /// With neighbours together, as without counts.
    pub neighbours: f64,
    /// As they are spread.
    pub placed: f64,
    /// With replicas, if there may be any: if turns come up as often as each other.
    pub replicated: Option<f64>,
}

impl Balance {
    /// Of all layers, of which some have so many choices and are so even, others as the next says; at least one.
    pub(super) fn of_all(parts: &[(u64, Balance)]) -> Balance {
        let all = parts.iter().map(|(choices, _)| *choices).sum::<u64>().max(1) as f64;
        let mean = |of: fn(&Balance) -> Option<f64>| -> Option<f64> {
            parts.iter().map(|(choices, balance)| Some(*choices as f64 / all * of(balance)?)).sum()
        };
        Balance {
            neighbours: mean(|balance| Some(balance.neighbours)).unwrap_or(1.0),
            placed: mean(|balance| Some(balance.placed)).unwrap_or(1.0),
            replicated: mean(|balance| balance.replicated),
        }
    }
}

/// Experts as they are spread.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Placed {
    /// Of each rank, ascending; the same in all layers.
    pub(super) experts: Vec<Vec<u64>>,
    /// For each layer, each rank and each of its experts, the turns that it runs it at.
    pub(super) parts: Vec<Vec<Vec<(u64, u64)>>>,
    pub(super) balance: Balance,
}

/// A replica that takes less than this part of a rank's mean rows from the busiest ranks is not worth its memory.
const WORTH: f64 = 1e-3;
/// How often the replicas' rows of a layer are divided anew, each time one expert's by what ranks have of the others.
const ROUNDS: usize = 16;

/// Spreads experts, the same for all layers, over ranks that have these each, neighbours together, by how often each layer chose each.
///
/// First two of them are exchanged, so that each rank has as many as before, as long as the busiest ranks of all layers together get fewer
/// rows; of exchanges that are equally good, the first. Then ranks get up to `replicas` experts that others have, too, one after the other,
/// each time the one with which the ranks' rows are most even; what takes no rows from the busiest is left out in the end. In each layer,
/// ranks with the same expert share its rows as that layer needs it.
pub(super) fn place(neighbours: &[Vec<u64>], layers: &[Vec<u64>], replicas: u64) -> Placed {
    let experts = neighbours.iter().map(Vec::len).sum();
    let mut holders = vec![vec![]; experts];
    for (rank, local) in neighbours.iter().enumerate() {
        local.iter().for_each(|&expert| holders[expert as usize].push(rank));
    }
    let layers: Vec<Vec<f64>> =
        layers.iter().map(|counts| counts.iter().map(|&count| count as f64).collect()).collect();
    let mean = layers.iter().flatten().sum::<f64>() / neighbours.len() as f64;
    let mut placement = Placement { ranks: neighbours.len(), layers: &layers, holders };
    let beside_mean = |work: Work| work.busiest / mean.max(1.0);
    let before = placement.work();
    placement.exchange();
    let placed = placement.work();
    let replicated = (replicas > 0).then(|| {
        placement.replicate(replicas, mean * WORTH);
        beside_mean(placement.work())
    });
    let balance = Balance { neighbours: beside_mean(before), placed: beside_mean(placed), replicated };
    let experts = placement.of_ranks();
    let parts = layers.iter().map(|counts| placement.parts(counts, &experts)).collect();
    Placed { experts, parts, balance }
}

/// What the ranks have to do.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
struct Work {
    /// Rows of each layer's busiest rank.
    busiest: f64,
    /// Squares of the rows of all ranks: where another rank is as busy as the busiest, the way to fewer rows leads over fewer of one.
    squares: f64,
}

#[derive(Clone)]
struct Placement<'a> {
    ranks: usize,
    /// For each layer, how often it chose each expert.
    layers: &'a [Vec<f64>],
    /// For each expert, the ranks that have it, ascending.
    holders: Vec<Vec<usize>>,
}

impl Placement<'_> {
    fn work(&self) -> Work {
        let mut work = Work { busiest: 0.0, squares: 0.0 };
        for counts in self.layers {
            let (rows, _) = self.divide(counts);
            work.busiest += rows.iter().copied().fold(0.0, f64::max);
            work.squares += rows.iter().map(|rows| rows * rows).sum::<f64>();
        }
        work
    }

    /// A layer's rows of each rank, and those of each expert on each of the ranks that have it, as even as can be.
    fn divide(&self, counts: &[f64]) -> (Vec<f64>, Vec<Vec<f64>>) {
        let mut rows = vec![0.0; self.ranks];
        let mut shares = vec![vec![]; counts.len()];
        let shared: Vec<usize> = (0..counts.len()).filter(|&expert| self.holders[expert].len() > 1).collect();
        for (expert, ranks) in self.holders.iter().enumerate() {
            shares[expert] = vec![counts[expert] / ranks.len() as f64; ranks.len()];
            ranks.iter().zip(&shares[expert]).for_each(|(&rank, share)| rows[rank] += share);
        }
        for _ in 0..if shared.len() > 1 { ROUNDS } else { shared.len() } {
            for &expert in &shared {
                let ranks = &self.holders[expert];
                ranks.iter().zip(&shares[expert]).for_each(|(&rank, share)| rows[rank] -= share);
                let others: Vec<f64> = ranks.iter().map(|&rank| rows[rank]).collect();
                shares[expert] = fill(&others, counts[expert]);
                ranks.iter().zip(&shares[expert]).for_each(|(&rank, share)| rows[rank] += share);
            }
        }
        (rows, shares)
    }

    /// Exchanges two experts of two ranks as long as the busiest ranks get fewer rows; each is on one rank.
    fn exchange(&mut self) {
        let mut least = self.work().busiest;
        loop {
            let mut best = None;
            for a in 0..self.holders.len() {
                for b in (a + 1..self.holders.len()).filter(|&b| self.holders[a] != self.holders[b]) {
                    let mut exchanged = self.clone();
                    exchanged.holders.swap(a, b);
                    let found = exchanged.work().busiest;
                    if found < least {
                        (least, best) = (found, Some(exchanged));
                    }
                }
            }
            match best {
                Some(exchanged) => *self = exchanged,
                None => break,
            }
        }
    }

    /// Gives each rank up to so many more experts, as long as that takes at least `worth` rows from the busiest ranks.
    fn replicate(&mut self, replicas: u64, worth: f64) {
        let mut room = vec![replicas; self.ranks];
        let (mut all, mut work) = (self.clone(), self.work());
        let mut kept = work.busiest;
        loop {
            let candidates: Vec<(usize, usize)> = (0..self.holders.len())
                .flat_map(|expert| (0..self.ranks).map(move |rank| (expert, rank)))
                .filter(|&(expert, rank)| room[rank] > 0 && !all.holders[expert].contains(&rank))
                .collect();
            let found: Vec<Work> = candidates.par_iter().map(|&(expert, rank)| all.with(expert, rank).work()).collect();
            let mut best = None;
            for (found, candidate) in found.into_iter().zip(candidates) {
                if found < work {
                    (work, best) = (found, Some(candidate));
                }
            }
            let Some((expert, rank)) = best else { break };
            all = all.with(expert, rank);
            room[rank] -= 1;
            if work.busiest <= kept - worth {
                kept = work.busiest;
                self.holders.clone_from(&all.holders);
            }
        }
    }

    /// With an expert on one rank more.
    fn with(&self, expert: usize, rank: usize) -> Self {
        let mut more = self.clone();
        let ranks = &mut more.holders[expert];
        ranks.insert(ranks.partition_point(|&other| other < rank), rank);
        more
    }

    /// The experts of each rank, ascending.
    fn of_ranks(&self) -> Vec<Vec<u64>> {
        let has = |rank: usize| self.holders.iter().zip(0..).filter(move |(ranks, _)| ranks.contains(&rank));
        (0..self.ranks).map(|rank| has(rank).map(|(_, expert)| expert).collect()).collect()
    }

    /// For each rank and each of its experts, the turns that it runs it at in a layer: those of ranks with the same expert follow each other.
    fn parts(&self, counts: &[f64], experts: &[Vec<u64>]) -> Vec<Vec<(u64, u64)>> {
        let (_, shares) = self.divide(counts);
        let part = |rank: usize, expert: usize| {
            let (ranks, count) = (&self.holders[expert], counts[expert]);
            let end = |before: usize| match before {
                before if before == ranks.len() => TURNS,
                before if count == 0.0 => TURNS * before as u64 / ranks.len() as u64,
                before => (shares[expert][..before].iter().sum::<f64>() / count * TURNS as f64).round() as u64,
            };
            let at = ranks.iter().position(|&holder| holder == rank).unwrap_or(0);
            (end(at).min(TURNS), end(at + 1).min(TURNS))
        };
        let of_rank = |(rank, local): (usize, &Vec<u64>)| local.iter().map(|&e| part(rank, e as usize)).collect();
        experts.iter().enumerate().map(of_rank).collect()
    }
}

/// Divides so many rows among ranks that have these already, so that the busiest of them has as few as can be, then the next.
fn fill(rows: &[f64], mut more: f64) -> Vec<f64> {
    let mut ascending: Vec<f64> = rows.to_vec();
    ascending.sort_unstable_by(f64::total_cmp);
    let mut level = ascending[0];
    for (at, &next) in ascending.iter().enumerate().skip(1) {
        let up_to_next = (next - level) * at as f64;
        if up_to_next >= more {
            return rows.iter().map(|rows| (level + more / at as f64 - rows).max(0.0)).collect();
        }
        (level, more) = (next, more - up_to_next);
    }
    rows.iter().map(|rows| level + more / ascending.len() as f64 - rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evenly(experts: u64, ranks: u64) -> Vec<Vec<u64>> {
        (0..ranks).map(|rank| (rank * experts / ranks..(rank + 1) * experts / ranks).collect()).collect()
    }

    fn balance(neighbours: f64, placed: f64, replicated: Option<f64>) -> Balance {
        Balance { neighbours, placed, replicated }
    }

    #[test]
    fn hot_experts_are_parted() {
        let found = place(&evenly(4, 2), &[vec![9, 7, 1, 3]], 0);
        assert_eq!(found.experts, [vec![1, 3], vec![0, 2]], "10 rows each");
        assert_eq!(found.balance, balance(1.6, 1.0, None));
        // What is even stays, also where there is room for replicas.
        let found = place(&evenly(4, 2), &[vec![5, 5, 5, 5]], 1);
        assert_eq!((found.experts, found.balance), (evenly(4, 2), balance(1.0, 1.0, Some(1.0))));
        // One rank an expert: there is nothing to choose.
        assert_eq!(place(&evenly(3, 3), &[vec![9, 0, 0]], 0).balance, balance(3.0, 3.0, None));
    }

    #[test]
    fn layers_count_each_by_itself() {
        // In sum, every expert is chosen as often; in each layer, two are.
        let layers = [vec![8, 8, 0, 0], vec![0, 0, 8, 8]];
        let found = place(&evenly(4, 2), &layers, 0);
        assert_eq!(found.balance, balance(2.0, 1.0, None));
        assert!(found.experts.iter().all(|local| (local[0] < 2) && (local[1] >= 2)), "{found:?}");
    }

    #[test]
    fn a_stage_without_experts_has_neighbours_and_no_say() {
        let none = place(&evenly(4, 2), &[], 1);
        assert_eq!((none.experts, none.parts.len()), (evenly(4, 2), 0));
        let some = balance(1.5, 1.25, Some(1.0));
        assert_eq!(Balance::of_all(&[(0, none.balance), (16, some)]), some);
        // Where a stage has three times as many choices, it counts as much more.
        let all = Balance::of_all(&[(48, some), (16, balance(2.5, 1.25, Some(1.0)))]);
        assert_eq!(all, balance(1.75, 1.25, Some(1.0)));
    }

    #[test]
    fn the_hottest_experts_get_replicas() {
        // 12 of 16 rows are those of one expert, of which each layer gives the rank with the others as many as that has room for.
        let found = place(&evenly(4, 2), &[vec![12, 1, 2, 1], vec![12, 2, 2, 0]], 1);
        assert_eq!(found.balance, balance(1.6875, 1.5625, Some(1.0)));
        assert_eq!(found.experts, [vec![0, 1, 2], vec![0, 3]]);
        let (all, end) = ((0, 1024), |rows: u64| (rows * 1024 + 6) / 12);
        assert_eq!(found.parts[0], [vec![(0, end(5)), all, all], vec![(end(5), 1024), all]]);
        assert_eq!(found.parts[1], [vec![(0, end(4)), all, all], vec![(end(4), 1024), all]]);
        // Two ranks are as busy as each other, until both have given of their rows, here one by way of the other.
        let found = place(&evenly(3, 3), &[vec![6, 0, 6]], 1);
        assert_eq!(found.experts, [vec![0, 2], vec![0, 1], vec![2]]);
        assert!((found.balance.replicated.expect("there may be") - 1.0).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn rows_fill_the_emptiest_ranks_first() {
        assert_eq!(fill(&[5.0, 1.0, 2.0], 1.0), [0.0, 1.0, 0.0]);
        assert_eq!(fill(&[5.0, 1.0, 2.0], 5.0), [0.0, 3.0, 2.0]);
        assert_eq!(fill(&[5.0, 1.0, 2.0], 10.0), [1.0, 5.0, 4.0]);
        assert_eq!(fill(&[5.0, 1.0], 0.0), [0.0, 0.0]);
    }

    proptest::proptest! {
        #[test]
        fn every_choice_is_run_once_and_no_rank_gets_more_experts(
            layers in proptest::collection::vec(proptest::collection::vec(0u64..1000, 9), 1..4),
            ranks in 2u64..9,
            replicas in 0u64..3,
        ) {
            let neighbours = evenly(9, ranks);
            let Placed { experts, parts, balance } = place(&neighbours, &layers, replicas);
            for (local, neighbours) in experts.iter().zip(&neighbours) {
                proptest::prop_assert!((0..=replicas as usize).contains(&(local.len() - neighbours.len())), "{experts:?}");
                proptest::prop_assert!(local.is_sorted_by(|a, b| a < b), "{experts:?}");
            }
            for parts in &parts {
                for expert in 0..9 {
                    let all = parts.iter().flatten().zip(experts.iter().flatten());
                    let mut of_expert = all.filter(|(_, found)| **found == expert).map(|(part, _)| *part);
                    let end = of_expert.try_fold(0, |end, (from, to)| (end == from && from <= to).then_some(to));
                    proptest::prop_assert_eq!(end, Some(TURNS), "{:?}", parts);
                }
            }
            proptest::prop_assert!(balance.placed <= balance.neighbours);
            proptest::prop_assert!(balance.replicated.is_none_or(|replicated| replicated <= balance.placed + 1e-9));
            proptest::prop_assert_eq!(balance.replicated.is_some(), replicas > 0);
        }
    }
}
