//! The `lfm2c` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    lfm2c::cli::main()
}
