#!/usr/bin/env bash
# All tests that need a GPU. Where there is none it says so and that nothing ran; LFM2C_REQUIRE_GPU=1 makes that a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo test --release --locked --test gpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    # Kernels of few rows with packed weights.
    LFM2C_TEST_PACK=1 cargo test --release --locked --test gpu -- bf16 --skip candidates --skip load
    LFM2C_TEST_DEVICE=cuda cargo test --release --locked --test models -- --test-threads 4
fi
