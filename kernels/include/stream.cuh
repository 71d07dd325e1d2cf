// The frame of kernels that multiply few rows by a large matrix, each element of which crosses memory once.
//
// Work is divided into items: a stripe of STRIPE rows of a weight [N, K] for a group of at most COLUMNS rows of x, which lie
// in shared memory. A block has a run of items, group by group. Its warps are ROW_GROUPS by K_GROUPS: a warp multiplies
// Multiply::ROWS rows of the stripe by the group's rows over a slice of K; the sums over the slices, in order, and the
// epilogue follow through shared memory. Where SPLIT > 1, a cluster of as many blocks has the run, each of them a part of K,
// and the parts are added in order through distributed shared memory.
//
// Each lane loads sixteen bytes of LOADS rows at a step, straight into registers: DEPTH steps ahead, over the ends of items,
// so that loads are in flight while a block waits, stages rows, or finishes a stripe. With weights that no routing chooses,
// the first of them are loaded before the kernels before this one are done.
//
// Races: shared memory is written between barriers only, as noted there. Each element of y belongs to one item and is written
// by one thread. Order of sums: over a lane's steps, over the lanes of a warp, over K_GROUPS, over SPLIT, over SUBS, all fixed
// by constants: it depends neither on other rows nor on their number.
//
// Generated: W, S, N, K, STRIPE, COLUMNS, WIDTH, ROW_GROUPS, K_GROUPS, DEPTH, BATCHES, SPLIT, PART, PITCH, ROUTED, SUBS,
// STAGED_SUBS, SHARING, WEIGHTED, HALVES, BLOCK, GROUP_ROOM, and for weighted sums the type P of the products.
#pragma once

#include "list.cuh"

