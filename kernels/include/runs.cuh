// How attention of packed rows is divided: what a block works on, and which of its rows share a pass over a slot's positions.
//
// Generated: KV_HEADS, GROUP, SHARE.
#pragma once

#include "attention.cuh"

// Parts of a KV head's query heads, and parts of all heads, for each ROWS rows.
constexpr int SHARES = GROUP / SHARE, UNITS = KV_HEADS * SHARES;

// What a block works on: ROWS rows that follow each other, with SHARE query heads of one KV head.
struct Part {
    int kv_head, first_head, first_row;
};

template <int ROWS> __device__ __forceinline__ Part part_of(int block, int rows) {
    const int unit = block % UNITS, kv_head = unit / SHARES;
    // Later rows are of later positions and take longer: they start first.
    return {kv_head, kv_head * GROUP + unit % SHARES * SHARE, ((rows + ROWS - 1) / ROWS - 1 - block / UNITS) * ROWS};
}

// Finds slots and positions of the block's rows; a row without one of the two, or none at all, has no slot. The caller
// synchronises.
template <int ROWS>
__device__ __forceinline__ void find_rows(int* slots, int* positions, const int* slot, const int* pos, int first_row, int rows) {
    for (int i = (int)threadIdx.x; i < ROWS; i += THREADS) {
        const int row = first_row + i;
        positions[i] = row < rows ? pos[row] : -1;
        slots[i] = row < rows && positions[i] >= 0 ? slot[row] : -1;
    }
}

// Rows of the block from one on that are of one slot: where they end, and their largest position.
struct Run {
    int slot, end, last;
};

// The same in all lanes of a warp, which call it together.
template <int ROWS> __device__ __forceinline__ Run run_from(int first, const int* slots, const int* positions) {
    const int lane = (int)lane_id();
    Run run = {slots[first], ROWS, -1};
    for (int i = first; i < ROWS; i += 32) {
        const int at = i + lane;
        const u32 others = __ballot_sync(ALL_LANES, at >= ROWS || slots[at < ROWS ? at : first] != run.slot);
        const int end = others ? i + __ffs(others) - 1 : i + 32;
        if (at < end) run.last = max(run.last, positions[at]);
        if (others) {
            run.end = end;
            break;
        }
    }
    run.last = warp_largest(run.last);
    return run;
}

// The smallest and the largest position of some rows; of none, a large one and -1.
struct Reach {
    int lowest, highest;
};

// Of those of the COUNT rows from `from` on that are from `first` up to `end`, the same in all lanes of a warp, which call it
// together.
template <int COUNT> __device__ __forceinline__ Reach reach_of(int from, int first, int end, const int* positions) {
    Reach reach = {0x3fffffff, -1};
    for (int i = (int)lane_id(); i < COUNT; i += 32) {
        const int row = from + i;
        if (row < first || row >= end) continue;
        reach.lowest = min(reach.lowest, positions[row]);
        reach.highest = max(reach.highest, positions[row]);
    }
    reach.lowest = -warp_largest(-reach.lowest);
    reach.highest = warp_largest(reach.highest);
    return reach;
}
