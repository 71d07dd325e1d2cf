//! Several processes at one piece of work: the *ranks*, which a launcher such as `mpirun` starts.
//!
//! Every rank holds the model, a *replica*, or a group of ranks does, each with its own experts ([`crate::runtime::group`]); for dealing
//! requests, each of them is a replica. Rank 0 has the input and the output: it deals requests to the replicas, itself among
//! them, and takes back their results ([`lead()`]); the others run what they are given ([`follow()`]). What they say to each other is in
//! [`mod@message`], and goes through a [`Transport`], so that nothing but `mpi` knows MPI. A request's tokens do not depend on the rank that
//! runs it, nor on its neighbours there, so neither do results; which rank runs which request depends on who has done how much.
//!
//! Whether all ranks live is seen to beside that by [`mod@watch`], over sockets and in a thread of its own, because a rank may be in a long
//! step, or wait within MPI for one that is no more.

#[cfg(feature = "mpi")]
mod connect;
pub mod follow;
pub mod launcher;
pub mod lead;
pub mod local;
#[cfg(test)]
mod mesh;
pub mod message;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "mpi")]
mod mpi_group;
#[cfg(test)]
mod tests;
pub mod watch;

use std::cell::RefCell;
use std::rc::Rc;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use thiserror::Error;

pub use self::follow::{Order, Stop, follow, next_order};
pub use self::launcher::{Launched, launched};
pub use self::lead::{Mode, lead};
pub use self::local::own_gpu;
pub use self::message::{Introduction, Message, Summary};
use self::watch::Watch;
pub use self::watch::{Failure, GiveUp, Peer};
use crate::runtime::group::Group;

/// How long a rank sleeps that has nothing to do but to wait for a message.
const NAP: Duration = Duration::from_micros(200);

/// The transport failed, for which a rank that is no more may be the reason.
#[derive(Debug, Error)]
#[error("{call}: expected success, found error {code}")]
pub struct TransportError {
    /// What was called.
    pub call: &'static str,
    /// What it returned.
    pub code: i32,
}

/// Carries messages between ranks: whole, and those between two ranks in their order.
pub trait Transport {
    /// This rank.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Hands a message over, and waits for nobody.
    ///
    /// # Errors
    /// It cannot be sent.
    fn send(&mut self, to: usize, message: Vec<u8>) -> Result<()>;

    /// A message that has arrived and the rank that sent it, if there is one. Whoever sent something calls this now and then, so that
    /// it goes on its way.
    ///
    /// # Errors
    /// The transport failed.
    fn receive(&mut self) -> Result<Option<(usize, Vec<u8>)>>;

    /// Waits until what was sent has left, and for the other ranks to do the same; after that nothing can be sent.
    ///
    /// # Errors
    /// The transport failed.
    fn close(&mut self) -> Result<()>;
}

/// Gathers groups of so many ranks, neighbours by number, all ranks at a time: the one of this rank.
pub type Groups = Rc<dyn Fn(usize) -> Result<Box<dyn Group>>>;

/// The ranks of this host. All of them call it at the same time, and waiting in it for the others takes no core.
pub type HostRanks = Rc<RefCell<dyn Group>>;

/// This process among the ranks.
pub struct Ranks {
    transport: Box<dyn Transport>,
    /// None where threads of one process play ranks, in tests.
    watch: Option<Watch>,
    /// By rank; on ranks other than 0, only rank 0 and itself are known by more than their number.
    peers: Vec<Peer>,
    /// None where tests gather groups themselves, as the next.
    groups: Option<Groups>,
    host: Option<HostRanks>,
}

impl Ranks {
    /// Over a transport, without anybody to see whether the others live.
    pub fn unwatched(transport: Box<dyn Transport>) -> Ranks {
        let peers = (0..transport.size()).map(Peer::unknown).collect();
        Ranks { transport, watch: None, peers, groups: None, host: None }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.transport.rank()
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.transport.size()
    }

    /// The ranks, by number.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// What gathers the ranks that run steps together.
    pub fn groups(&self) -> Option<Groups> {
        self.groups.clone()
    }

