// The stable sort of pairs by expert.
#pragma once

#include "cluster.cuh"
#include "block.cuh"

// The lanes whose expert is this lane's; any where it is negative.
template <int EXPERTS> __device__ __forceinline__ u32 same_expert(int expert) {
    u32 same = __ballot_sync(ALL_LANES, expert >= 0);
#pragma unroll
    for (int bit = 1; bit < EXPERTS; bit *= 2) {
        u32 set = __ballot_sync(ALL_LANES, (expert & bit) != 0);
        same &= expert & bit ? set : ~set;
    }
    return same;
}

// Words of shared memory that the sort needs.
constexpr int group_scratch(int experts, int warps) { return (warps + 2) * experts + 1; }

// An array whose elements are computed.
template <class Function> struct ByPair {
    Function function;
    __device__ __forceinline__ int operator[](int pair) const { return function(pair); }
};
template <class Function> __device__ __forceinline__ ByPair<Function> by_pair(Function function) { return {function}; }

// Sorts pairs 0..count, of which `experts` has each one's expert or -1: `pairs` gets them in the order of expert, then of
// themselves, then -1; `places` each one's place there, or -1; `offsets [EXPERTS + 1]` where each expert's begin. All threads
// of a cluster of N blocks of WARPS warps call it.
//
// Each warp has a run of adjacent pairs. It counts its experts; counts are summed up over warps, blocks and experts; then it
// goes over its run again and gives places, counting on from those sums. A warp touches no other warp's counts meanwhile.
template <int EXPERTS, int WARPS, int N, class Experts>
__device__ void group_pairs(const Experts experts, int count, int* pairs, int* places, int* offsets, int* scratch) {
    constexpr int BATCH = 4;
    int *counts = scratch, *totals = counts + WARPS * EXPERTS, *starts = totals + EXPERTS;
    int *mine = counts + warp_id() * EXPERTS, lane = lane_id();
    u32 rank = cluster_rank<N>(), below = (1u << lane) - 1;
    int strip = (count + N * WARPS * WARP - 1) / (N * WARPS * WARP) * WARP;
    int first = (int)(rank * WARPS + warp_id()) * strip;
    int end = min(first + strip, count);

    for (int i = threadIdx.x; i < WARPS * EXPERTS; i += WARPS * WARP) counts[i] = 0;
    __syncthreads();
    for (int batch = first; batch < end; batch += BATCH * WARP) {
        int chosen[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int pair = batch + i * WARP + lane;
            chosen[i] = pair < end ? experts[pair] : -1;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            u32 same = same_expert<EXPERTS>(chosen[i]);
            if (chosen[i] >= 0 && (same & below) == 0) mine[chosen[i]] += __popc(same);
            __syncwarp();
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += WARPS * WARP) {
        int sum = 0;
        for (int w = 0; w < WARPS; w++) {
            int n = counts[w * EXPERTS + e];
            counts[w * EXPERTS + e] = sum;
            sum += n;
        }
        totals[e] = sum;
    }
    cluster_sync<N>();
    if (warp_id() == 0) {
        int begin = 0;
        for (int base = 0; base < EXPERTS; base += WARP) {
            int e = base + lane, earlier = 0, all = 0;
            if (e < EXPERTS) {
#pragma unroll
                for (u32 r = 0; r < N; r++) {
                    int n = N > 1 ? load_remote(totals + e, r) : totals[e];
                    if (r < rank) earlier += n;
                    all += n;
                }
            }
            int through = all;
#pragma unroll
            for (int step = 1; step < (int)WARP; step *= 2) {
                int n = __shfl_up_sync(ALL_LANES, through, step);
                if (lane >= step) through += n;
            }
            if (e < EXPERTS) {
                starts[e] = begin + through - all + earlier;
                if (rank == 0) offsets[e] = begin + through - all;
            }
            begin += __shfl_sync(ALL_LANES, through, WARP - 1);
        }
        if (lane == 0) {
            starts[EXPERTS] = begin;
            if (rank == 0) offsets[EXPERTS] = begin;
        }
    }
    // This block has read the others' totals.
    cluster_arrive<N>();
    __syncthreads();
    for (int batch = first; batch < end; batch += BATCH * WARP) {
        int chosen[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int pair = batch + i * WARP + lane;
            chosen[i] = pair < end ? experts[pair] : -1;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int pair = batch + i * WARP + lane, place = -1;
            u32 same = same_expert<EXPERTS>(chosen[i]);
            if (chosen[i] >= 0) place = starts[chosen[i]] + mine[chosen[i]] + __popc(same & below);
            __syncwarp();
            if (chosen[i] >= 0 && (same & below) == 0) mine[chosen[i]] += __popc(same);
            __syncwarp();
            if (pair < end) places[pair] = place;
            if (place >= 0) pairs[place] = pair;
        }
    }
    for (int i = starts[EXPERTS] + (int)(rank * WARPS * WARP + threadIdx.x); i < count; i += N * WARPS * WARP) pairs[i] = -1;
    cluster_wait<N>();
}

// The same for no more than PAIRS pairs, at most a warp's lanes: one warp, without any barrier. A lane has a pair and counts those
// that come before it.
template <int EXPERTS, int PAIRS>
__device__ __forceinline__ void
group_few_pairs(const int* experts, int count, int* pairs, int* places, int* offsets) {
    static_assert(PAIRS <= (int)WARP);
    constexpr int OFFSETS = (EXPERTS + (int)WARP - 1) / (int)WARP;
    const int lane = lane_id(), expert = lane < count ? experts[lane] : -1;
    // Keys are in the order of the result; without an expert, last.
    const u32 key = expert >= 0 ? expert * WARP + lane : ~0u;
    int place = 0, before[OFFSETS] = {};
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        u32 other = __shfl_sync(ALL_LANES, key, i);
        place += other < key;
#pragma unroll
        for (int j = 0; j < OFFSETS; j++) before[j] += other < (j * WARP + lane) * WARP;
    }
    const int all = __popc(__ballot_sync(ALL_LANES, expert >= 0));
#pragma unroll
    for (int j = 0; j < OFFSETS; j++)
        if (j * (int)WARP + lane < EXPERTS) offsets[j * WARP + lane] = before[j];
    if (lane == 0) offsets[EXPERTS] = all;
    if (lane < count) places[lane] = expert >= 0 ? place : -1;
    if (expert >= 0) pairs[place] = lane;
    if (lane >= all && lane < count) pairs[lane] = -1;
}
