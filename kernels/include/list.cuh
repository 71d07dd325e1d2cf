// Lists of groups of rows, each of which meets one matrix: by a routing, or all alike.
//
// Generated: COLUMNS, the most rows of a group; SUBS, the entries of a group; GROUP_ROOM, the entries that there is room for.
#pragma once

#include "stage.cuh"

// Rows that share a weight matrix.
struct alignas(16) Group {
    // The matrix; negative if the product is zero.
    int expert;
    // The first row, and how many.
    int first, count;
    // Weight of the product in a sum.
    float weight;
};

// All rows, COLUMNS at a time. The caller synchronises.
__device__ __forceinline__ int all_rows(Group* groups, int rows) {
    for (int g = threadIdx.x; g * COLUMNS < rows; g += THREADS)
        groups[g] = Group{0, g * COLUMNS, min(COLUMNS, rows - g * COLUMNS), 0};
    return (rows + COLUMNS - 1) / COLUMNS;
}

// Each pair of a row and an expert by itself.
__device__ __forceinline__ int each_pair(Group* groups, const int* experts, int pairs) {
#pragma unroll 1
    for (int p = threadIdx.x; p < pairs; p += THREADS) groups[p] = Group{load_early(experts + p), p, 1, 0};
    __syncthreads();
    return pairs;
}

// Each row with its SUBS experts and their weights.
__device__ __forceinline__ int each_row(Group* groups, const int* experts, const float* weights, int rows) {
#pragma unroll 1
    for (int p = threadIdx.x; p < rows * SUBS; p += THREADS)
        groups[p] = Group{load_early(experts + p), p, 1, __int_as_float(load_early((const int*)weights + p))};
    __syncthreads();
    return rows;
}

// Rows sorted by expert, expert e having offsets[e]..offsets[e + 1], COLUMNS at a time: one warp, 32 experts at once.
__device__ __forceinline__ int by_expert(Group* groups, const int* offsets, int experts) {
    __shared__ int count;
    if (warp_id() == 0) {
        int made = 0, lane = lane_id();
        for (int base = 0; base < experts; base += 32) {
            int e = base + lane, start = 0, rows = 0;
            if (e < experts) {
                start = load_early(offsets + e);
                rows = load_early(offsets + e + 1) - start;
            }
            int parts = (rows + COLUMNS - 1) / COLUMNS, through = parts;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                int before = __shfl_up_sync(ALL_LANES, through, step);
                if (lane >= step) through += before;
            }
            for (int p = 0, at = made + through - parts; p < parts && at + p < GROUP_ROOM; p++)
                groups[at + p] = Group{e, start + p * COLUMNS, min(COLUMNS, rows - p * COLUMNS), 0};
            made += __shfl_sync(ALL_LANES, through, 31);
        }
        if (lane == 0) count = min(made, GROUP_ROOM);
    }
    __syncthreads();
    return count;
}
