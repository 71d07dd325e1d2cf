//! Who may capture, and who may wait for the whole device, which would make every capture fail.

use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Many may capture at a time, and while nobody does, one may wait. Everybody gets a turn: by itself the lock prefers those who wait, and
/// where several threads do so one after the other, as each does that lets pinned memory go, a capture would not begin for seconds.
#[derive(Debug, Default)]
pub(super) struct Captures {
    lock: RwLock<()>,
    /// Held while asking for the lock, so that no more than one thread does.
    turn: Mutex<()>,
}

impl Captures {
    /// Until this is dropped, nobody waits for the device. Not to be called within a capture.
    pub(super) fn begin(&self) -> RwLockReadGuard<'_, ()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until this is dropped, nobody captures. Not to be called within a capture.
    pub(super) fn exclude(&self) -> RwLockWriteGuard<'_, ()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::{scope, sleep};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn captures_begin_soon_where_others_wait_all_the_time() {
        let (captures, done) = (Captures::default(), AtomicBool::new(false));
        let longest = scope(|threads| {
            for _ in 0..7 {
                threads.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let nobody_captures = captures.exclude();
                        sleep(Duration::from_micros(500));
                        drop(nobody_captures);
                        sleep(Duration::from_micros(200));
                    }
                });
            }
            // Until all of them are at it.
            sleep(Duration::from_millis(50));
            let waited = |_| {
                let begun = Instant::now();
                drop(captures.begin());
                begun.elapsed()
            };
            let longest = (0..40).map(waited).max();
            done.store(true, Ordering::Relaxed);
            longest
        });
        // Some 4 ms here; without turns, seconds.
        assert!(longest < Some(Duration::from_millis(500)), "a capture began after {longest:?}");
    }

    #[test]
    fn several_capture_at_a_time_and_none_while_one_waits() {
        let captures = Captures::default();
        let (first, second) = (captures.begin(), captures.begin());
        assert!(captures.lock.try_write().is_err());
        drop((first, second));
        let alone = captures.exclude();
        assert!(captures.lock.try_read().is_err());
        drop(alone);
        drop(captures.begin());
    }
}
