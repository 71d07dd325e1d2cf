// The weighted sum over a token's CHOSEN experts, then the rest of the step: `source` [tokens, CHOSEN, COLUMNS], or with
// GROUPED its rows [tokens * CHOSEN, COLUMNS] in the order of `places`; weights and places [tokens, CHOSEN] -> [tokens, COLUMNS].
// Pairs of a negative place (or expert) are left out and their rows not read. A thread has VECTOR adjacent columns of a
// token; `count` is the number of such. Every thread writes what no other writes.
//
// With NORM the result's rows are normalised too, as rms_norm.cu does: a block has whole tokens, of which `count` is the number.

#include "normed.cuh"

// Adds up adjacent columns of a token's pairs, in the order of its choices.
template <class S, class F, class I>
__device__ __forceinline__ void add_up(float (&sum)[VECTOR], const S* source, const F* weights, const I* places, i64 token, int column) {
    constexpr int BATCH = CHOSEN < 8 ? CHOSEN : 8;
#pragma unroll 1
    for (int first = 0; first < CHOSEN; first += BATCH) {
        Pack<X, VECTOR> row[BATCH];
        float weight[BATCH];
        int place[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            bool inside = first + j < CHOSEN;
            i64 pair = token * CHOSEN + first + j;
            place[j] = inside ? places[pair] : -1;
            weight[j] = inside ? to_f32(weights[pair]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            i64 from = GROUPED ? place[j] : token * CHOSEN + first + j;
            if (place[j] >= 0) row[j] = *(const Pack<X, VECTOR>*)(source + from * COLUMNS + column);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (place[j] < 0) continue;
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                sum[v] = __fadd_rn(sum[v], __fmul_rn(weight[j], to_f32(row[j].at[v])));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) weighted_sum(PARAMS) {
    release_next();
#if NORM
    const int column = threadIdx.x * VECTOR;
    const bool active = WHOLE || column < COLUMNS;
    Pack<W, VECTOR> scales;
    if (active) scales = *(const Pack<W, VECTOR>*)(norm_weight + column);
    wait_for_previous();
    for (i64 token = blockIdx.x; token < count; token += gridDim.x) {
        Pack<Y, VECTOR> out;
        float squares = 0;
        if (active) {
            float sum[VECTOR] = {};
            add_up(sum, source, weights, places, token, column);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                out.at[v] = from_f32<Y>(EPILOGUE(sum[v], 0.0f, token, column + v));
                squares = fmaf(to_f32(out.at[v]), to_f32(out.at[v]), squares);
            }
            *(Pack<Y, VECTOR>*)(y + token * COLUMNS + column) = out;
        }
        store_normed(normed + token * COLUMNS + column, out, squares, scales, active);
    }
#else
    wait_for_previous();
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        i64 token = i / (COLUMNS / VECTOR);
        int column = (int)(i % (COLUMNS / VECTOR)) * VECTOR;
        float sum[VECTOR] = {};
        add_up(sum, source, weights, places, token, column);
        Pack<Y, VECTOR> out;
#pragma unroll
        for (int v = 0; v < VECTOR; v++) out.at[v] = from_f32<Y>(EPILOGUE(sum[v], 0.0f, token, column + v));
        *(Pack<Y, VECTOR>*)(y + token * COLUMNS + column) = out;
    }
#endif
}