    /// The ranks of this host, which share its GPUs.
    pub fn host(&self) -> Option<HostRanks> {
        self.host.clone()
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Those of [`Transport::send`].
    pub fn send(&mut self, to: usize, message: &Message) -> Result<()> {
        self.transport.send(to, message.to_bytes()?)
    }

    /// Sends a message to all others.
    ///
    /// # Errors
    /// Those of [`Transport::send`].
    pub fn send_to_others(&mut self, message: &Message) -> Result<()> {
        let me = self.rank();
        (0..self.size()).filter(|&to| to != me).try_for_each(|to| self.send(to, message))
    }

    /// A message that has arrived.
    ///
    /// # Errors
    /// Those of [`Transport::receive`], or it is no message.
    pub fn receive(&mut self) -> Result<Option<(usize, Message)>> {
        let Some((from, bytes)) = self.transport.receive()? else { return Ok(None) };
        match Message::from_bytes(&bytes) {
            Ok(message) => Ok(Some((from, message))),
            Err(error) => Err(error.context(format!("message of {}", self.peers[from]))),
        }
    }

    /// Waits for a message. That a rank which should send it is no more is for the watch to find.
    ///
    /// # Errors
    /// Those of [`Ranks::receive`].
    pub fn wait(&mut self) -> Result<(usize, Message)> {
        loop {
            if let Some(received) = self.receive()? {
                return Ok(received);
            }
            sleep(NAP);
        }
    }

    /// On rank 0: waits until every other rank has introduced itself, and compares.
    ///
    /// # Errors
    /// A rank is not like this one.
    pub fn meet(&mut self, own: &Introduction) -> Result<()> {
        let mut missing = self.size() - 1;
        while missing > 0 {
            match self.wait()? {
                (from, Message::Introduction(found)) => {
                    if let Some(difference) = own.difference(&found) {
                        bail!("{}: {difference}", self.peers[from]);
                    }
                    missing -= 1;
                }
                (from, other) => bail!(unexpected(&self.peers[from], "an introduction", &other)),
            }
        }
        Ok(())
    }

    /// On rank 0: waits until every other rank has loaded what it was told to.
    ///
    /// # Errors
    /// A rank says something else.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        for _ in 1..self.size() {
            match self.wait()? {
                (_, Message::Ready) => {}
                (from, other) => bail!(unexpected(&self.peers[from], "that it is ready", &other)),
            }
        }
        Ok(())
    }

    /// All is done, on all ranks: rank 0 tells them so first. If not all get here, the process ends with a message.
    ///
    /// # Errors
    /// The transport failed.
    pub fn leave(mut self) -> Result<()> {
        if self.rank() == 0 {
            self.send_to_others(&Message::Stop)?;
        }
        if let Some(watch) = &self.watch {
            watch.say_goodbye();
        }
        self.transport.close()?;
        if let Some(watch) = self.watch.take() {
            watch.end();
        }
        Ok(())
    }

    /// Tells all ranks that this one cannot go on, and why, and ends the process, as they do. Where the transport failed because another
    /// rank is no more, that is told.
    pub fn fail(&mut self, code: u8, error: &anyhow::Error, text: String) -> ! {
        if self.watch.is_some() && error.chain().any(|cause| cause.is::<TransportError>()) {
            sleep(watch::SILENCE + NAP);
        }
        match self.watch.take() {
            Some(watch) => watch.fail(code, text),
            None => panic!("{text}"),
        }
    }
}

fn unexpected(peer: &Peer, expected: &str, found: &Message) -> String {
    format!("{peer}: expected {expected}, found {}; this is a bug", found.kind())
}

/// Joins the other ranks, if a launcher has started several; `None` if this process is the only one. From then on the process ends
/// if another does before all have left; `tell` is called before that with the cause, on the rank that tells it.
///
/// # Errors
/// There are several, and this binary cannot join them.
pub fn join(tell: impl Fn(&str) + Send + Sync + 'static) -> Result<Option<Ranks>, launcher::NoMpi> {
    let Some(launched) = launched() else { return Ok(None) };
    #[cfg(feature = "mpi")]
    return Ok(Some(mpi::join(&launched, std::sync::Arc::new(tell))));
    #[cfg(not(feature = "mpi"))]
    {
        let _ = tell;
        Err(launcher::NoMpi { by: launched.by, size: launched.size })
    }
}
