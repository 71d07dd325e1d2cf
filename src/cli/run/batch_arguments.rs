//! Options that only `run --input` has.

use std::path::PathBuf;

/// Options that only `--input` has.
#[derive(clap::Args, Debug, Default)]
pub struct BatchArguments {
    /// Prompts from a file, `-` for standard input: JSON lines; or samples, FILE.bin
    ///
    /// Each JSON line is an object with one of `tokens`, a list of ids, `prompt`, a text, and `messages`, a list of objects
    /// with `role` and `content`, for the chat template. Besides, it may have `max_new_tokens`, `temperature`, `top_k`, `top_p`,
    /// `min_p`, `seed`, `stop` (a text or a list) and `ignore_eos`, which the options of those names are the defaults of, and
    /// `id`, any JSON, which its result repeats. A line that cannot run gives {"error": ...} in its place and stops no other;
    /// the exit code is 1 then.
    ///
    /// FILE.bin, little-endian: int32 count, int32 length, int32 tokens [count, length]. Each sample runs as a prompt of one
    /// new token; the time of all and the tokens a second are told, after a few samples that do not count. `lfm2c samples` makes such files.
    #[arg(long, value_name = "FILE.jsonl|FILE.bin")]
    pub input: Option<PathBuf>,
    /// With --input: only the first N lines or samples
    #[arg(short = 'n', value_name = "N", requires = "input")]
    pub first: Option<usize>,
    /// With --input: JSON lines to a file, each as soon as it and those before it are there; of FILE.bin, the answers
    #[arg(long, value_name = "FILE.jsonl|FILE.bin", requires = "input")]
    pub output: Option<PathBuf>,
    /// With --output: goes on where an earlier run of the same input was interrupted
    ///
    /// Results that are there are kept if they are of the same lines, options and plan; else nothing runs. A last line that is
    /// torn is cut away. Lines that could not run count as done.
    #[arg(long, requires = "output")]
    pub resume: bool,
    /// With --resume: also runs the lines that could not run, which may have been corrected
    #[arg(long, requires = "resume")]
    pub retry_errors: bool,
    /// With --input FILE.bin: compares with these answers, float32 [count, vocab], the logits of each sample's last position
    #[arg(long, value_name = "FILE.bin", requires = "input")]
    pub validate: Option<PathBuf>,
    /// With --validate: the largest difference of a logit that is VALID
    #[arg(long, value_name = "X", requires = "validate", default_value_t = 1e-3)]
    pub tolerance: f64,
    /// With --input FILE.bin: runs this plan of the same model too, and tells how many times as fast it is
    #[arg(long, value_name = "PLAN", requires = "input")]
    pub compare: Option<PathBuf>,
}
