//! Progress bars: on standard error, and only if that is a terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often the rate of a bar is told anew.
const TELL: Duration = Duration::from_millis(200);

/// A bar over bytes.
pub fn bytes(what: &str, total: u64) -> ProgressBar {
    styled(what, total, "{msg} [{bar:32}] {bytes}/{total_bytes} {bytes_per_sec}")
}

/// A bar over things counted.
pub fn count(what: &str, total: u64) -> ProgressBar {
    styled(what, total, "{msg} [{bar:32}] {pos}/{len}")
}

fn styled(what: &str, total: u64, template: &str) -> ProgressBar {
    // indicatif draws on standard error and hides itself where that is no terminal.
    let bar = ProgressBar::new(total).with_message(what.to_owned());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

/// A bar over sequences done, with new tokens a second.
pub struct Sequences {
    bar: ProgressBar,
    done: u64,
    tokens: u64,
    started: Option<Instant>,
    told: Instant,
}

impl Sequences {
    /// Whether anybody sees it.
    pub fn visible() -> bool {
        std::io::stderr().is_terminal()
    }

    /// Of so many sequences, if that is known. It is drawn from [`Sequences::start`] on.
    pub fn new(total: Option<u64>) -> Self {
        let bar = match total {
            Some(total) => styled("", total, "generating [{bar:32}] {pos}/{len} sequences{msg}"),
            None => styled("", 0, "generating: {pos} sequences{msg}"),
        };
        Sequences { bar, done: 0, tokens: 0, started: None, told: Instant::now() }
    }

    /// Tokens are counted from now on.
    pub fn start(&mut self) {
        self.started = Some(Instant::now());
        self.bar.set_position(self.done);
    }

    /// A new token.
    pub fn token(&mut self) {
        self.tokens += 1;
        let Some(started) = self.started else { return };
        if !self.bar.is_hidden() && self.told.elapsed() >= TELL {
            self.told = Instant::now();
            let rate = self.tokens as f64 / started.elapsed().as_secs_f64();
            self.bar.set_message(format!(", {rate:.0} tokens/s"));
        }
    }

    /// A sequence is done.
    pub fn sequence(&mut self) {
        self.done += 1;
        if self.started.is_some() {
            self.bar.set_position(self.done);
        }
    }

    /// Writes to a terminal without the bar in between.
    pub fn suspend<V>(&self, write: impl FnOnce() -> V) -> V {
        self.bar.suspend(write)
    }

    /// Takes it away.
    pub fn end(self) {
        self.bar.finish_and_clear();
    }
}
