//! A group of which one rank alone is there.

use anyhow::{Result, bail, ensure};

use super::Group;

/// A rank to which what it sends comes back in the others' place: for measurements of its steps without them.
pub struct Echo {
    rank: usize,
    size: usize,
}

impl Echo {
    /// The rank of that number, of so many.
    pub fn new(rank: usize, size: usize) -> Echo {
        Echo { rank, size }
    }

    fn alone<T>(&self, peer: usize) -> Result<T> {
        bail!(
            "rank {} is measured without the others: expected no exchange with rank {peer} alone, found one",
            self.rank
        )
    }
}

impl Group for Echo {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        ensure!(received.len() == sent.len() * self.size, "all-gather: expected room for {} times as much", self.size);
        if !sent.is_empty() {
            received.chunks_exact_mut(sent.len()).for_each(|block| block.copy_from_slice(sent));
        }
        Ok(())
    }

    fn all_to_all(&mut self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        ensure!(received.len() == sent.len(), "all-to-all: expected room for as much as is sent");
        received.copy_from_slice(sent);
        Ok(())
    }

    fn send(&mut self, to: usize, _sent: &[u8]) -> Result<()> {
        self.alone(to)
    }

    fn receive(&mut self, from: usize, _received: &mut [u8]) -> Result<()> {
        self.alone(from)
    }

    fn split(&mut self, size: usize) -> Result<Box<dyn Group>> {
        ensure!(
            size > 0 && self.size.is_multiple_of(size),
            "a split: expected a whole number of {size} ranks of {}",
            self.size
        );
        Ok(Box::new(Echo { rank: self.rank % size, size }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_comes_back_in_the_others_place() {
        let mut echo = Echo::new(1, 3);
        let mut all = [0; 6];
        echo.all_gather(&[1, 2], &mut all).expect("it fits");
        assert_eq!(all, [1, 2, 1, 2, 1, 2]);
        let mut back = [0; 6];
        echo.all_to_all(&[1, 2, 3, 4, 5, 6], &mut back).expect("it fits");
        assert_eq!(back, [1, 2, 3, 4, 5, 6]);
        assert!(echo.all_gather(&[1], &mut back).is_err() && echo.split(2).is_err());
        assert!(echo.send(0, &[1]).is_err() && echo.receive(2, &mut back).is_err());
        let part = Echo::new(5, 6).split(3).expect("two groups of three");
        assert_eq!((part.rank(), part.size()), (2, 3));
    }
}
