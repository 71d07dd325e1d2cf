//! Progress bars: on standard error, and only if that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

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
