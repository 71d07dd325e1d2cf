//! Which ranks get which experts, by how often each was chosen.

use std::cmp::Ordering;

/// How even the work of ranks is: of all layers together, the rows of the busiest rank beside the mean of the ranks, at least 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Balance {
    /// With neighbours together, as without counts.
    pub neighbours: f64,
    /// As they are spread.
    pub placed: f64,
    /// With replicas, if there may be any, each of which runs as many rows of its expert as another.
    pub replicated: Option<f64>,
}

/// What a choice counts, so that it can be divided evenly: by up to 16 ranks, and by more almost.
const CHOICE: u128 = 720_720;

/// Spreads experts, the same for all layers, over ranks that have these each, neighbours together, by how often each layer chose each.
///
/// First two of them are exchanged, so that each rank has as many as before, as long as the busiest ranks of all layers together get fewer
/// rows; of exchanges that are equally good, the first. Then ranks get up to `replicas` experts that others have, too, one at a time and
/// with further exchanges in the end, as far as that takes rows from the busiest ranks.
pub(super) fn place(neighbours: &[Vec<u64>], layers: &[Vec<u64>], replicas: u64) -> (Vec<Vec<u64>>, Balance) {
    let experts = neighbours.iter().map(Vec::len).sum();
    let mut holders = vec![vec![]; experts];
    for (rank, local) in neighbours.iter().enumerate() {
        local.iter().for_each(|&expert| holders[expert as usize].push(rank));
    }
    let mut placement = Placement { ranks: neighbours.len(), layers, holders };
    let all: u128 = layers.iter().flatten().map(|&count| u128::from(count)).sum();
    let beside_mean = |work: Work| work.busiest as f64 * neighbours.len() as f64 / (all.max(1) * CHOICE) as f64;
    let before = placement.work();
    placement.exchange();
    let placed = placement.work();
    let replicated = (replicas > 0).then(|| {
        placement.replicate(neighbours, replicas as usize);
        placement.exchange();
        beside_mean(placement.work())
    });
    let balance = Balance { neighbours: beside_mean(before), placed: beside_mean(placed), replicated };
    (placement.of_ranks(), balance)
}

/// What the ranks have to do.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Work {
    /// Rows of each layer's busiest rank, times [`CHOICE`].
    busiest: u128,
    /// Squares of the rows of all ranks: of two placements with ranks as busy, the more even one is nearer to a better one.
    squares: f64,
}

impl Work {
    fn cmp(&self, other: &Work) -> Ordering {
        self.busiest.cmp(&other.busiest).then(self.squares.total_cmp(&other.squares))
    }
}

struct Placement<'a> {
    ranks: usize,
    /// For each layer, how often it chose each expert.
    layers: &'a [Vec<u64>],
    /// For each expert, the ranks that have it, in no order.
    holders: Vec<Vec<usize>>,
}

