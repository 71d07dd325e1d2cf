// Rows that a kernel makes element by element, and where NORM, their RMSNorm as rms_norm.cu computes it.
//
// `add(sum, row, column)` adds up VECTOR adjacent columns of a row, and `finish(sum, row, column)` is the result's element for a sum. Every
// thread writes what no other writes.
//
// Generated: COLUMNS, VECTOR, NORM; if so, EPS, and the types W and N of the norm's weight and result.
#pragma once

#include "block.cuh"

#if NORM
// A row is a block's: a thread has one pack of its columns, if there are so many. `count` is the number of rows.
template <class Y, class Add, class Finish>
__device__ __forceinline__ void make_rows(Y* y, int count, N* normed, const W* norm_weight, Add add, Finish finish) {
    constexpr bool WHOLE = THREADS * VECTOR == COLUMNS;
    __shared__ float scratch[32];
    const int column = threadIdx.x * VECTOR;
    const bool active = WHOLE || column < COLUMNS;
    Pack<W, VECTOR> scales;
    if (active) scales = *(const Pack<W, VECTOR>*)(norm_weight + column);
    wait_for_previous();
    for (i64 row = blockIdx.x; row < count; row += gridDim.x) {
        Pack<Y, VECTOR> out;
        float squares = 0;
        if (active) {
            float sum[VECTOR] = {};
            add(sum, row, column);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                out.at[v] = from_f32<Y>(finish(sum[v], row, column + v));
                squares = fmaf(to_f32(out.at[v]), to_f32(out.at[v]), squares);
            }
            *(Pack<Y, VECTOR>*)(y + row * COLUMNS + column) = out;
        }
        squares = block_sum(squares, scratch);
        float scale = 1.0f / sqrtf(__fadd_rn(squares / (float)COLUMNS, EPS));
        if (!active) continue;
        Pack<N, VECTOR> normal;
#pragma unroll
        for (int v = 0; v < VECTOR; v++)
            normal.at[v] = from_f32<N>(__fmul_rn(rounded<Y>(__fmul_rn(to_f32(out.at[v]), scale)), to_f32(scales.at[v])));
        *(Pack<N, VECTOR>*)(normed + row * COLUMNS + column) = normal;
    }
}
#else
// `count` is the number of packs of columns, of all rows.
template <class Y, class Add, class Finish>
__device__ __forceinline__ void make_rows(Y* y, int count, Add add, Finish finish) {
    wait_for_previous();
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        i64 row = i / (COLUMNS / VECTOR);
        int column = (int)(i % (COLUMNS / VECTOR)) * VECTOR;
        float sum[VECTOR] = {};
        add(sum, row, column);
        Pack<Y, VECTOR> out;
#pragma unroll
        for (int v = 0; v < VECTOR; v++) out.at[v] = from_f32<Y>(finish(sum[v], row, column + v));
        *(Pack<Y, VECTOR>*)(y + row * COLUMNS + column) = out;
    }
}
#endif
