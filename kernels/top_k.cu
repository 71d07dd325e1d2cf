// The columns of the CHOSEN largest scores of each row: scores [rows, COLUMNS] -> chosen [rows, CHOSEN], largest first, ties to
// the lower column, NaN last; -1 where the slot is negative. A warp has a row, and looks CHOSEN times for the largest score
// after the last one found.
#include "select.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) top_k(PARAMS) {
    release_next();
    wait_for_previous();
    i64 row = (i64)blockIdx.x * (THREADS / WARP) + warp_id();
    if (row >= rows) return;
    bool live = slot[row] >= 0;
    u64 last = BEFORE_ALL;
    for (int j = 0; j < CHOSEN; j++) {
        int column = -1;
        if (live) {
            last = next_largest(COLUMNS, last, [&](int i) { return ordered(to_f32(scores[row * COLUMNS + i])); });
            column = position_of(last);
        }
        if (lane_id() == 0) chosen[row * CHOSEN + j] = column;
    }
}