impl Placement<'_> {
    fn work(&self) -> Work {
        let mut work = Work { busiest: 0, squares: 0.0 };
        let mut rows = vec![0u128; self.ranks];
        for counts in self.layers {
            rows.fill(0);
            for (&count, holders) in counts.iter().zip(&self.holders) {
                let each = u128::from(count) * CHOICE / holders.len() as u128;
                holders.iter().for_each(|&rank| rows[rank] += each);
            }
            work.busiest += rows.iter().max().copied().unwrap_or(0);
            work.squares += rows.iter().map(|&rows| (rows as f64).powi(2)).sum::<f64>();
        }
        work
    }

    /// Exchanges two experts of two ranks as long as the busiest ranks get fewer rows.
    fn exchange(&mut self) {
        let places = |holders: &[Vec<usize>]| -> Vec<(usize, usize)> {
            let of_expert = |(expert, ranks): (usize, &Vec<usize>)| (0..ranks.len()).map(move |at| (expert, at));
            holders.iter().enumerate().flat_map(of_expert).collect::<Vec<_>>()
        };
        let places = places(&self.holders);
        let mut least = self.work().busiest;
        loop {
            let mut best = None;
            for (i, &a) in places.iter().enumerate() {
                for &b in &places[i + 1..] {
                    if self.swap(a, b) {
                        let found = self.work().busiest;
                        if found < least {
                            (least, best) = (found, Some((a, b)));
                        }
                        self.swap(a, b);
                    }
                }
            }
            match best {
                Some((a, b)) => self.swap(a, b),
                None => break,
            };
        }
    }

    /// Exchanges the ranks of two places, each an expert and one of its holders, unless a rank had then the same expert twice.
    fn swap(&mut self, a: (usize, usize), b: (usize, usize)) -> bool {
        let (of_a, of_b) = (self.holders[a.0][a.1], self.holders[b.0][b.1]);
        if a.0 == b.0 || self.holders[a.0].contains(&of_b) || self.holders[b.0].contains(&of_a) {
            return false;
        }
        (self.holders[a.0][a.1], self.holders[b.0][b.1]) = (of_b, of_a);
        true
    }

    /// Gives ranks up to so many experts that others have, too, each time the one that makes the work most even; what takes no rows from the
    /// busiest ranks in the end is taken back.
    fn replicate(&mut self, neighbours: &[Vec<u64>], replicas: usize) {
        let mut room = vec![replicas; neighbours.len()];
        let (mut work, mut kept) = (self.work(), (self.work().busiest, self.holders.clone()));
        loop {
            let mut best = None;
            for expert in 0..self.holders.len() {
                for rank in (0..self.ranks).filter(|&rank| room[rank] > 0) {
                    if self.holders[expert].contains(&rank) {
                        continue;
                    }
                    self.holders[expert].push(rank);
                    let found = self.work();
                    self.holders[expert].pop();
                    if found.cmp(&work).is_lt() {
                        (work, best) = (found, Some((expert, rank)));
                    }
                }
            }
            let Some((expert, rank)) = best else { break };
            self.holders[expert].push(rank);
            room[rank] -= 1;
            if work.busiest < kept.0 {
                kept = (work.busiest, self.holders.clone());
            }
        }
        self.holders = kept.1;
    }

    /// The experts of each rank, ascending.
    fn of_ranks(&self) -> Vec<Vec<u64>> {
        let has = |rank: usize| self.holders.iter().zip(0..).filter(move |(ranks, _)| ranks.contains(&rank));
        (0..self.ranks).map(|rank| has(rank).map(|(_, expert)| expert).collect()).collect()
    }
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
        let (placed, found) = place(&evenly(4, 2), &[vec![9, 7, 1, 3]], 0);
        assert_eq!(placed, [vec![1, 3], vec![0, 2]], "10 rows each");
        assert_eq!(found, balance(1.6, 1.0, None));
        // What is even stays.
        let (placed, found) = place(&evenly(4, 2), &[vec![5, 5, 5, 5]], 1);
        assert_eq!((placed, found), (evenly(4, 2), balance(1.0, 1.0, Some(1.0))));
        // One rank an expert: there is nothing to choose.
        assert_eq!(place(&evenly(3, 3), &[vec![9, 0, 0]], 0).1, balance(3.0, 3.0, None));
    }

    #[test]
    fn layers_count_each_by_itself() {
        // In sum, every expert is chosen as often; in each layer, two are.
        let layers = [vec![8, 8, 0, 0], vec![0, 0, 8, 8]];
        let (placed, found) = place(&evenly(4, 2), &layers, 0);
        assert_eq!(found, balance(2.0, 1.0, None));
        assert!(placed.iter().all(|local| (local[0] < 2) && (local[1] >= 2)), "{placed:?}");
    }

    #[test]
    fn the_hottest_experts_get_replicas() {
        // 12 of 16 rows are those of one expert: half of them go elsewhere, and its neighbour is exchanged.
        let (placed, found) = place(&evenly(4, 2), &[vec![12, 2, 1, 1]], 1);
        assert_eq!(found, balance(1.75, 1.625, Some(1.0)));
        assert_eq!(placed.concat().iter().filter(|&&expert| expert == 0).count(), 2, "{placed:?}");
        // A third rank is as busy as the first until both have given of their rows.
        let (placed, found) = place(&evenly(3, 3), &[vec![6, 0, 6]], 1);
        assert_eq!((placed, found), (vec![vec![0], vec![0, 1], vec![2]], balance(1.5, 1.5, Some(1.5))));
        let (placed, found) = place(&evenly(3, 3), &[vec![6, 0, 6]], 2);
        assert_eq!((placed, found.replicated), (vec![vec![0], vec![0, 1, 2], vec![2]], Some(1.0)));
    }

    proptest::proptest! {
        #[test]
        fn every_expert_is_on_a_rank_and_no_rank_gets_more(
            layers in proptest::collection::vec(proptest::collection::vec(0u64..1000, 9), 1..4),
            ranks in 2u64..9,
            replicas in 0u64..3,
        ) {
            let neighbours = evenly(9, ranks);
            let (placed, balance) = place(&neighbours, &layers, replicas);
            for (local, neighbours) in placed.iter().zip(&neighbours) {
                let more = local.len() as u64 - neighbours.len() as u64;
                proptest::prop_assert!(more <= replicas, "{placed:?}");
                proptest::prop_assert!(local.is_sorted_by(|a, b| a < b), "{placed:?}");
            }
            let all: std::collections::BTreeSet<u64> = placed.concat().into_iter().collect();
            proptest::prop_assert!(all.into_iter().eq(0..9));
            proptest::prop_assert!(balance.placed <= balance.neighbours);
            proptest::prop_assert!(balance.replicated.is_none_or(|replicated| replicated <= balance.placed));
            proptest::prop_assert_eq!(balance.replicated.is_some(), replicas > 0);
        }
    }
}
