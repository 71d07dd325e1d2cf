//! Which bucket runs how many rows, and what padding wastes.

use anyhow::{Result, bail, ensure};

use crate::plan::{Phase, Program};

/// What one bucket holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// Position in the program.
    pub bucket: usize,
    /// Token rows, T.
    pub tokens: usize,
    /// Sequences, S.
    pub sequences: usize,
    /// Rows that get logits, R.
    pub rows: usize,
    /// Rows of one sequence: 1 in a decode bucket.
    pub rows_per_sequence: usize,
}

impl Capacity {
    /// Whether it holds so many rows of so many sequences, so many of the rows with logits.
    pub fn holds(&self, tokens: usize, sequences: usize, rows: usize) -> bool {
        tokens <= self.tokens && sequences <= self.sequences && rows <= self.rows
    }

    /// Sequences that run one row each and all get logits.
    pub fn decodes(&self) -> usize {
        self.tokens.min(self.sequences).min(self.rows)
    }
}

/// A program's buckets by what they are used for. Where a program has no decode bucket, its prefill buckets decode; where
/// it has no prefill bucket, prompts run through its decode buckets one row at a time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Buckets {
    /// By ascending rows.
    prefill: Vec<Capacity>,
    /// By ascending number of sequences.
    decode: Vec<Capacity>,
}

impl Buckets {
    /// The buckets of a program.
    ///
    /// # Errors
    /// None of them is for rows of sequences.
    pub fn new(program: &Program) -> Result<Self> {
        let mut prefill = capacities(program, Phase::Prefill)?;
        let mut decode = capacities(program, Phase::Decode)?;
        ensure!(
            !(prefill.is_empty() && decode.is_empty()),
            "buckets of the plan: expected a prefill or a decode bucket, found none among {}; generation needs the plan of \
             a language model, compiled with --prefill and --decode",
            program.buckets.len()
        );
        if decode.is_empty() {
            decode.clone_from(&prefill);
        }
        if prefill.is_empty() {
            prefill.clone_from(&decode);
        }
        prefill.sort_by_key(|capacity| (capacity.tokens, capacity.sequences, capacity.rows));
        decode.sort_by_key(|capacity| (capacity.decodes(), capacity.tokens));
        Ok(Buckets { prefill, decode })
    }

    /// The prefill bucket with the most rows: what one prefill step can hold.
    pub fn largest_prefill(&self) -> Capacity {
        self.prefill[self.prefill.len() - 1]
    }

    /// The decode bucket for the most sequences.
    pub fn largest_decode(&self) -> Capacity {
        self.decode[self.decode.len() - 1]
    }

    /// The prefill bucket with the fewest rows that holds so many; the largest if none does.
    pub fn prefill(&self, tokens: usize, sequences: usize, rows: usize) -> Capacity {
        let fits = self.prefill.iter().find(|capacity| capacity.holds(tokens, sequences, rows));
        fits.copied().unwrap_or(self.largest_prefill())
    }

    /// The smallest decode bucket that holds so many sequences; the largest if none does.
    pub fn decode(&self, sequences: usize) -> Capacity {
        let fits = self.decode.iter().find(|capacity| capacity.decodes() >= sequences);
        fits.copied().unwrap_or(self.largest_decode())
    }
}

fn capacities(program: &Program, phase: Phase) -> Result<Vec<Capacity>> {
    let mut capacities = Vec::new();
    for (index, bucket) in program.buckets.iter().enumerate().filter(|(_, bucket)| bucket.phase == phase) {
        let size = |what: &str, size: u64| {
            ensure!(size > 0, "bucket {}: expected {what} above 0, found 0; compile the plan again", bucket.name);
            i32_size(&format!("bucket {}: {what}", bucket.name), size)
        };
        let tokens = size("tokens", bucket.tokens)?;
        capacities.push(Capacity {
            bucket: index,
            tokens,
            sequences: size("sequences", bucket.sequences)?,
            rows: size("rows", bucket.rows)?,
            rows_per_sequence: if phase == Phase::Decode { 1 } else { tokens },
        });
    }
    Ok(capacities)
}

/// A size that rows, slots and pages count in i32, the type in which steps hold them.
///
/// # Errors
/// It is larger; `what` says what it is the size of.
pub(super) fn i32_size(what: &str, size: u64) -> Result<usize> {
    match i32::try_from(size) {
        Ok(size) => Ok(size as usize),
        Err(_) => bail!("{what}: expected at most {}, found {size}; compile the plan with a smaller size", i32::MAX),
    }
}

/// The padding of one bucket, over the numbers of rows for which it is the smallest that fits.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Padding {
    /// Fewest rows that run in it: one more than the next smaller bucket of its phase holds. Above its own rows if another
    /// bucket has the same size, and this one is never chosen for its rows.
    pub fewest_rows: u64,
    /// Share of its rows that is padding when every such number of rows is as likely, in 0..1.
    pub mean: f64,
    /// Share of its rows that is padding with the fewest rows, in 0..1.
    pub worst: f64,
}

