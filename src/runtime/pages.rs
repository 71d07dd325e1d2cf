//! Slots and pages: numbers handed out lowest first, so that the same requests always get the same places.

use anyhow::{Result, ensure};

use super::buckets::i32_size;
use crate::plan::Limits;

/// The numbers `0..total`, each free or taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FreeList {
    /// One bit a number, set while it is free.
    words: Vec<u64>,
    total: usize,
    free: usize,
}

impl FreeList {
    /// All of `0..total`, free.
    pub fn new(total: u32) -> Self {
        let total = total as usize;
        let mut words = vec![u64::MAX; total / 64];
        if !total.is_multiple_of(64) {
            words.push((1 << (total % 64)) - 1);
        }
        FreeList { words, total, free: total }
    }

    /// How many there are, free or taken.
    pub fn total(&self) -> usize {
        self.total
    }

    /// How many are free.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Takes the lowest free `count`, ascending; none of them if fewer are free.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.free {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        for (index, word) in self.words.iter_mut().enumerate() {
            while *word != 0 && taken.len() < count {
                taken.push(index as u32 * 64 + word.trailing_zeros());
                *word &= *word - 1;
            }
            if taken.len() == count {
                break;
            }
        }
        self.free -= count;
        Some(taken)
    }

    /// Takes the lowest that is free.
    pub fn take_one(&mut self) -> Option<u32> {
        let (index, word) = self.words.iter_mut().enumerate().find(|(_, word)| **word != 0)?;
        let bit = word.trailing_zeros();
        *word &= *word - 1;
        self.free -= 1;
        Some(index as u32 * 64 + bit)
    }

    /// Takes all back.
    pub fn free_all(&mut self) {
        *self = FreeList::new(self.total as u32);
    }

    /// Gives a taken number back. One that is free already, or out of range, is left as it is.
    pub fn give_back(&mut self, number: u32) {
        let bit = 1u64 << (number % 64);
        let in_range = (number as usize) < self.total;
        match self.words.get_mut(number as usize / 64) {
            Some(word) if in_range && *word & bit == 0 => {
                *word |= bit;
                self.free += 1;
            }
            _ => debug_assert!(false, "{number} was not taken"),
        }
    }
}

/// The KV pages of the pool. A sequence reserves all that it can need at once, and gives them back when it ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pages {
    list: FreeList,
    page_tokens: usize,
}

impl Pages {
    /// All pages of a plan, free.
    ///
    /// # Errors
    /// The plan's limits hold no page, or more than an i32 can name.
    pub fn new(limits: &Limits) -> Result<Self> {
        ensure!(
            limits.page_tokens > 0 && limits.pages() > 0,
            "limits of the plan: expected at least one page of KV cache, found kv_tokens = {} in pages of {} tokens; \
             compile with a larger --kv-tokens",
            limits.kv_tokens,
            limits.page_tokens
        );
        let pages = i32_size("limits of the plan: pages of KV cache", limits.pages())?;
        let page_tokens = i32_size("limits of the plan: page_tokens", limits.page_tokens)?;
        Ok(Pages { list: FreeList::new(pages as u32), page_tokens })
    }

    /// Pages in the pool, free or taken.
    pub fn total(&self) -> usize {
        self.list.total()
    }

    /// Pages that are free.
    pub fn free(&self) -> usize {
        self.list.free()
    }

    /// Positions of one page.
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// How many pages hold so many positions.
    pub fn needed(&self, positions: usize) -> usize {
        positions.div_ceil(self.page_tokens)
    }

    /// Takes the lowest free pages for so many positions, in the order of the positions; none if too few are free.
    pub fn reserve(&mut self, positions: usize) -> Option<Vec<u32>> {
        self.list.take(self.needed(positions))
    }

