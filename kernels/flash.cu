// Attention of packed rows by warpgroups: q [rows, HEADS * D], cache [pages, 2, KV_HEADS, PAGE, D], block table
// [slots, PAGES_PER_SLOT], y [rows, HEADS * D]; zeros in rows without a slot. D is 64.
//
// A block takes ROWS rows that follow each other, with SHARE query heads of one KV head. Each of its GROUPS multiplying
// warpgroups has WG_ROWS of the rows: their heads are the 64 lines of a product. Rows of one slot that follow each other are a
// run; run after run is gone through, its positions KEYS at a time from position 0 on to the largest, and its rows are
// written. COPIERS warps copy, one keys and the other values or one both, each into a ring of STAGES buffers: KEYS rows of 128
// bytes as wgmma.cuh says, as boxes of the cache's tensor map, none of which is of two pages. The products of one tile's
// queries and keys are under way while those of the tile before, of its probabilities and values, are too, and while other
// warpgroups take exponentials.
//
// A buffer's barrier `full` ends a phase when the buffer is there, `empty` when each multiplying warp has arrived, after the
// products that read it are done: the copier waits for the latter before it copies again. Only the copier writes to the rings.
// Queries lie in memory of their warpgroup, which fences, and waits for itself, between writing and multiplying.
//
// What is not live is never part of a sum. Scores of positions beyond a row's own are replaced, whatever they are. Lines of
// rows of other runs hold anything: none of their sums is stored, and no line has a part in another's. Values beyond the
// largest position of the run, which the cache may hold anything for, are zeros in shared memory: a tile that has such is
// copied in pieces of 16 bytes. Those copies are not of the proxy that the products read with: multiplying threads fence,
// having seen the barrier.
//
// A row's bits do not depend on its neighbours: tiles begin at multiples of KEYS positions wherever a run begins; of a tile
// that begins beyond a row's position the probabilities are exact zeros and the factor on its sums is exactly 1; and the sum of
// a line is over its own positions in an order that the line's place does not change.

#include "runs.cuh"
#include "wgmma.cuh"

constexpr int GROUP_THREADS = 128, LINES = 64, ROW_BYTES = D * 2, CHUNKS = ROW_BYTES / 16, STEPS = D / 16;
constexpr int WG_ROWS = LINES / SHARE, ROWS = GROUPS * WG_ROWS;
constexpr int BOXES = KEYS / BOX;
constexpr u32 TILE_BYTES = KEYS * ROW_BYTES, QUERY_BYTES = LINES * ROW_BYTES, KEYS_AT = GROUPS * QUERY_BYTES;
constexpr u32 VALUES_AT = KEYS_AT + STAGES * TILE_BYTES, BARRIERS_AT = VALUES_AT + STAGES * TILE_BYTES;
constexpr u32 ROWS_AT = BARRIERS_AT + 4 * STAGES * 8;
static_assert(D == 64 && PAGE % BOX == 0 && KEYS % BOX == 0 && BOX % 8 == 0 && BOXES <= 32, "boxes of whole atoms");
static_assert(32 % BOXES == 0 && (BOXES == 1 || BOX == PAGE), "a tile's pages are held by the lanes at once");

#include "softmax.cuh"

// The buffer of the tile with this number, counted from the block's first, and whether the ring goes around for an odd time.
__device__ __forceinline__ u32 buffer_of(u32 number) { return number % STAGES; }
__device__ __forceinline__ u32 odd_of(u32 number) { return number / STAGES & 1; }

// An operand so many bytes further on: its address does not carry into its upper half, which stays constant.
__device__ __forceinline__ u64 further(u64 operand, u32 bytes) {
    return operand & 0xffffffff00000000 | (u32)operand + (bytes >> 4);
}

// Begins the products of a warpgroup's queries and a tile's keys.
__device__ __forceinline__ void begin_scores(float (&score)[KEYS / 2], u32 queries, u32 keys) {
    const u64 q = operand(queries), k = operand(keys);
    scores_first(score, q, k);
#pragma unroll
    for (int step = 1; step < STEPS; step++) scores_more(score, further(q, step * 32), further(k, step * 32));
    products_end_group();
}

// Begins the products of probabilities and a tile's values, sixteen positions at a time, and adds them to the sums.
__device__ __forceinline__ void begin_sums(float (&sums)[D / 2], u32 (&p)[KEYS / 16][4], u32 values) {
    const u64 v = operand(values);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) sums_more(sums, p[step], further(v, step * 16 * ROW_BYTES));
    products_end_group();
}

