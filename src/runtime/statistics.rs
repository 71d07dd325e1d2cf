//! What a generate loop has run.
//!
//! A row that was in flight when its sequence was found to have ended counts as padding: it gave nothing either.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::plan::{Phase, Program};

/// Counts since the generator was made.
#[derive(Clone, Default, Serialize, Deserialize, PartialEq, Debug)]
pub struct Statistics {
    /// Steps that ran rows of prompts.
    pub prefill: PhaseStatistics,
    /// Steps that ran one row of each sequence.
    pub decode: PhaseStatistics,
    /// Each bucket, in the order of the program.
    pub buckets: Vec<BucketStatistics>,
    /// New tokens.
    pub tokens: u64,
}

/// Counts of one phase.
#[derive(Clone, Copy, Default, Serialize, Deserialize, PartialEq, Debug)]
pub struct PhaseStatistics {
    /// Steps.
    pub steps: u64,
    /// Rows, without padding.
    pub rows: u64,
    /// Rows of padding.
    pub padding: u64,
    /// Time of the steps. A step's time ends when its tokens are known, and begins when those of the step before were; if
    /// none was in flight then, when it was enqueued. So times never overlap, and their sum is that in which any step was in
    /// flight.
    pub elapsed: Duration,
}

impl PhaseStatistics {
    /// Rows a second: prompt tokens in prefill, new tokens in decode. 0 if nothing ran.
    pub fn rows_per_second(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.rows as f64 / seconds } else { 0.0 }
    }
}

/// Counts of one bucket.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Debug)]
pub struct BucketStatistics {
    /// Its name.
    pub name: String,
    /// Steps.
    pub steps: u64,
    /// Rows, without padding.
    pub rows: u64,
    /// Rows of padding.
    pub padding: u64,
}

impl Statistics {
    /// Nothing has run yet.
    pub fn new(program: &Program) -> Self {
        let named = program.buckets.iter().map(|bucket| bucket.name.clone());
        let buckets = named.map(|name| BucketStatistics { name, steps: 0, rows: 0, padding: 0 }).collect();
        Statistics { buckets, ..Statistics::default() }
    }

    /// Adds what ran elsewhere at the same time: times are then those of whoever took longest.
    pub fn merge(&mut self, other: &Statistics) {
        for (sum, phase) in [(&mut self.prefill, &other.prefill), (&mut self.decode, &other.decode)] {
            sum.steps += phase.steps;
            sum.rows += phase.rows;
            sum.padding += phase.padding;
            sum.elapsed = sum.elapsed.max(phase.elapsed);
        }
        for (sum, bucket) in self.buckets.iter_mut().zip(&other.buckets) {
            sum.steps += bucket.steps;
            sum.rows += bucket.rows;
            sum.padding += bucket.padding;
        }
        self.tokens += other.tokens;
    }

    /// Counts one step of `rows` rows in a bucket of `capacity`.
    pub(super) fn count(&mut self, phase: Phase, bucket: usize, rows: u64, capacity: u64, elapsed: Duration) {
        let padding = capacity.saturating_sub(rows);
        let counts = if phase == Phase::Prefill { &mut self.prefill } else { &mut self.decode };
        counts.steps += 1;
        counts.rows += rows;
        counts.padding += padding;
        counts.elapsed += elapsed;
        if let Some(counts) = self.buckets.get_mut(bucket) {
            counts.steps += 1;
            counts.rows += rows;
            counts.padding += padding;
        }
    }
}
