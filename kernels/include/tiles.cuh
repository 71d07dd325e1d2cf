// Which tile of a product a block computes: the order of the blocks, and the groups of rows.
#pragma once

#include "block.cuh"

// Position of this block's tile, counted in tiles.
struct TileAt {
    int row, column;
};

// The block's tile of a result that is COLUMNS tiles wide. Blocks that run at the same time should share what they read, so
// the tiles are taken by bands of HEIGHT rows of tiles, and column by column inside a band.
template <int COLUMNS, int HEIGHT> __device__ __forceinline__ TileAt tile_of_block() {
    int block = (int)blockIdx.x, height = (int)gridDim.x / COLUMNS;
    int band = block / (HEIGHT * COLUMNS), inside = block % (HEIGHT * COLUMNS);
    int first = band * HEIGHT;
    int here = min(HEIGHT, height - first);
    return {first + inside % here, inside / here};
}

// Rows [start, end) of one group; a tile has the first of them, as many as it holds.
struct GroupPart {
    int group, start, end;
};

// The part of the rows that row tile `tile` has, where group g has rows offsets[g] .. offsets[g + 1] and tiles of ROWS rows
// of its own. The rows past the last group, up to `rows`, are group GROUPS. There are fewer tiles than blocks may be there
// for: then the group is -1. All lanes of a warp must call it alike.
template <int GROUPS, int ROWS> __device__ __forceinline__ GroupPart find_part(const int* offsets, int tile, int rows) {
    int before = 0;
    for (int base = 0; base <= GROUPS; base += (int)WARP) {
        int group = base + (int)lane_id();
        int from = group <= GROUPS ? offsets[group] : rows;
        int to = group < GROUPS ? offsets[group + 1] : rows;
        int tiles = (to - from + ROWS - 1) / ROWS;
        int through = tiles;
#pragma unroll
        for (int step = 1; step < (int)WARP; step *= 2) {
            int lower = __shfl_up_sync(ALL_LANES, through, step);
            if ((int)lane_id() >= step) through += lower;
        }
        through += before;
        u32 found = __ballot_sync(ALL_LANES, tile < through);
        if (found != 0) {
            int at = __ffs(found) - 1;
            int start = __shfl_sync(ALL_LANES, from + (tile - (through - tiles)) * ROWS, at);
            return {base + at, start, __shfl_sync(ALL_LANES, to, at)};
        }
        before = __shfl_sync(ALL_LANES, through, (int)WARP - 1);
    }
    return {-1, 0, 0};
}
