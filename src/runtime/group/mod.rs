//! Ranks that run the programs of one plan in lockstep, each with sequences of its own: what they exchange within steps, and, between
//! steps, the agreement on what runs next.

mod local;

use anyhow::{Result, ensure};

pub use self::local::LocalGroup;

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
}

/// Holds a group against what a plan's rank expects: its number, and how many ranks there are.
///
/// # Errors
/// It is another.
pub(super) fn check(group: &dyn Group, rank: usize, ranks: usize) -> Result<()> {
    let found = (group.rank(), group.size());
    ensure!(
        (rank, ranks) == found,
        "ranks: expected rank {rank} of {ranks}, as the plan has, found rank {} of {}",
        found.0,
        found.1
    );
    Ok(())
}

/// Block `number` of so many equal ones.
pub(super) fn block(bytes: &[u8], number: usize, count: usize) -> &[u8] {
    let each = bytes.len() / count;
    &bytes[number * each..][..each]
}
