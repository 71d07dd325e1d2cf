//! Which of the GPUs that it sees a rank opens, among the ranks of its host.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::runtime::group::{Group, tell};

/// More ranks on a host than may open its GPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error(
    "GPUs: expected one for each{} of the {ranks} ranks on this host, found {gpus}{}; {}let ranks see more of its GPUs, or use --device cpu",
    of_several(*.per_gpu), seen_by(self), start_fewer(self)
)]
pub struct TooFewGpus {
    /// Ranks on the host that need one.
    pub ranks: usize,
    /// GPUs that they see, all of them together.
    pub gpus: usize,
    /// Ranks that may open the same one.
    pub per_gpu: usize,
}

fn of_several(per_gpu: usize) -> String {
    if per_gpu == 1 { String::new() } else { format!(" {per_gpu}") }
}

/// Where there are enough, and yet not for each what it sees.
fn seen_by(few: &TooFewGpus) -> &'static str {
    if few.is_enough() { ", of which some ranks see the same ones alone" } else { "" }
}

fn start_fewer(few: &TooFewGpus) -> String {
    let most = few.gpus * few.per_gpu;
    let start = format!("start at most {most} a host (Open MPI: `mpirun --map-by ppr:{most}:node`), ");
    if few.is_enough() { String::new() } else { start }
}

impl TooFewGpus {
    fn is_enough(&self) -> bool {
        self.ranks <= self.gpus * self.per_gpu
    }
}

/// What a rank tells the others of its host.
#[derive(Serialize, Deserialize)]
struct Seen {
    /// The GPUs, by names that no two have.
    gpus: Vec<String>,
    per_gpu: usize,
}

/// The GPU of this rank, as a position in the list of those that it sees, each by a name that no other GPU has; 0 where that is empty, because
/// it needs none. Ranks may see all GPUs of the host or each its own; up to `per_gpu` of them get the same. All ranks of the host call it.
///
/// # Errors
/// There are too few, the ranks were told another `per_gpu`, or one of them is no more.
pub fn own_gpu(host: &mut dyn Group, gpus: Vec<String>, per_gpu: usize) -> Result<usize> {
    let told = tell(host, &Seen { gpus, per_gpu })?;
    for (rank, other) in told.iter().enumerate() {
        ensure!(
            other.per_gpu == told[0].per_gpu,
            "--ranks-per-gpu: expected {} on rank {rank} of the host, as on its first, found {}; give all ranks the same options",
            told[0].per_gpu,
            other.per_gpu
        );
    }
    let lists: Vec<Vec<String>> = told.into_iter().map(|seen| seen.gpus).collect();
    Ok(assign(&lists, per_gpu)?[host.rank()])
}

/// For each rank that sees these GPUs the position of its own: in the order of ranks, the first of those in its list that fewest have taken. So ranks
/// that see the same have them in their order, and ranks that see others each have their own. Where all of a list are taken, ranks before give way
/// to others that they see.
fn assign(lists: &[Vec<String>], per_gpu: usize) -> Result<Vec<usize>, TooFewGpus> {
    let mut own: Vec<Option<usize>> = vec![None; lists.len()];
    for rank in (0..lists.len()).filter(|&rank| !lists[rank].is_empty()) {
        if !take(rank, lists, per_gpu, &mut own, &mut BTreeSet::new()) {
            // All ranks of the host say so, not only those that would have none: which are told does not depend on who is first.
            let ranks = lists.iter().filter(|list| !list.is_empty()).count();
            let gpus = lists.iter().flatten().collect::<BTreeSet<_>>().len();
            return Err(TooFewGpus { ranks, gpus, per_gpu });
        }
    }
    Ok(own.into_iter().map(Option::unwrap_or_default).collect())
}

