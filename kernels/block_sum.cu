// The sum of BLOCKS blocks of rows, in their order, then the rest of the step: x [BLOCKS * rows, COLUMNS] -> y [rows, COLUMNS]. A thread
// has VECTOR adjacent columns of a row; `count` is the number of such in a block.
//
// With NORM the result's rows are normalised too, as rms_norm.cu does: a block of threads has whole rows, of which `count` is the number.

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
#if NORM
    const int column = threadIdx.x * VECTOR;
    const bool active = WHOLE || column < COLUMNS;
    Pack<W, VECTOR> scales;
    if (active) scales = *(const Pack<W, VECTOR>*)(norm_weight + column);
    wait_for_previous();
    for (i64 row = blockIdx.x; row < count; row += gridDim.x) {
        Pack<Y, VECTOR> out;
        float squares = 0;
        if (active) {
            float sum[VECTOR];
            add_up(sum, x, row * COLUMNS + column, (i64)count * COLUMNS);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                out.at[v] = from_f32<Y>(EPILOGUE(sum[v], 0.0f, row, column + v));
                squares = fmaf(to_f32(out.at[v]), to_f32(out.at[v]), squares);
            }
            *(Pack<Y, VECTOR>*)(y + row * COLUMNS + column) = out;
        }
        store_normed(normed + row * COLUMNS + column, out, squares, scales, active);
    }
#else
    wait_for_previous();
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        i64 row = i / (COLUMNS / VECTOR);
        int column = (int)(i % (COLUMNS / VECTOR)) * VECTOR;
        float sum[VECTOR];
        add_up(sum, x, i * VECTOR, (i64)count * VECTOR);
        Pack<Y, VECTOR> out;
#pragma unroll
        for (int v = 0; v < VECTOR; v++) out.at[v] = from_f32<Y>(EPILOGUE(sum[v], 0.0f, row, column + v));
        *(Pack<Y, VECTOR>*)(y + row * COLUMNS + column) = out;
    }
#endif
}
