//! Ctrl-C: stops an answer, and the program only where no answer is made.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result};

/// No answer is made.
const IDLE: u8 = 0;
/// One is, and Ctrl-C would stop it.
const ANSWERING: u8 = 1;
/// Ctrl-C has asked for its end.
const ASKED: u8 = 2;

/// What shells expect of a program that Ctrl-C has ended.
const ENDED: i32 = 130;

/// What Ctrl-C has asked for.
pub(super) struct Interrupt(Arc<AtomicU8>);

/// While this is, Ctrl-C stops an answer.
pub(super) struct Answering<'a>(&'a AtomicU8);

impl Interrupt {
    /// Takes Ctrl-C over. Where lines are typed, the editor sees it as a key and no signal comes between answers; one that comes
    /// just after an answer was for that, and does nothing. Elsewhere it ends the program when no answer is made.
    ///
    /// # Errors
    /// The system refused.
    pub(super) fn install(lines_are_typed: bool) -> Result<Interrupt> {
        let state = Arc::new(AtomicU8::new(IDLE));
        let seen = Arc::clone(&state);
        ctrlc::set_handler(move || {
            let asked = seen.compare_exchange(ANSWERING, ASKED, Ordering::SeqCst, Ordering::SeqCst);
            if asked == Err(IDLE) && !lines_are_typed {
                std::process::exit(ENDED);
            }
        })
        .context("cannot take over Ctrl-C")?;
        Ok(Interrupt(state))
    }

    /// An answer begins.
    pub(super) fn begin(&self) -> Answering<'_> {
        self.0.store(ANSWERING, Ordering::SeqCst);
        Answering(&self.0)
    }

    /// Whether the answer is to end.
    pub(super) fn is_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst) == ASKED
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.store(IDLE, Ordering::SeqCst);
    }
}
