//! Which tokens are scored, and what the scores say.

use crate::runtime::Scored;

/// A text's tokens in chunks of the same length.
pub struct Chunks {
    tokens: Vec<u32>,
    context: usize,
    count: usize,
    first: usize,
}

impl Chunks {
    /// Whole chunks of the tokens, at most so many; `before` is what each begins with, in place of its own first tokens.
    pub fn new(mut tokens: Vec<u32>, before: &[u32], context: usize, all: bool, most: Option<usize>) -> Self {
        let count = (tokens.len() / context).min(most.unwrap_or(usize::MAX));
        let before = &before[..before.len().min(context)];
        tokens.chunks_exact_mut(context).for_each(|chunk| chunk[..before.len()].copy_from_slice(before));
        Chunks { tokens, context, count, first: if all { 0 } else { context / 2 } }
    }

    /// Number of chunks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Tokens of the text.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The first position whose logits are scored: they are of the token behind it.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Scored tokens of a chunk.
    fn scored(&self) -> usize {
        self.context - 1 - self.first
    }

    /// What to run: each chunk but for its last token, which nothing follows.
    pub fn prompts(&self) -> impl Iterator<Item = Vec<u32>> {
        self.tokens.chunks_exact(self.context).take(self.count).map(|chunk| chunk[..self.context - 1].to_vec())
    }

    /// The token behind a position.
    pub fn next(&self, at: &Scored) -> u32 {
        self.tokens[at.prompt * self.context + at.position + 1]
    }
}

/// -ln p of a token by its logits, in f64.
pub fn surprise(logits: &[f32], token: u32) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    sum.ln() + largest - f64::from(logits[token as usize])
}

/// -ln p of each scored token, in the order of the text, so that sums do not depend on what ran when.
pub struct Scores {
    surprises: Vec<f64>,
    per_chunk: usize,
    first: usize,
    /// Sum and number of those that are there, for a look on the way.
    sum: f64,
    put: usize,
}

/// What the scores say of the model.
pub struct Estimate {
    /// exp of the mean.
    pub perplexity: f64,
    /// Its standard error.
    pub error: f64,
    /// Mean of -ln p.
    pub mean: f64,
    /// Its standard error.
    pub mean_error: f64,
}

impl Scores {
    /// Room for the scores of all chunks.
    pub fn new(chunks: &Chunks) -> Self {
        let per_chunk = chunks.scored();
        Scores { surprises: vec![f64::NAN; chunks.count * per_chunk], per_chunk, first: chunks.first, sum: 0.0, put: 0 }
    }

    /// Keeps a score.
    pub fn put(&mut self, at: &Scored, surprise: f64) {
        self.surprises[at.prompt * self.per_chunk + at.position - self.first] = surprise;
        self.sum += surprise;
        self.put += 1;
    }

    /// Whether a position is its chunk's last.
    pub fn is_last(&self, at: &Scored) -> bool {
        at.position + 1 - self.first == self.per_chunk
    }

    /// Number of scores in the end.
    pub fn count(&self) -> usize {
        self.surprises.len()
    }

    /// Number of scores that are there.
    pub fn count_so_far(&self) -> usize {
        self.put
    }

    /// Mean of those that are there.
    pub fn mean(&self) -> f64 {
        self.sum / self.put as f64
    }

    /// The result; none if it is no number.
    pub fn estimate(&self) -> Option<Estimate> {
        let count = self.surprises.len() as f64;
        let mean = self.surprises.iter().sum::<f64>() / count;
        let variance = self.surprises.iter().map(|surprise| (surprise - mean).powi(2)).sum::<f64>() / count;
        // Of the mean: the variance is divided by one less, as the mean is taken from the same numbers.
        let mean_error = if count > 1.0 { (variance / (count - 1.0)).sqrt() } else { 0.0 };
        let perplexity = mean.exp();
        mean.is_finite().then_some(Estimate { perplexity, error: mean_error * perplexity, mean, mean_error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(prompt: usize, position: usize) -> Scored {
        Scored { prompt, position }
    }

    #[test]
    fn a_chunk_begins_with_the_first_token_and_its_second_half_is_scored() {
        let chunks = Chunks::new((100..117).collect(), &[1], 8, false, None);
        assert_eq!((chunks.count(), chunks.first(), chunks.scored()), (2, 4, 3));
        let prompts: Vec<Vec<u32>> = chunks.prompts().collect();
        assert_eq!(prompts, [[1, 101, 102, 103, 104, 105, 106], [1, 109, 110, 111, 112, 113, 114]]);
        assert_eq!((chunks.next(&at(0, 4)), chunks.next(&at(1, 6))), (105, 115));
        let all = Chunks::new((100..117).collect(), &[], 8, true, Some(1));
        assert_eq!((all.count(), all.first(), all.scored()), (1, 0, 7));
        assert_eq!(all.prompts().next().expect("a chunk")[0], 100);
        assert_eq!(Chunks::new(vec![1; 7], &[1], 8, false, None).count(), 0);
    }

    #[test]
    fn scores_are_those_of_a_uniform_guess() {
        let logits = [1000.0_f32; 32];
        assert!((surprise(&logits, 3) - 32f64.ln()).abs() < 1e-12);
        assert!((surprise(&[0.0, -1e30], 1) - 1e30).abs() < 1e23);
        assert!((surprise(&[2.0, 0.0], 0) - (1.0 + (-2f64).exp()).ln()).abs() < 1e-12);
    }

    #[test]
    fn the_error_is_that_of_the_mean() {
        let chunks = Chunks::new(vec![0; 10], &[], 5, false, None);
        let mut scores = Scores::new(&chunks);
        assert!(scores.estimate().is_none());
        // Out of order, as several sequences at a time give them.
        for (at, surprise) in [(at(1, 2), 3.0), (at(0, 2), 1.0), (at(0, 3), 2.0), (at(1, 3), 4.0)] {
            scores.put(&at, surprise);
        }
        assert!(scores.is_last(&at(0, 3)) && !scores.is_last(&at(0, 2)));
        let found = scores.estimate().expect("numbers");
        assert_eq!(found.mean, 2.5);
        // The variance of 1, 2, 3, 4 is 5/4; of their mean, 5/12.
        assert!((found.mean_error - (5f64 / 12.0).sqrt()).abs() < 1e-12);
        assert!((found.error - found.mean_error * 2.5f64.exp()).abs() < 1e-12);
    }
}