// What a copying warp does for a block: all runs' keys, or values, or both.
template <bool OF_KEYS, bool OF_VALUES>
__device__ __forceinline__ void copy_tiles(const int* slots, const int* positions, const int* table, const T* kv,
                                           const TensorMap* kv_map, u32 base, u64* barriers, int kv_head) {
    u64 *full_keys = barriers, *full_values = full_keys + STAGES, *empty_keys = full_values + STAGES;
    u64* empty_values = empty_keys + STAGES;
    const int lane = (int)lane_id();
    const bool leader = elected();
    u32 number = 0;
    for (int first = 0; first < ROWS;) {
        const Run run = run_from<ROWS>(first, slots, positions);
        first = run.end;
        if (run.slot < 0) continue;
        int held = 0;
#pragma unroll 1
        for (int start = 0; start <= run.last; start += KEYS, number++) {
            const u32 buffer = buffer_of(number), odd = odd_of(number);
            // Each lane holds one of 32 pages; past the last, the last again.
            if (start % (32 * PAGE) == 0)
                held = table[(i64)run.slot * PAGES_PER_SLOT + min(start / PAGE + lane, run.last / PAGE)];
            auto page_of = [&](int place) { return __shfl_sync(ALL_LANES, held, place / PAGE % 32); };
            // A position's row in the cache, of a key or of a value.
            auto row_of = [&](int place, int part) {
                return (page_of(place) * (2 * KV_HEADS) + part * KV_HEADS + kv_head) * PAGE + place % PAGE;
            };
            // Copies boxes, keys' or values', the warp together.
            auto copy_boxes = [&](int count, u32 to, int part, u64* full) {
#pragma unroll 1
                for (int i = 0; i < count; i++) {
                    const int place = start + i * BOX;
                    const int row = row_of(place, part);
                    if (leader) copy_box<false>(to + i * BOX * ROW_BYTES, kv_map, 0, row, 0, full);
                }
            };
            if (OF_KEYS) {
                const int boxes = min((run.last - start) / BOX + 1, BOXES);
                barrier_wait(empty_keys + buffer, odd ^ 1);
                if (leader) barrier_expect(full_keys + buffer, boxes * BOX * ROW_BYTES);
                copy_boxes(boxes, base + KEYS_AT + buffer * TILE_BYTES, 0, full_keys + buffer);
            }
            if (OF_VALUES) {
                const u32 to = base + VALUES_AT + buffer * TILE_BYTES;
                barrier_wait(empty_values + buffer, odd ^ 1);
                // What was in the buffer may have been copied in pieces: those come before a box.
                fence_for_copies();
                if (start + KEYS - 1 <= run.last) {
                    if (leader)
                        barrier_expect(full_values + buffer, TILE_BYTES);
                    else
                        barrier_arrive(full_values + buffer);
                    copy_boxes(BOXES, to, 1, full_values + buffer);
                } else {
                    // Eight lanes copy a row, the warp four of eight at a time.
                    u32 here;
                    asm volatile("mov.u32 %0, %%laneid;" : "=r"(here));
                    const int chunk = here % CHUNKS, key = here / CHUNKS;
                    const u32 swizzled = (chunk ^ key) << 4;
#pragma unroll 1
                    for (int i = 0; i < KEYS; i += BOX) {
                        const int place = start + i, live = run.last - place - key;
                        const int row = row_of(place, 1) + key;
                        const u32 at = to + (i + key) * ROW_BYTES;
#pragma unroll 2
                        for (int k = 0; k < BOX; k += 4)
                            copy_async(at + k * ROW_BYTES + (swizzled ^ k % 8 << 4), kv + (i64)(row + k) * D + chunk * 8,
                                       k <= live);
                    }
                    barrier_arrive_copies(full_values + buffer);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) flash(PARAMS) {
    release_next();
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared);
    u64 *full_keys = (u64*)(shared + BARRIERS_AT), *full_values = full_keys + STAGES;
    u64 *empty_keys = full_values + STAGES, *empty_values = empty_keys + STAGES;
    int *slots = (int*)(shared + ROWS_AT), *positions = slots + ROWS;
    const int warp = (int)warp_id(), lane = (int)lane_id();
    const Part part = part_of<ROWS>((int)blockIdx.x, rows);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_make(full_keys + s, 1);
            barrier_make(full_values + s, WARP);
            barrier_make(empty_keys + s, GROUPS * 4);
            barrier_make(empty_values + s, GROUPS * 4);
        }
        barriers_made();
        prefetch(&kv_map);
    }
    wait_for_previous();
    find_rows<ROWS>(slots, positions, slot, pos, part.first_row, rows);
    __syncthreads();

    if (warp >= GROUPS * 4) {
#if MANY_REGISTERS
        registers_release<COPY_REGISTERS>();
#endif
        if (warp == GROUPS * 4) {
            if constexpr (COPIERS == 1)
                copy_tiles<true, true>(slots, positions, table, kv, &kv_map, base, full_keys, part.kv_head);
            else
                copy_tiles<true, false>(slots, positions, table, kv, &kv_map, base, full_keys, part.kv_head);
        } else if (COPIERS == 2 && warp == GROUPS * 4 + 1) {
            copy_tiles<false, true>(slots, positions, table, kv, &kv_map, base, full_keys, part.kv_head);
        }
    } else {
#if MANY_REGISTERS
        registers_take<PRODUCT_REGISTERS>();
#endif
        const int mine = warp / 4, thread = (int)threadIdx.x % GROUP_THREADS, own = mine * WG_ROWS;
        const u32 queries = base + mine * QUERY_BYTES;
#pragma unroll
        for (int i = thread; i < LINES * CHUNKS; i += GROUP_THREADS) {
            const int line = i / CHUNKS, chunk = i % CHUNKS, row = part.first_row + own + line / SHARE;
            Quad some = {};
            if (line / SHARE < WG_ROWS && row < rows)
                some = load_fresh(q + (i64)row * (HEADS * D) + (part.first_head + line % SHARE) * D + chunk * 8);
            *(Quad*)(shared + mine * QUERY_BYTES + line * ROW_BYTES + ((chunk ^ line % 8) << 4)) = some;
        }
        fence_for_copies();
        warps_sync(1 + mine, GROUP_THREADS);

        // Waits for the keys or values of a tile, and gives them back.
        u32 number = 0;
        auto keys_there = [&](u32 tile) {
            barrier_wait(full_keys + buffer_of(tile), odd_of(tile));
            return base + KEYS_AT + buffer_of(tile) * TILE_BYTES;
        };
        auto values_there = [&](u32 tile) {
            barrier_wait(full_values + buffer_of(tile), odd_of(tile));
            return base + VALUES_AT + buffer_of(tile) * TILE_BYTES;
        };
        auto keys_done = [&](u32 tile) {
            if (lane == 0) barrier_arrive(empty_keys + buffer_of(tile));
        };
        auto values_done = [&](u32 tile) {
            if (lane == 0) barrier_arrive(empty_values + buffer_of(tile));
        };
        const int line = warp % 4 * 16 + lane / 4;
        float score[KEYS / 2], sums[D / 2];
        u32 p[KEYS / 16][4];

        for (int first = 0; first < ROWS;) {
            const Run run = run_from<ROWS>(first, slots, positions);
            // Of this warpgroup's rows of the run.
            const Reach reach = reach_of<WG_ROWS>(own, first, run.end, positions);
            const int tiles = run.slot < 0 ? 0 : run.last / KEYS + 1;
            const int own_tiles = run.slot < 0 || reach.highest < 0 ? 0 : reach.highest / KEYS + 1;
            // Tiles that no row of these is masked in.
            const int whole_tiles = (reach.lowest + 1) / KEYS;
            Lines lines = {{-INFINITE, -INFINITE}, {0, 0}};
            float factor[2];
#pragma unroll
            for (int i = 0; i < D / 2; i++) sums[i] = 0;

            if (own_tiles > 0) {
                u32 keys = keys_there(number);
                products_begin();
                begin_scores(score, queries, keys);
                products_wait<0>();
                pin_all(score);
                keys_done(number);
                if (whole_tiles == 0) hide(score, 0, line, positions + own);
                lines.take(score, factor);
                round_all(p, score);
                pin_all(sums);
                number++;
#pragma unroll 1
                for (int tile = 1; tile < own_tiles; tile++, number++) {
                    keys = keys_there(number);
                    products_begin();
                    begin_scores(score, queries, keys);
                    const u32 values = values_there(number - 1);
                    products_begin();
                    begin_sums(sums, p, values);
                    products_wait<1>();
                    pin_all(score);
                    keys_done(number);
                    if (tile >= whole_tiles) hide(score, tile * KEYS, line, positions + own);
                    lines.take(score, factor);
                    // The compiler would else wait first, which takes fewer registers, and exponentials with idle tensor cores.
                    if (EXPONENTIALS_FIRST) stop_if_negative(lines.total[0] + lines.total[1]);
                    products_wait<0>();
                    pin_all(sums);
                    pin_all(score);
#pragma unroll
                    for (int step = 0; step < KEYS / 16; step++) pin_all(p[step]);
                    values_done(number - 1);
#pragma unroll
                    for (int i = 0; i < D / 2; i++) sums[i] *= factor[i / 2 % 2];
                    round_all(p, score);
                    pin_all(sums);
                }
                // The run's last tile of values may be one of pieces.
                const u32 values = values_there(number - 1);
                fence_for_copies();
                products_begin();
                begin_sums(sums, p, values);
                products_wait<0>();
                pin_all(sums);
                values_done(number - 1);
            }
            // Tiles that are of other warpgroups' rows alone.
            for (int tile = own_tiles; tile < tiles; tile++, number++) {
                keys_there(number);
                keys_done(number);
                values_there(number);
                values_done(number);
            }

            // What follows is made anew for each run, rather than kept in registers.
            u32 place = line, block;
            pin(place);
            asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
            const Part part = part_of<ROWS>((int)block, rows);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float all = warp_sum<4>(lines.total[h]), each = run.slot < 0 ? 0.0f : 1.0f / all;
                const int row = ((int)place + h * 8) / SHARE, head = part.first_head + ((int)place + h * 8) % SHARE;
                if (row >= WG_ROWS || own + row < first || own + row >= run.end || part.first_row + own + row >= rows) continue;
                Y* to = y + (i64)(part.first_row + own + row) * (HEADS * D) + head * D + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    Pack<Y, 2> out;
                    out.at[0] = from_f32<Y>(sums[4 * n + 2 * h] * each);
                    out.at[1] = from_f32<Y>(sums[4 * n + 2 * h + 1] * each);
                    *(Pack<Y, 2>*)(to + n * 8) = out;
                }
            }
            first = run.end;
        }
    }
}
