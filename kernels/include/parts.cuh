// Tiles of a product whose rows are in groups of any size, for blocks that take several each: the groups are divided into
// parts of nearly the same size, and each part meets all columns.
//
// Generated: GROUPED, EXPERTS if so, BN (rows of a part, at the most), UNIT (a part but the last of a group is a multiple of
// it), COLUMN_TILES, BAND.
#pragma once

#include "block.cuh"

#if GROUPED
constexpr int GROUPS = EXPERTS + 1;
#else
constexpr int GROUPS = 1;
#endif

// Rows [first, end) of one group, of which `count` are computed, a multiple of UNIT; and which columns.
struct Tile {
    int group, first, end, count, column;
};

// For each group where its rows begin, and how many parts are before it; then the same for the end.
struct Parts {
    int starts[GROUPS + 1], before[GROUPS + 1];
};

#if GROUPED
// Makes the list: one warp. Group g has rows offsets[g] .. offsets[g + 1]; the rows past the last, up to `rows`, are a group of
// their own, EXPERTS.
__device__ __forceinline__ void list_parts(Parts* parts, const int* offsets, int rows) {
    int before = 0;
    for (int base = 0; base < GROUPS; base += (int)WARP) {
        int group = base + (int)lane_id();
        int from = group <= EXPERTS ? offsets[group] : rows;
        int to = group < EXPERTS ? offsets[group + 1] : rows;
        int own = (to - from + BN - 1) / BN, through = own;
#pragma unroll
        for (int step = 1; step < (int)WARP; step *= 2) {
            int lower = __shfl_up_sync(ALL_LANES, through, step);
            if ((int)lane_id() >= step) through += lower;
        }
        if (group < GROUPS) {
            parts->starts[group] = from;
            parts->before[group] = before + through - own;
        }
        before += __shfl_sync(ALL_LANES, through, (int)WARP - 1);
    }
    if (lane_id() == 0) {
        parts->starts[GROUPS] = rows;
        parts->before[GROUPS] = before;
    }
}
#endif

// Tile `index`, in the order by groups; in a group by bands of BAND parts; in a band column by column, so that blocks that run
// at the same time share what they read. `group` is a group not after the tile's, and becomes it.
__device__ __forceinline__ Tile find_tile(const Parts* parts, int index, int& group) {
    while (index >= parts->before[group + 1] * COLUMN_TILES) group++;
    int before = parts->before[group], height = parts->before[group + 1] - before;
    int start = parts->starts[group], end = parts->starts[group + 1];
    int local = index - before * COLUMN_TILES;
    int band = local / (BAND * COLUMN_TILES), inside = local % (BAND * COLUMN_TILES);
    int here = min(BAND, height - band * BAND);
    int size = ((end - start + height - 1) / height + UNIT - 1) / UNIT * UNIT;
    int first = start + (band * BAND + inside % here) * size;
    end = min(first + size, end);
    return {group, first, end, (end - first + UNIT - 1) / UNIT * UNIT, inside / here};
}
