// y = x / sqrt(mean(x^2) + EPS), rounded to the type of x, times weight: over groups of D adjacent elements, of which a row has
// PER_ROW. With GATHER, row r of the result is made of row `rows[r]` of x, and is zero where that is negative.
//
// LANES threads share a group, PACKS packs of VECTOR elements: a part of a warp, or the whole block. Each keeps its packs in
// registers between the sum and the division, unless they are too many and are read again. The sum's order depends on the
// constants alone. Groups share nothing.

constexpr int PACKS = D / VECTOR;
constexpr int EACH = (PACKS + LANES - 1) / LANES;
constexpr bool KEPT = EACH <= 8;

typedef Pack<X, VECTOR> PackX;
typedef Pack<W, VECTOR> PackW;
typedef Pack<Y, VECTOR> PackY;

__device__ __forceinline__ PackX load(const X* from, int pack) {
    PackX x;
    if (from && (EACH * LANES == PACKS || pack < PACKS)) return *(const PackX*)(from + pack * VECTOR);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) x.at[j] = X{};
    return x;
}

__device__ __forceinline__ float squares(PackX x, float sum) {
#pragma unroll
    for (int j = 0; j < VECTOR; j++) sum = fmaf(to_f32(x.at[j]), to_f32(x.at[j]), sum);
    return sum;
}

__device__ __forceinline__ void store(Y* to, int pack, PackX x, PackW weight, float scale) {
    PackY y;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        y.at[j] = from_f32<Y>(__fmul_rn(rounded<X>(__fmul_rn(to_f32(x.at[j]), scale)), to_f32(weight.at[j])));
    }
    *(PackY*)(to + pack * VECTOR) = y;
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(PARAMS) {
    release_next();
    if (blockIdx.x == 0 && threadIdx.x < PACKS) prefetch(weight + threadIdx.x * VECTOR);
    wait_for_previous();
    __shared__ float scratch[32];
    int lane = threadIdx.x % LANES;
    i64 group = (i64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    bool active = group < groups;
    // A group past the last is summed as zeros, because sums take whole warps.
    const X* from = active ? x + group * D : nullptr;
#if GATHER
    if (active) {
        int row = rows[group / PER_ROW];
        from = (u32)row < (u32)x_rows ? x + ((i64)row * PER_ROW + group % PER_ROW) * D : nullptr;
    }
#endif
    PackX held[KEPT ? EACH : 1];
    PackW weights[KEPT ? EACH : 1];
    float sum = 0;
    if constexpr (KEPT) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int pack = lane + e * LANES;
            held[e] = load(from, pack);
            if (EACH * LANES == PACKS || pack < PACKS) weights[e] = *(const PackW*)(weight + pack * VECTOR);
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) sum = squares(held[e], sum);
    } else {
        for (int pack = lane; pack < PACKS; pack += LANES) sum = squares(load(from, pack), sum);
    }
    if constexpr (LANES <= WARP) {
        sum = warp_sum<LANES>(sum);
    } else {
        sum = block_sum(sum, scratch);
    }
    if (!active) return;
    float scale = 1.0f / sqrtf(__fadd_rn(sum / (float)D, EPS));
    Y* to = y + group * D;
    if constexpr (KEPT) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int pack = lane + e * LANES;
            if (EACH * LANES == PACKS || pack < PACKS) store(to, pack, held[e], weights[e], scale);
        }
    } else {
        for (int pack = lane; pack < PACKS; pack += LANES) {
            store(to, pack, load(from, pack), *(const PackW*)(weight + pack * VECTOR), scale);
        }
    }
}
