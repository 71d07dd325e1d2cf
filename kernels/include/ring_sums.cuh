// Sums of warps of ring.cu that multiply on tensor cores, and where their rows of x lie.
#pragma once

#include "bulk.cuh"
#include "eight.cuh"

// Weights are the right operand, of eight columns; x is the left one. Each of CHAINS chains of products has its own sums.
template <int CHAINS> struct MmaSums {
    static constexpr int LOADS = 1;
    float sums[CHAINS][4];

    static __device__ __forceinline__ int lane_row() { return lane_id() / 4; }
    static __device__ __forceinline__ int lane_k() { return lane_id() % 4 * 8; }

    // Rows of x are an odd number of 64 bytes apart, so that eight lanes, of two rows, read different banks.
    static __device__ __forceinline__ S* at(S* to, int r, int k) { return to + r * PITCH + k; }
    static __device__ __forceinline__ void put(S* to, int r, int k, const float (&values)[8]) {
        Eight<S> eight;
        eight.set(values);
        *(Eight<S>*)at(to, r, k) = eight;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < CHAINS * 4; i++) sums[i / 4][i % 4] = 0;
    }

    // Leaves the warp's sums, in lines of a tile for each row of x.
    __device__ __forceinline__ void store(float* to, int count) {
#pragma unroll
        for (int half = 0; half < (COLUMNS > 8 ? 2 : 1); half++) {
            int row = lane_row() + half * 8, column = lane_id() % 4 * 2, i = half * 2;
            Pack<float, 2> sum;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                sum.at[e] = sums[0][i + e] + sums[1][i + e];
                if (CHAINS == 4) sum.at[e] += sums[CHAINS - 2][i + e] + sums[CHAINS - 1][i + e];
            }
            if (row < count) *(Pack<float, 2>*)(to + row * TILE + column) = sum;
        }
    }
};
