//! A rank among those of its host, which share its GPUs.

use thiserror::Error;

/// This rank among those of its host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Local {
    /// Its number there, from 0.
    pub rank: usize,
    /// Ranks there.
    pub size: usize,
}

/// More ranks on a host than GPUs, none of which two could share.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error(
    "GPUs: expected one for each of the {ranks} ranks on this host, found {gpus}; start at most {gpus} a host (Open MPI: \
     `mpirun --map-by ppr:{gpus}:node`), let each rank see all of its host's GPUs, or use --device cpu"
)]
pub struct TooFewGpus {
    /// Ranks on the host.
    pub ranks: usize,
    /// GPUs that this one sees.
    pub gpus: usize,
}

impl Local {
    /// The rank's GPU, of so many that it sees: that of its number, so that no two ranks have the same.
    ///
    /// # Errors
    /// There are fewer than ranks.
    pub fn gpu(self, gpus: usize) -> Result<usize, TooFewGpus> {
        // All ranks of the host say so, not only those that would have none: which are told does not depend on who is first.
        if self.size <= gpus { Ok(self.rank) } else { Err(TooFewGpus { ranks: self.size, gpus }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_of_a_host_has_a_gpu_of_its_own() {
        for (size, gpus) in [(1, 1), (4, 4), (3, 8)] {
            let chosen: Vec<_> = (0..size).map(|rank| Local { rank, size }.gpu(gpus).unwrap()).collect();
            assert_eq!(chosen, (0..size).collect::<Vec<_>>());
        }
    }

    #[test]
    fn too_few_gpus_are_refused_on_every_rank_of_the_host() {
        for (size, gpus) in [(2, 1), (8, 7)] {
            for rank in 0..size {
                assert_eq!(Local { rank, size }.gpu(gpus), Err(TooFewGpus { ranks: size, gpus }));
            }
        }
        let text = TooFewGpus { ranks: 4, gpus: 2 }.to_string();
        assert!(text.contains("each of the 4 ranks on this host, found 2; start at most 2 a host"), "{text}");
    }
}
