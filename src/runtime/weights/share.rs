//! Weights of ranks of one host that run the same program: each reads them from the checkpoint, or the first of them does and the others copy
//! what it has, which is faster where GPUs are nearer to each other than to the checkpoint.

use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::runtime::group::{Group, short, tell};

/// Who reads; all ranks the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Sharing {
    /// As `Share` where that is possible, which is faster, else as `Read`.
    #[default]
    Auto,
    /// Every rank.
    Read,
    /// On each host the first of the ranks with the same program.
    Share,
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Sharing::Auto => "auto",
            Sharing::Read => "read",
            Sharing::Share => "share",
        })
    }
}

/// By what the weights of a rank are found by another.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Offer {
    /// What lies where weights come, before they do, and nowhere else.
    pub name: Vec<u8>,
    /// By which the memory is mapped.
    pub handle: Vec<u8>,
    /// Bytes of the memory, and where in it weights begin and how many bytes they have.
    pub sizes: [u64; 3],
}

/// Where a rank's weights come to lie.
pub trait Region {
    /// Another rank's.
    type Mapped;

    /// Offers it to other ranks of the host. Weights come next.
    ///
    /// # Errors
    /// Others cannot map it.
    fn offer(&mut self) -> Result<Offer>;

    /// Maps another rank's, in which no weights are yet.
    ///
    /// # Errors
    /// It cannot be mapped, or is not for the same weights.
    fn map(&mut self, offer: &Offer) -> Result<Self::Mapped>;

    /// Reads the weights from the checkpoint.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&mut self) -> Result<()>;

    /// Copies the weights that another rank has read, and lets go of its memory.
    ///
    /// # Errors
    /// The device failed.
    fn copy(&mut self, from: Self::Mapped) -> Result<()>;
}

/// How a rank got its weights.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Loaded {
    /// The rank, of all.
    pub rank: usize,
    /// The rank that it copied from; none if it has read.
    pub from: Option<usize>,
    /// Why it has read, where it was to copy.
    pub why: Option<String>,
    /// From when all ranks of the host were ready for weights until its own were there, waiting for another rank included.
    pub seconds: f64,
}

/// How ranks got their weights: `rank 0 read them in 4.12 s, rank 1 copied those of rank 0 after 4.31 s`.
pub fn in_words(loaded: &[Loaded]) -> String {
    let each = loaded.iter().map(|Loaded { rank, from, why, seconds }| match (from, why) {
        (Some(from), _) => format!("rank {rank} copied those of rank {from} after {seconds:.2} s"),
        (None, None) => format!("rank {rank} read them in {seconds:.2} s"),
        (None, Some(why)) => format!("rank {rank} read them in {seconds:.2} s, as it cannot copy: {why}"),
    });
    each.collect::<Vec<_>>().join(", ")
}

/// What a rank tells first of all.
#[derive(Serialize, Deserialize)]
struct Hello {
    rank: usize,
    program: usize,
    sharing: Sharing,
}

/// Loads the weights of this rank, by its number among all, for one of a plan's programs: how each rank of the host got its own. All ranks of
/// the host call it. When it returns, no rank has mapped another's weights.
///
/// # Errors
/// Weights cannot be read, or were to be shared and cannot be, the ranks were told to do different things, or one of them is no more.
pub fn load<R: Region>(
    host: &mut dyn Group,
    (rank, program): (usize, usize),
    sharing: Sharing,
    region: &mut R,
) -> Result<Vec<Loaded>> {
    let ranks = tell(host, &Hello { rank, program, sharing })?;
    // From where all of them are ready for weights.
    let begun = Instant::now();
    for other in &ranks {
        ensure!(
            other.sharing == ranks[0].sharing,
            "--weights: expected {} on rank {}, as on rank {}, found {}; give all ranks the same options",
            ranks[0].sharing,
            other.rank,
            ranks[0].rank,
            other.sharing
        );
    }
    // By rank of the host: the first with the same program.
    let first = |one: &Hello| ranks.iter().position(|other| other.program == one.program);
    let firsts: Vec<usize> = ranks.iter().map(first).collect::<Option<_>>().context("a rank without a program")?;
    let is_shared = sharing != Sharing::Read && firsts.iter().enumerate().any(|(rank, &first)| rank != first);
    let (from, why) = if is_shared {
        read_and_copy(host, &ranks, &firsts, sharing, region)?
    } else {
        region.read()?;
        (None, None)
    };
    tell(host, &Loaded { rank, from, why, seconds: begun.elapsed().as_secs_f64() })
}

/// Loads the weights where some ranks copy: the rank that this one has copied from, or why it has read instead.
fn read_and_copy<R: Region>(
    host: &mut dyn Group,
    ranks: &[Hello],
    firsts: &[usize],
    sharing: Sharing,
    region: &mut R,
) -> Result<(Option<usize>, Option<String>)> {
    let me = host.rank();
    let is_copied = |rank: usize| firsts.iter().enumerate().any(|(other, &first)| first == rank && other != rank);
    let own = is_copied(me).then(|| region.offer().map_err(|error| short(&error)));
    let offers = tell(host, &own)?;
    // Before anybody reads: who cannot copy reads while others do.
    let mapped = (firsts[me] != me).then(|| match &offers[firsts[me]] {
        Some(Ok(offer)) => region.map(offer).map_err(|error| short(&error)),
        Some(Err(why)) => Err(why.clone()),
        None => Err("it has made no offer; this is a bug".to_owned()),
    });
    let why = mapped.as_ref().and_then(|mapped| mapped.as_ref().err().cloned());
    let refused = tell(host, &why)?.into_iter().enumerate().find_map(|(rank, why)| Some((rank, why?)));
    if let Some((rank, why)) = refused
        && sharing == Sharing::Share
    {
        // Nobody frees what another has mapped.
        drop(mapped);
        tell(host, &())?;
        bail!(
            "--weights share: expected ranks of one host whose GPUs reach each other's memory, found that rank {} does not reach that of \
             rank {}: {why}; use --weights read",
            ranks[rank].rank,
            ranks[firsts[rank]].rank
        );
    }
    let mapped = mapped.and_then(Result::ok);
    if mapped.is_none() {
        region.read()?;
    }
    // Whoever reads has read.
    tell(host, &())?;
    let Some(mapped) = mapped else { return Ok((None, why)) };
    region.copy(mapped)?;
    Ok((Some(ranks[firsts[me]].rank), None))
}

#[cfg(test)]
mod tests;