// `list(groups)` fills the list of groups, of SUBS entries each, and says how many there are: by what earlier kernels chose, if
// ROUTED. `constants()` prefetches. `stage(to, first, count, k0, writes)` stages rows, with `writes` once for each row and
// part. `finish(v0, v1, row, column)` stores, `touch(row, column)` loads what that will need. Waits for the kernels before this
// one.
template <class Multiply, class List, class Constants, class Stage, class Touch, class Finish>
__device__ __forceinline__ void
stream_weights(const W* __restrict__ w, List list, Constants constants, Stage stage, Touch touch, Finish finish) {
    extern __shared__ Quad dynamic_shared[];
    constexpr int SPAN = Multiply::SPAN, LOADS = Multiply::LOADS, SLICE = DEPTH * BATCHES * SPAN;
    constexpr int STRIPES = N / STRIPE, LINE = STRIPE + 4, OUT = STRIPE / HALVES;
    static_assert(K_GROUPS * SLICE == PART && ROW_GROUPS * Multiply::ROWS == STRIPE && ROW_GROUPS * K_GROUPS == WARPS);
    Group* groups = (Group*)dynamic_shared;
    float* partial = (float*)(groups + GROUP_ROOM);
    S* staged = (S*)(partial + SUBS * K_GROUPS * WIDTH * LINE);

    const int rank = cluster_rank<SPLIT>(), row_group = warp_id() % ROW_GROUPS, k_group = warp_id() / ROW_GROUPS;
    const int k_first = rank * PART + k_group * SLICE + Multiply::lane_k();
    const W* const mine = w + (i64)(row_group * Multiply::ROWS + Multiply::lane_row()) * K + k_first;
    Quad ring[DEPTH][LOADS];
    int first = 0, last = 0, next = 0, next_batch = 0;

    // Where the lane's next DEPTH steps begin, and how many elements are left of its row from there on; none if the item has no
    // matrix or there is no item.
    struct Source {
        const W* from;
        int left;
    };
    auto take = [&]() {
        if (next >= last) return Source{w, 0};
        int stripe = next % STRIPES, batch = next_batch % BATCHES, expert = 0;
        if (ROUTED) expert = groups[next / STRIPES * SUBS + next_batch / BATCHES].expert;
        if (++next_batch == SUBS * BATCHES) {
            next_batch = 0;
            next++;
        }
        if (expert < 0) return Source{w, 0};
        i64 at = ((i64)expert * N + stripe * STRIPE) * K + batch * (DEPTH * SPAN);
        return Source{mine + at, K - k_first - batch * (DEPTH * SPAN)};
    };
    auto load = [&](int i, const Source& source) {
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            ring[i][l] = load_once_if(i * SPAN < source.left, source.from + (i64)(l * Multiply::STRIDE) * K + i * SPAN);
    };
    auto start = [&](int count) {
        u32 items = count * STRIPES, runs = gridDim.x / SPLIT, run = blockIdx.x / SPLIT;
        u32 each = items / runs, longer = items % runs;
        first = next = run * each + min(run, longer);
        last = first + each + (run < longer ? 1 : 0);
        Source source = take();
#pragma unroll
        for (int i = 0; i < DEPTH; i++) load(i, source);
    };

    if (!ROUTED) start(list(groups));
    constants();
    if (!ROUTED) __syncthreads();
    wait_for_previous();
    if (ROUTED) start(list(groups));

    Multiply product;
    int staged_key = -1;
    for (int item = first; item < last; item++) {
        const int group = item / STRIPES, stripe = item % STRIPES;
        const Group rows = groups[group * SUBS];
        if (group / SHARING != staged_key) {
            // Every warp is done with the rows staged before.
            if (staged_key >= 0) __syncthreads();
            staged_key = group / SHARING;
            stage(staged, rows.first, rows.count * STAGED_SUBS, rank * PART, stripe == 0);
            __syncthreads();
        }
        // Elements of y that this block computes from the stripe: those of all columns, or of its share of them.
        const int share = SPLIT > 1 ? (rows.count * OUT + SPLIT - 1) / SPLIT : rows.count * OUT;
        const int out_last = min(rows.count * OUT, (rank + 1) * share), out_first = rank * share + (int)threadIdx.x;
        const i64 y_row = WEIGHTED ? group : rows.first;
        float touched = 0;
        if (item == first && out_first < out_last) touched = touch(y_row + out_first / OUT, stripe * OUT + out_first % OUT);

        for (int sub = 0; sub < SUBS; sub++) {
            const S* x = staged + sub % STAGED_SUBS * PITCH + k_group * SLICE + Multiply::lane_x();
            product.clear();
#pragma unroll 1
            for (int batch = 0; batch < BATCHES; batch++, x += DEPTH * SPAN) {
                Source source = take();
#pragma unroll
                for (int i = 0; i < DEPTH; i++) {
                    product.multiply(ring[i], x + i * SPAN, rows.count);
                    load(i, source);
                }
            }
            if (sub == 0 && item != first) {
                // The sums of the item before have been read, by the whole cluster.
                cluster_sync<SPLIT>();
            }
            product.store(partial + (sub * K_GROUPS + k_group) * (WIDTH * LINE) + row_group * Multiply::ROWS, LINE, rows.count);
        }
        asm volatile("" ::"f"(touched));
        __syncthreads();

        auto total = [&](int sub, int column, int row) {
            float sum = 0;
#pragma unroll
            for (int g = 0; g < K_GROUPS; g++) sum += partial[((sub * K_GROUPS + g) * WIDTH + column) * LINE + row];
            return sum;
        };
        if (SPLIT > 1) {
            // A thread writes to what it alone reads.
            for (int o = threadIdx.x; o < rows.count * STRIPE; o += THREADS)
                partial[o / STRIPE * LINE + o % STRIPE] = total(0, o / STRIPE, o % STRIPE);
            cluster_sync<SPLIT>();
        }
        auto value = [&](int column, int row) {
            if (SPLIT == 1) return total(0, column, row);
            float sum = 0;
#pragma unroll
            for (int p = 0; p < SPLIT; p++) sum += load_remote(partial + column * LINE + row, p);
            return sum;
        };
        for (int o = out_first; o < out_last; o += THREADS) {
            int column = o / OUT, out = o % OUT, row = HALVES == 2 ? out / BLOCK * (2 * BLOCK) + out % BLOCK : out;
            float v0 = 0, v1 = 0;
            if (WEIGHTED) {
                for (int sub = 0; sub < SUBS; sub++) {
                    const Group& entry = groups[group * SUBS + sub];
                    float part = rounded<P>(total(sub, 0, row));
                    if (entry.expert >= 0) v0 = __fadd_rn(v0, __fmul_rn(entry.weight, part));
                }
            } else if (rows.expert >= 0) {
                v0 = value(column, row);
                if (HALVES == 2) v1 = value(column, row + BLOCK);
            }
            finish(v0, v1, y_row + column, stripe * OUT + out);
        }
    }
    // No block ends while another reads its memory.
    if (SPLIT > 1) cluster_sync<SPLIT>();
}

// What a kernel does after its signature, which generated names are parameters of, and with its own `Multiply`; last come rows of
// no group.
#define STREAM_BODY                                                                                   \
    release_next();                                                                                   \
    auto row = [&](int r) -> i64 { return X_ROW(r); };                                                \
    auto list = [&](Group* groups) { return LIST; };                                                  \
    auto constants = [&] { CONSTANTS; };                                                              \
    auto stage = [&](S* to, int first, int count, int k0, bool writes) { STAGE; };                    \
    auto touch = [&](i64 row, int column) -> float { return EPILOGUE(0.0f, 0.0f, row, column); };     \
    auto finish = [&](float v0, float v1, i64 row, int column) {                                      \
        y[row * Y_COLUMNS + column] = from_f32<Y>(EPILOGUE(v0, v1, row, column));                     \
    };                                                                                                \
    stream_weights<Multiply>(w, list, constants, stage, touch, finish);                               \
    i64 step = (i64)gridDim.x * THREADS, end = (i64)rows * Y_COLUMNS;                                 \
    for (i64 i = (i64)ROWS_USED * Y_COLUMNS + blockIdx.x * THREADS + threadIdx.x; i < end; i += step) \
        finish(0.0f, 0.0f, i / Y_COLUMNS, (int)(i % Y_COLUMNS))
