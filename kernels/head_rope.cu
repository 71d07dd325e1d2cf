// Queries and keys normalised by heads and rotated by their row's position; queries go to y [rows, HEADS * D], keys and the
// values as they are to the pages of the row's slot, if it has one: cache [pages, 2, KV_HEADS, PAGE, D].
//
// A block takes a row. Groups of LANES lanes take its heads in turn: queries, keys, values. Each head of y and of the cache has
// one writer, and no row reads what another writes.

#include "attention.cuh"
#include "rope.cuh"

typedef Halves<HALF, LANES, E> Head;

extern "C" __global__ void __launch_bounds__(THREADS, 1) head_rope(PARAMS) {
    release_next();
    __shared__ float cosines[HALF], sines[HALF];
    constexpr int TEAMS = THREADS / LANES, ALL = HEADS + 2 * KV_HEADS;
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    Head q_scale, k_scale, angles;
    q_scale.load(q_weight, lane);
    k_scale.load(k_weight, lane);
    wait_for_previous();
    i64 row = blockIdx.x;
    int position = pos[row], sequence = slot[row];
    for (int i = threadIdx.x; i < HALF; i += THREADS) {
        sincosf((float)position * FREQUENCIES[i], &sines[i], &cosines[i]);
    }
    bool live = position >= 0 && sequence >= 0;
    i64 keys = 0;
    if (live) {
        int page = table[(i64)sequence * PAGES_PER_SLOT + position / PAGE];
        keys = keys_of<KV_HEADS, PAGE, D>(page, 0) + (i64)(position % PAGE) * D;
    }
    __syncthreads();
#pragma unroll
    for (int span = 0; span < Head::SPANS; span++) {
#pragma unroll
        for (int e = 0; e < E; e++) {
            int at = Head::place(span, lane) + e;
            angles.x[span * E + e] = at < HALF ? cosines[at] : 0.0f;
            angles.y[span * E + e] = at < HALF ? sines[at] : 0.0f;
        }
    }
    // All lanes go through the loop together, whatever their heads are.
    for (int first = 0; first < ALL; first += TEAMS) {
        int head = first + team, kv_head = (head - HEADS) % KV_HEADS;
        bool is_q = head < HEADS, is_k = !is_q && head < HEADS + KV_HEADS, is_v = !is_q && !is_k && head < ALL;
        Head values{};
        if (is_q) values.load(q_in + row * Q_STRIDE + Q_AT + head * D, lane);
        if (is_k) values.load(k_in + row * K_STRIDE + K_AT + kv_head * D, lane);
        if (is_v) values.load(v_in + row * V_STRIDE + V_AT + kv_head * D, lane);
        float squares = values.squares();
        if (is_q) {
            values.normalise<XQ, NQ>(squares, Q_EPS, q_scale);
            values.rotate<RQ>(angles);
            values.store(y + row * (HEADS * D) + head * D, lane);
        } else if (live && (is_k || is_v)) {
            KV* to = kv + keys + (i64)kv_head * (PAGE * D);
            if (is_k) {
                values.normalise<XK, NK>(squares, K_EPS, k_scale);
                values.rotate<RK>(angles);
            } else {
                to += values_after_keys<KV_HEADS, PAGE, D>();
            }
            values.store(to, lane);
        }
    }
}
