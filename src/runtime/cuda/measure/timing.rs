//! Times of runs, and the means to take them on a stream.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cuda::{Device, Event, Stream};

/// Times of equal runs, in milliseconds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Times {
    /// Runs.
    pub runs: usize,
    /// Median.
    pub median_ms: f64,
    /// 99th percentile: at least 99 of 100 runs took no longer.
    pub p99_ms: f64,
    /// Shortest.
    pub least_ms: f64,
}

impl Times {
    /// Of runs in milliseconds; NaN without any.
    pub fn of(mut samples: Vec<f64>) -> Times {
        samples.sort_by(f64::total_cmp);
        Times {
            runs: samples.len(),
            median_ms: median(&samples),
            p99_ms: percentile(&samples, 0.99),
            least_ms: samples.first().copied().unwrap_or(f64::NAN),
        }
    }
}

/// The middle of ascending numbers, the mean of the two middle ones where there are two; NaN of none.
pub(super) fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The least of ascending numbers that this share of them does not exceed; NaN of none.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank.min(sorted.len()).wrapping_sub(1)).copied().unwrap_or(f64::NAN)
}

/// The time that work takes by the host's clock, in milliseconds.
pub(super) fn clocked(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(1e3 * started.elapsed().as_secs_f64())
}

/// Points in a stream, whose times on the device are asked for later.
pub(super) struct Marks {
    events: Vec<Event>,
    recorded: usize,
}

impl Marks {
    /// Room for the begin and the end of so many spans.
    pub(super) fn new(device: &Arc<Device>, spans: usize) -> Result<Marks> {
        let events = (0..=spans).map(|_| Event::new(device, true)).collect::<Result<_, _>>()?;
        Ok(Marks { events, recorded: 0 })
    }

    /// Marks the end of what is queued.
    pub(super) fn record(&mut self, stream: &Stream) -> Result<()> {
        let event = self.events.get(self.recorded).context("more marks than there is room for; this is a bug")?;
        event.record(stream)?;
        self.recorded += 1;
        Ok(())
    }

    /// Waits for the stream; the times between the marks, in milliseconds.
    pub(super) fn spans(&self, stream: &Stream) -> Result<Vec<f64>> {
        stream.synchronize()?;
        let pairs = self.events[..self.recorded].windows(2);
        pairs.map(|pair| Ok(f64::from(pair[1].milliseconds_since(&pair[0])?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_between_the_middle_ones() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_percentile_is_one_of_the_runs() {
        let runs: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&runs, 0.99), 198.0);
        assert_eq!(percentile(&runs[..10], 0.99), 10.0);
        assert_eq!(percentile(&runs[..1], 0.01), 1.0);
        assert!(percentile(&[], 0.5).is_nan());
    }

    #[test]
    fn times_need_no_order() {
        let times = Times::of(vec![3.0, 1.0, 2.0]);
        assert_eq!(times, Times { runs: 3, median_ms: 2.0, p99_ms: 3.0, least_ms: 1.0 });
    }
}
