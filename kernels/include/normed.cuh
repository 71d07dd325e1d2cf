// The RMSNorm of a row that a block has just made, as rms_norm.cu computes it: a thread has VECTOR adjacent columns of it, if it is active.
//
// Generated where NORM: COLUMNS, VECTOR, EPS, types W and N of the norm's weight and result.
#pragma once

#include "block.cuh"

#if NORM
// A row is a block's: a thread has one pack of its columns, if there are so many.
constexpr bool WHOLE = THREADS * VECTOR == COLUMNS;

// `made` as it was stored, with the sum of the squares of its elements; all threads of the block call it.
template <class Y>
__device__ __forceinline__ void store_normed(N* to, const Pack<Y, VECTOR>& made, float squares, const Pack<W, VECTOR>& scales, bool active) {
    __shared__ float scratch[32];
    squares = block_sum(squares, scratch);
    float scale = 1.0f / sqrtf(__fadd_rn(squares / (float)COLUMNS, EPS));
    if (!active) return;
    Pack<N, VECTOR> normal;
#pragma unroll
    for (int v = 0; v < VECTOR; v++)
        normal.at[v] = from_f32<N>(__fmul_rn(rounded<Y>(__fmul_rn(to_f32(made.at[v]), scale)), to_f32(scales.at[v])));
    *(Pack<N, VECTOR>*)to = normal;
}
#endif
