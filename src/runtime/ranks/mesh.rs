//! Ranks that are threads of one process, for tests.

use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result};

use super::Transport;

/// One of the ranks.
pub struct Mesh {
    rank: usize,
    to: Vec<Sender<(usize, Vec<u8>)>>,
    from: Receiver<(usize, Vec<u8>)>,
}

impl Mesh {
    /// So many ranks.
    pub fn new(size: usize) -> Vec<Mesh> {
        let (to, from): (Vec<_>, Vec<_>) = (0..size).map(|_| channel()).unzip();
        from.into_iter().enumerate().map(|(rank, from)| Mesh { rank, to: to.clone(), from }).collect()
    }
}

impl Transport for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn send(&mut self, to: usize, message: Vec<u8>) -> Result<()> {
        self.to[to].send((self.rank, message)).context("the rank has ended")
    }

    fn receive(&mut self) -> Result<Option<(usize, Vec<u8>)>> {
        Ok(self.from.try_recv().ok())
    }

    fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
