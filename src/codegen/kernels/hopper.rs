//! What an H100 or H200 has, as far as shapes of kernels depend on it.

/// Multiprocessors.
pub const PROCESSORS: u64 = 132;
/// Shared memory of a block, in bytes, at the most.
pub const MOST_SHARED: u64 = 232_448;
/// Shared memory of a multiprocessor, in bytes, which its blocks share,
pub const ALL_SHARED: u64 = 233_472;
/// and what the system takes of it for each block.
pub const SYSTEM_SHARED: u64 = 1024;
