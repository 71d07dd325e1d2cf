//! Plans on a GPU against the CPU executor, step by step, and against themselves.
//!
//! `cargo test --test gpu` says that it skipped everything where no GPU is present, and succeeds; with `LFM2C_REQUIRE_GPU=1` that
//! is a failure. The tests of `tests/models` run on the GPU with `LFM2C_TEST_DEVICE=cuda`.

mod bits;
mod exchange;
mod library;
mod load;
mod models;
mod pack;
mod precision;
mod sessions;
mod spread;
mod steps;
mod tune;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let devices = lfm2c::cuda::Device::count();
    if devices == 0 {
        if std::env::var_os("LFM2C_REQUIRE_GPU").is_some() {
            eprintln!("no GPU: LFM2C_REQUIRE_GPU is set, expected one");
            return ExitCode::FAILURE;
        }
        println!("skipped: no GPU, none of the tests of tests/gpu ran");
        return ExitCode::SUCCESS;
    }
    // One device: tests take turns unless told otherwise, and each compiles its kernels on all cores.
    let arguments = Arguments { test_threads: arguments.test_threads.or(Some(1)), ..arguments };
    let mut trials: Vec<Trial> = vec![];
    trials.extend(load::trials());
    trials.extend(pack::trials());
    trials.extend(steps::trials());
    trials.extend(library::trials());
    trials.extend(precision::trials());
    trials.extend(bits::trials());
    trials.extend(sessions::trials());
    trials.extend(spread::trials());
    trials.extend(tune::trials());
    let together = libtest_mimic::run(&arguments, trials);
    // Ranks on one GPU wait for each other there, for which all of their blocks must run at once: nothing else does beside them.
    let alone = libtest_mimic::run(&Arguments { test_threads: Some(1), ..arguments }, exchange::trials());
    if together.has_failed() { together.exit_code() } else { alone.exit_code() }
}