    /// Makes a sequence's pages hold so many positions: takes the lowest free ones for those that it has no pages for, or
    /// gives back those that it has too many. False, and nothing has changed, if too few are free.
    pub fn resize(&mut self, pages: &mut Vec<u32>, positions: usize) -> bool {
        let needed = self.needed(positions);
        if needed <= pages.len() {
            self.release(&pages.split_off(needed));
            return true;
        }
        let more = self.list.take(needed - pages.len());
        let enough = more.is_some();
        pages.extend(more.into_iter().flatten());
        enough
    }

    /// Takes all back.
    pub fn free_all(&mut self) {
        self.list.free_all();
    }

    /// Gives pages back.
    pub fn release(&mut self, pages: &[u32]) {
        pages.iter().for_each(|&page| self.list.give_back(page));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn limits(kv_tokens: u64, page_tokens: u64) -> Limits {
        Limits { max_sequences: 4, max_context: 64, kv_tokens, page_tokens, ring_columns: 8 }
    }

    #[test]
    fn lowest_first_across_words() {
        let mut list = FreeList::new(130);
        assert_eq!(list.take(129), Some((0..129).collect()));
        assert_eq!(list.take(2), None);
        assert_eq!(list.free(), 1);
        list.give_back(70);
        list.give_back(3);
        assert_eq!(list.take_one(), Some(3));
        assert_eq!(list.take(2), Some(vec![70, 129]));
        assert_eq!(list.take_one(), None);
        assert_eq!(list.take(0), Some(vec![]));
    }

    #[test]
    fn pages_round_up() {
        let mut pages = Pages::new(&limits(40, 16)).unwrap();
        assert_eq!(pages.total(), 2, "a part of a page is no page");
        assert_eq!(pages.reserve(33), None);
        assert_eq!(pages.reserve(17), Some(vec![0, 1]));
        assert_eq!(pages.reserve(1), None);
        pages.release(&[0]);
        assert_eq!(pages.reserve(16), Some(vec![0]));
    }

    #[test]
    fn pages_of_a_sequence_grow_and_shrink() {
        let mut pages = Pages::new(&limits(64, 16)).unwrap();
        let mut own = pages.reserve(20).unwrap();
        assert!(pages.resize(&mut own, 32) && own == [0, 1]);
        let other = pages.reserve(1).unwrap();
        assert!(pages.resize(&mut own, 33) && own == [0, 1, 3]);
        assert!(!pages.resize(&mut own, 49) && own == [0, 1, 3], "no page is free");
        pages.release(&other);
        assert!(pages.resize(&mut own, 16) && own == [0]);
        assert_eq!(pages.free(), 3);
        assert!(pages.resize(&mut own, 0) && own.is_empty());
        pages.reserve(64).unwrap();
        pages.free_all();
        assert_eq!(pages.free(), 4);
    }

    #[test]
    fn limits_without_pages_are_refused() {
        for (kv_tokens, page_tokens) in [(0, 64), (63, 64), (64, 0), (u64::MAX, 1)] {
            let error = Pages::new(&limits(kv_tokens, page_tokens)).unwrap_err().to_string();
            assert!(error.contains("expected") && error.contains("found"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(total in 1u32..200, actions in prop::collection::vec((any::<bool>(), 0usize..20), 1..60)) {
            let mut list = FreeList::new(total);
            let mut free: BTreeSet<u32> = (0..total).collect();
            let mut owned: Vec<Vec<u32>> = Vec::new();
            for (take, n) in actions {
                if take || owned.is_empty() {
                    let expected = (n <= free.len()).then(|| free.iter().copied().take(n).collect::<Vec<_>>());
                    let got = list.take(n);
                    prop_assert_eq!(&got, &expected);
                    for number in got.iter().flatten() {
                        prop_assert!(free.remove(number), "{} was owned already", number);
                    }
                    owned.extend(got);
                } else {
                    for number in owned.swap_remove(n % owned.len()) {
                        list.give_back(number);
                        free.insert(number);
                    }
                }
                prop_assert_eq!(list.free(), free.len());
            }
        }
    }
}
