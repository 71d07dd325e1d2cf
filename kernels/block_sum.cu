// The sum of BLOCKS blocks of rows, in their order, then the rest of the step: x [BLOCKS * rows, COLUMNS] -> y [rows, COLUMNS]. A thread
// has VECTOR adjacent columns of a row; `count` is the number of such in a block, or with NORM, where the result's rows are normalised
// too, of rows.

#include "normed.cuh"

// Adds up columns that begin `at` elements after the beginning of a block of rows; blocks are `stride` elements apart.
__device__ __forceinline__ void add_up(float (&sum)[VECTOR], const X* x, i64 at, i64 stride) {
    constexpr int BATCH = BLOCKS < 8 ? BLOCKS : 8;
#pragma unroll 1
    for (int first = 0; first < BLOCKS; first += BATCH) {
        Pack<X, VECTOR> part[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (first + b < BLOCKS) part[b] = *(const Pack<X, VECTOR>*)(x + (first + b) * stride + at);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (first + b >= BLOCKS) break;
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                float addend = to_f32(part[b].at[v]);
                sum[v] = first + b == 0 ? addend : __fadd_rn(sum[v], addend);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) block_sum(PARAMS) {
    release_next();
    // Elements of a block of rows.
    const i64 stride = (i64)count * (NORM ? COLUMNS : VECTOR);
    auto add = [&](float (&sum)[VECTOR], i64 row, int column) { add_up(sum, x, row * COLUMNS + column, stride); };
    auto finish = [&](float sum, i64 row, int column) { return EPILOGUE(sum, 0.0f, row, column); };
#if NORM
    make_rows(y, count, normed, norm_weight, add, finish);
#else
    make_rows(y, count, add, finish);
#endif
}
