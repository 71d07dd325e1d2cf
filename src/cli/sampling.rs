//! How tokens are chosen, as options.

use anyhow::Result;

use crate::cli::usage;
use crate::runtime::SamplingParams;

/// Options of commands that generate.
#[derive(clap::Args, Clone, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    temperature: f32,
    /// Samples from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: u32,
    /// Samples from the fewest tokens whose probabilities reach P
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Samples from tokens of at least P times the most likely one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Random numbers are a function of this, of a sequence's place in the input, and of the position
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl Sampling {
    /// What an executor is given.
    ///
    /// # Errors
    /// A number out of range, as a fault of usage.
    pub fn params(&self) -> Result<SamplingParams> {
        let Sampling { temperature, top_k, top_p, min_p, seed } = *self;
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed };
        match params.fault() {
            Some((name, expected, found)) => usage(format!("--{name}: expected a number {expected}, found {found}")),
            None => Ok(params),
        }
    }
}