/// The padding of each of a program's buckets, in their order; zeros for buckets without rows.
pub fn padding(program: &Program) -> Vec<Padding> {
    let mut paddings = vec![Padding::default(); program.buckets.len()];
    for phase in [Phase::Prefill, Phase::Decode] {
        let of_phase = program.buckets.iter().enumerate().filter(|(_, bucket)| bucket.phase == phase);
        let mut sizes: Vec<_> = of_phase.map(|(index, bucket)| (bucket.tokens, index)).collect();
        sizes.sort_unstable();
        let mut before = 0;
        for (tokens, index) in sizes {
            // From the fewest to the most rows, padding falls evenly from this to 0.
            let most_padding = (tokens - before).saturating_sub(1);
            let worst = if tokens == 0 { 0.0 } else { most_padding as f64 / tokens as f64 };
            paddings[index] = Padding { fewest_rows: before.saturating_add(1), mean: worst / 2.0, worst };
            before = tokens;
        }
    }
    paddings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::mock::{bucket, manifest};

    fn program(buckets: Vec<crate::plan::Bucket>) -> Program {
        manifest(4, 64, 256, 16, buckets).ranks.remove(0)
    }

    #[test]
    fn smallest_that_fits() {
        let buckets = Buckets::new(&program(vec![
            bucket(Phase::Prefill, 4, 2, 2),
            bucket(Phase::Prefill, 16, 4, 4),
            bucket(Phase::Decode, 1, 1, 1),
            bucket(Phase::Decode, 4, 4, 4),
        ]))
        .unwrap();
        assert_eq!(buckets.prefill(4, 2, 2).bucket, 0);
        assert_eq!(buckets.prefill(5, 1, 1).bucket, 1);
        assert_eq!(buckets.prefill(3, 3, 0).bucket, 1, "three sequences do not fit two");
        assert_eq!(buckets.prefill(2, 2, 3).bucket, 1, "three rows with logits do not fit two");
        assert_eq!(buckets.decode(1).bucket, 2);
        assert_eq!(buckets.decode(2).bucket, 3);
        assert_eq!(buckets.largest_decode().decodes(), 4);
        assert_eq!(buckets.largest_prefill().rows_per_sequence, 16);
    }

    #[test]
    fn one_kind_serves_both() {
        let buckets = Buckets::new(&program(vec![bucket(Phase::Prefill, 8, 4, 2)])).unwrap();
        assert_eq!(buckets.largest_decode().decodes(), 2, "the rows with logits are the limit");
        let buckets = Buckets::new(&program(vec![bucket(Phase::Decode, 8, 8, 8)])).unwrap();
        assert_eq!(buckets.largest_prefill().rows_per_sequence, 1);
    }

    #[test]
    fn unusable_buckets_are_errors() {
        for buckets in [vec![], vec![bucket(Phase::Fixed, 1, 1, 1)]] {
            let error = Buckets::new(&program(buckets)).unwrap_err().to_string();
            assert!(error.contains("expected a prefill or a decode bucket"), "{error}");
        }
        let error = Buckets::new(&program(vec![bucket(Phase::Decode, 0, 1, 1)])).unwrap_err().to_string();
        assert!(error.contains("bucket decode_0: expected tokens above 0"), "{error}");
        let error = Buckets::new(&program(vec![bucket(Phase::Prefill, 1 << 40, 1, 1)])).unwrap_err().to_string();
        assert!(error.contains("bucket prefill_1099511627776"), "{error}");
    }

    #[test]
    fn padding_is_that_of_every_row_count() {
        let program = program(vec![
            bucket(Phase::Prefill, 16, 4, 4),
            bucket(Phase::Prefill, 64, 4, 4),
            bucket(Phase::Fixed, 0, 0, 0),
            bucket(Phase::Decode, 1, 1, 1),
            bucket(Phase::Decode, 2, 2, 2),
            bucket(Phase::Decode, 8, 8, 8),
        ]);
        let paddings = padding(&program);
        let fewest: Vec<u64> = paddings.iter().map(|padding| padding.fewest_rows).collect();
        assert_eq!(fewest, [1, 17, 0, 1, 2, 3]);
        assert_eq!(paddings[2], Padding::default());
        for (padding, bucket) in paddings.iter().zip(&program.buckets).filter(|(_, b)| b.phase != Phase::Fixed) {
            let share = |n: u64| (bucket.tokens - n) as f64 / bucket.tokens as f64;
            let shares: Vec<f64> = (padding.fewest_rows..=bucket.tokens).map(share).collect();
            let mean = shares.iter().sum::<f64>() / shares.len() as f64;
            assert!((padding.mean - mean).abs() < 1e-12, "{padding:?}: {mean}");
            assert!((padding.worst - shares[0]).abs() < 1e-12, "{padding:?}");
        }
        assert_eq!(paddings[5].worst, 0.625);
    }

    #[test]
    fn a_second_bucket_of_one_size_has_no_rows_of_its_own() {
        let paddings = padding(&program(vec![bucket(Phase::Decode, 8, 8, 8), bucket(Phase::Decode, 8, 8, 8)]));
        assert_eq!(paddings.iter().map(|padding| padding.fewest_rows).collect::<Vec<_>>(), [1, 9]);
        assert_eq!((paddings[1].mean, paddings[1].worst), (0.0, 0.0));
    }
}
