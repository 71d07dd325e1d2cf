// Attention of each row over the positions 0..=pos of its slot, for any sizes and types: q [rows, HEADS * D], cache
// [pages, 2, KV_HEADS, PAGE, D], block table [slots, PAGES_PER_SLOT], y [rows, HEADS * D]; zeros in rows without a slot.
//
// A block takes SHARE query heads of one KV head of a row, and CHUNK positions at a time: a warp computes the scores of a
// position, then a warp brings a head's maximum and sum up to date, then each thread adds the values to its own elements of the
// result. Barriers separate the three. Nothing depends on other rows.

#include "attention.cuh"

constexpr int CHUNK = 32, WARPS = THREADS / 32, SHARES = GROUP / SHARE;

extern __shared__ float shared[];

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention(PARAMS) {
    release_next();
    __shared__ i64 places[CHUNK];
    float *queries = shared, *sums = queries + SHARE * D, *scores = sums + SHARE * D;
    float *max = scores + SHARE * CHUNK, *total = max + SHARE, *factor = total + SHARE;
    constexpr int UNITS = KV_HEADS * SHARES;
    i64 row = blockIdx.x / UNITS;
    int unit = blockIdx.x % UNITS, kv_head = unit / SHARES;
    i64 first = row * (HEADS * D) + (kv_head * GROUP + unit % SHARES * SHARE) * D;
    wait_for_previous();
    int position = pos[row], sequence = slot[row];
    int length = position >= 0 && sequence >= 0 ? position + 1 : 0;
    for (int i = threadIdx.x; i < SHARE * D; i += THREADS) {
        queries[i] = to_f32(q[first + i]);
        sums[i] = 0;
    }
    for (int i = threadIdx.x; i < SHARE; i += THREADS) {
        max[i] = -INFINITE;
        total[i] = 0;
    }
    for (int start = 0; start < length; start += CHUNK) {
        int count = min(CHUNK, length - start);
        __syncthreads();
        if (threadIdx.x < count) {
            int at = start + threadIdx.x;
            int page = table[(i64)sequence * PAGES_PER_SLOT + at / PAGE];
            places[threadIdx.x] = keys_of<KV_HEADS, PAGE, D>(page, kv_head) + (i64)(at % PAGE) * D;
        }
        __syncthreads();
        for (int j = warp_id(); j < count; j += WARPS) {
            const KV* key = kv + places[j];
            for (int g = 0; g < SHARE; g++) {
                float dot = 0;
                for (int d = lane_id(); d < D; d += 32) dot += queries[g * D + d] * to_f32(key[d]);
                dot = warp_sum(dot);
                if (lane_id() == 0) scores[g * CHUNK + j] = dot * SCALE;
            }
        }
        __syncthreads();
        for (int g = warp_id(); g < SHARE; g += WARPS) {
            float score = lane_id() < count ? scores[g * CHUNK + lane_id()] : -INFINITE;
            float before = max[g], now = fmaxf(before, warp_max(score)), base = base_of(now);
            float p = expf(score - base);
            float sum = warp_sum(p);
            scores[g * CHUNK + lane_id()] = p;
            __syncwarp();
            if (lane_id() == 0) {
                factor[g] = expf(before - base);
                total[g] = total[g] * factor[g] + sum;
                max[g] = now;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < SHARE * D; i += THREADS) {
            int g = i / D, d = i % D;
            float sum = sums[i] * factor[g];
            for (int j = 0; j < count; j++) {
                sum += scores[g * CHUNK + j] * to_f32(kv[places[j] + values_after_keys<KV_HEADS, PAGE, D>() + d]);
            }
            sums[i] = sum;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SHARE * D; i += THREADS) {
        y[first + i] = from_f32<Y>(length > 0 ? sums[i] / total[i / D] : 0.0f);
    }
}
