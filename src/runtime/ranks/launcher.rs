//! Whether a launcher has started this process as one of several, which its environment says.
//!
//! | launcher | says |
//! |---|---|
//! | Open MPI's `mpirun` | `OMPI_COMM_WORLD_SIZE`, `OMPI_COMM_WORLD_RANK` |
//! | MPICH's and Intel MPI's `mpirun`, `srun --mpi=pmi2` | `PMI_SIZE`, `PMI_RANK` |
//! | `srun --mpi=pmix` | `SLURM_STEP_NUM_TASKS`, `PMIX_RANK` |
//!
//! MPI is started only then: a process alone needs no MPI to be there, and a batch script's own environment says nothing of ranks.

use thiserror::Error;

/// What the launcher says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launched {
    /// Processes in all, at least 2.
    pub size: usize,
    /// This one.
    pub rank: usize,
    /// The variable that says so.
    pub by: &'static str,
}

/// Several processes, of a binary that cannot join them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error(
    "{by} = {size}: expected a binary with MPI to run as one of {size} ranks, found one without; build it with `cargo build --release \
     --features mpi`, or start it without a launcher"
)]
pub struct NoMpi {
    /// The variable that says so.
    pub by: &'static str,
    /// Processes in all.
    pub size: usize,
}

const LAUNCHERS: [(&str, &str); 3] =
    [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"), ("SLURM_STEP_NUM_TASKS", "PMIX_RANK")];

/// What the launcher says, if it has started several processes.
pub fn launched() -> Option<Launched> {
    among(|name| std::env::var(name).ok())
}

fn among(variable: impl Fn(&str) -> Option<String>) -> Option<Launched> {
    let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
    let found = LAUNCHERS
        .iter()
        .find_map(|&(size, rank)| Some(Launched { size: number(size)?, rank: number(rank)?, by: size }));
    found.filter(|launched| launched.size > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_one_of_several_only_if_both_numbers_are_there() {
        type Case = (&'static [(&'static str, &'static str)], Option<(usize, usize)>);
        let cases: [Case; 6] = [
            (&[], None),
            (&[("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "3")], Some((4, 3))),
            (&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")], None),
            (&[("PMI_SIZE", "2"), ("PMI_RANK", "0"), ("SLURM_STEP_NUM_TASKS", "9")], Some((2, 0))),
            (&[("SLURM_STEP_NUM_TASKS", "4")], None),
            (&[("PMI_SIZE", "x"), ("PMI_RANK", "0")], None),
        ];
        for (variables, expected) in cases {
            let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
            assert_eq!(among(variable).map(|found| (found.size, found.rank)), expected, "{variables:?}");
        }
    }
}