/// Gives a rank a GPU of its list, one that is not `tried`, and another rank another one for that if it must be.
fn take<'a>(
    rank: usize,
    lists: &'a [Vec<String>],
    per_gpu: usize,
    own: &mut [Option<usize>],
    tried: &mut BTreeSet<&'a str>,
) -> bool {
    let holders = |gpu: &str, own: &[Option<usize>]| -> Vec<usize> {
        let has = |&rank: &usize| own[rank].is_some_and(|at| lists[rank][at] == gpu);
        (0..own.len()).filter(has).collect()
    };
    let count = |gpu: &String| holders(gpu, own).len();
    let least = lists[rank].iter().enumerate().min_by_key(|(_, gpu)| count(gpu));
    if let Some((at, gpu)) = least
        && count(gpu) < per_gpu
    {
        own[rank] = Some(at);
        return true;
    }
    for (at, gpu) in lists[rank].iter().enumerate() {
        if !tried.insert(gpu) {
            continue;
        }
        for holder in holders(gpu, own) {
            if take(holder, lists, per_gpu, own, tried) {
                own[rank] = Some(at);
                return true;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::group::LocalGroup;

    fn lists(of: &[&str]) -> Vec<Vec<String>> {
        of.iter().map(|list| list.split_whitespace().map(str::to_owned).collect()).collect()
    }

    fn assigned(of: &[&str], per_gpu: usize) -> Result<Vec<usize>, TooFewGpus> {
        assign(&lists(of), per_gpu)
    }

    #[test]
    fn ranks_that_see_all_gpus_have_them_in_their_order() {
        assert_eq!(assigned(&["a"], 1), Ok(vec![0]));
        assert_eq!(assigned(&["a b c d"; 4], 1), Ok(vec![0, 1, 2, 3]));
        assert_eq!(assigned(&["a b c d e f g h"; 3], 1), Ok(vec![0, 1, 2]));
    }

    #[test]
    fn ranks_that_see_their_own_gpus_have_these() {
        assert_eq!(assigned(&["a", "b", "c"], 1), Ok(vec![0, 0, 0]));
        assert_eq!(assigned(&["a b", "c d", "a b", "c d"], 1), Ok(vec![0, 0, 1, 1]));
        assert_eq!(assigned(&["a", "", "a b"], 1), Ok(vec![0, 0, 1]), "one on the CPU has none");
        // Who was first gives way where another sees nothing else.
        assert_eq!(assigned(&["a b", "a"], 1), Ok(vec![1, 0]));
        assert_eq!(assigned(&["a b", "a c", "b", "c"], 1), Err(TooFewGpus { ranks: 4, gpus: 3, per_gpu: 1 }));
        assert_eq!(assigned(&["a b", "b c", "a"], 1), Ok(vec![1, 1, 0]));
        assert_eq!(assigned(&["a b", "a", "a"], 2), Ok(vec![1, 0, 0]));
    }

    #[test]
    fn several_ranks_share_a_gpu_where_they_may() {
        assert_eq!(assigned(&["a b"; 4], 2), Ok(vec![0, 1, 0, 1]));
        assert_eq!(assigned(&["a"; 4], 4), Ok(vec![0; 4]));
        assert_eq!(assigned(&["a", "a", "b", "b"], 2), Ok(vec![0; 4]));
        assert_eq!(assigned(&["a b"; 5], 2), Err(TooFewGpus { ranks: 5, gpus: 2, per_gpu: 2 }));
    }

    #[test]
    fn too_few_gpus_are_refused_on_every_rank_of_the_host() {
        for (of, gpus) in [(&["a"; 2][..], 1), (&["a b c d e f g"; 8], 7), (&["a", "b", "b"], 2)] {
            let expected = TooFewGpus { ranks: of.len(), gpus, per_gpu: 1 };
            assert_eq!(assigned(of, 1), Err(expected));
        }
        let text = TooFewGpus { ranks: 4, gpus: 2, per_gpu: 1 }.to_string();
        assert!(text.contains("one for each of the 4 ranks on this host, found 2; start at most 2 a host"), "{text}");
        let text = assigned(&["a", "a", "b c"], 1).expect_err("two see one alone").to_string();
        let expected = "GPUs: expected one for each of the 3 ranks on this host, found 3, of which some ranks see the same ones alone; let ranks see";
        assert!(text.starts_with(expected), "{text}");
        let text = TooFewGpus { ranks: 5, gpus: 2, per_gpu: 2 }.to_string();
        assert!(text.contains("one for each 2 of the 5 ranks on this host, found 2; start at most 4 a host"), "{text}");
    }

    #[test]
    fn ranks_tell_each_other_what_they_see() {
        let found = |of: &[&str], per_gpu: &[usize]| -> Vec<Result<usize, String>> {
            let ranks = LocalGroup::new(of.len()).into_iter().zip(lists(of)).zip(per_gpu);
            std::thread::scope(|scope| {
                let ranks: Vec<_> = ranks
                    .map(|((mut group, list), &per_gpu)| {
                        scope.spawn(move || own_gpu(&mut group, list, per_gpu).map_err(|error| error.to_string()))
                    })
                    .collect();
                ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect()
            })
        };
        assert_eq!(found(&["a b", "c d", "a b"], &[1; 3]), [Ok(0), Ok(0), Ok(1)]);
        assert!(
            found(&["a"; 3], &[1; 3])
                .iter()
                .all(|found| found.as_ref().is_err_and(|e| e.starts_with("GPUs: expected one")))
        );
        let other = "--ranks-per-gpu: expected 2 on rank 1 of the host, as on its first, found 1; give all ranks the same options";
        assert_eq!(found(&["a"; 2], &[2, 1]), [Err(other.to_owned()), Err(other.to_owned())]);
    }
}
