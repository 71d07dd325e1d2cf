// The weighted sum over a token's CHOSEN experts, then the rest of the step: `source` [tokens, CHOSEN, COLUMNS], or with
// GROUPED its rows [tokens * CHOSEN, COLUMNS] in the order of `places`; weights and places [tokens, CHOSEN] -> [tokens, COLUMNS].
// Pairs of a negative place (or expert) are left out and their rows not read. A thread has VECTOR adjacent columns of a
// token; `count` is the number of such, or with NORM, where the result's rows are normalised too, of tokens.

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
    auto add = [&](float (&sum)[VECTOR], i64 token, int column) { add_up(sum, source, weights, places, token, column); };
    auto finish = [&](float sum, i64 row, int column) { return EPILOGUE(sum, 0.0f, row, column); };
#if NORM
    make_rows(y, count, normed, norm_weight, add, finish);
#else
    make_rows(y, count, add, finish);
#endif
}
