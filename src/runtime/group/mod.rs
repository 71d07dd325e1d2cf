//! Ranks that run the programs of one plan in lockstep, each with sequences of its own: what they exchange within steps, and, between
//! steps, the agreement on what runs next.

mod echo;
mod local;
mod tell;

use anyhow::{Result, ensure};

use crate::plan::{Collective, Manifest};

pub use self::echo::Echo;
pub use self::local::LocalGroup;
pub use self::tell::{FAULT_CHARS, short, tell};

/// The ranks of a group, seen from one of them. What is for all, all of them call in the same order, with the same sizes; such a call
/// returns when all have. What one sends to another, that one receives.
pub trait Group {
    /// This rank in the group.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Gives every rank what all have sent, in the order of the ranks: `received` is `size` times as long.
    ///
    /// # Errors
    /// A rank is no more, or sends another size.
    fn all_gather(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()>;

    /// Sends block i of `size` to rank i, and receives what each rank has for this one, in the order of the ranks.
    ///
    /// # Errors
    /// A rank is no more, or sends another size.
    fn all_to_all(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()>;

    /// Sends to one rank alone, which receives as much. Returns when it may be sent something else, which may be before it is received.
    ///
    /// # Errors
    /// That rank is no more.
    fn send(&mut self, to: usize, sent: &[u8]) -> Result<()>;

    /// Receives what one rank sends, in the order in which it does.
    ///
    /// # Errors
    /// That rank is no more, or sends another size.
    fn receive(&mut self, from: usize, received: &mut [u8]) -> Result<()>;

    /// The group of the neighbours that this rank is among, where this one is cut into groups of so many. All ranks call it, before any of
    /// them uses what it gives.
    ///
    /// # Errors
    /// There is no whole number of them, or a rank is no more.
    fn split(&mut self, size: usize) -> Result<Box<dyn Group>>;
}

/// The ranks that run a plan's steps with one of them: all, and those of its stage.
pub(super) struct Mates {
    all: Box<dyn Group>,
    /// None where these are the same, or the rank is alone in its stage.
    stage: Option<Box<dyn Group>>,
}

impl Mates {
    /// Of a rank of a plan; all ranks call it.
    ///
    /// # Errors
    /// The group is not one of the plan's ranks, or one of them is no more.
    pub(super) fn new(mut all: Box<dyn Group>, rank: usize, manifest: &Manifest) -> Result<Mates> {
        let (found, ranks) = ((all.rank(), all.size()), manifest.ranks.len());
        ensure!(
            found == (rank, ranks),
            "ranks: expected rank {rank} of {ranks}, as the plan has, found rank {} of {}",
            found.0,
            found.1
        );
        let of_stage = manifest.stage_ranks();
        let stage = if (2..ranks).contains(&of_stage) { Some(all.split(of_stage)?) } else { None };
        Ok(Mates { all, stage })
    }

    /// All ranks of the plan.
    pub(super) fn all(&mut self) -> &mut dyn Group {
        &mut *self.all
    }

    /// Those of the rank's stage, if they are others and it is not alone.
    pub(super) fn stage(&mut self) -> Option<&mut dyn Group> {
        Some(&mut **self.stage.as_mut()?)
    }

    /// Those that run a collective.
    pub(super) fn of(&mut self, collective: &Collective) -> &mut dyn Group {
        match &mut self.stage {
            Some(stage) if collective.kind.peer().is_none() => &mut **stage,
            _ => &mut *self.all,
        }
    }
}

/// Block `number` of so many equal ones.
pub(super) fn block(bytes: &[u8], number: usize, count: usize) -> &[u8] {
    let each = bytes.len() / count;
    &bytes[number * each..][..each]
}
