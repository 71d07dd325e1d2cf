//! The `lfm2c` command.

fn main() {}
