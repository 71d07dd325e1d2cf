// Attention of packed rows on tensor cores: q [rows, HEADS * D], cache [pages, 2, KV_HEADS, PAGE, D], block table
// [slots, PAGES_PER_SLOT], y [rows, HEADS * D]; zeros in rows without a slot. Rows of a slot that follow each other share a
// pass over its positions.
//
// A block takes TILE lines, which are ROWS rows times SHARE query heads of one KV head; a warp takes TILES * 16 of them. For
// each run of rows of one slot it goes through the positions 0..=the largest of the run, KEYS at a time from position 0 on: the
// next keys and values are copied into one half of shared memory while the others are worked on. One barrier a turn: behind it
// all copies of this turn have landed and nobody reads the half that is copied to next.
//
// A row's bits do not depend on its neighbours: KEYS positions are worked on at a time wherever the run begins, a row takes
// part in those that begin at or before its own position, and beyond that position the probabilities are exact zeros. Positions
// beyond the largest of the run are zeros in shared memory, not what the cache happens to hold.

#include "attention.cuh"
#include "mma.cuh"

constexpr int WARPS = THREADS / 32, TILE = 16 * TILES * WARPS, ROWS = TILE / SHARE, SHARES = GROUP / SHARE;
constexpr int UNITS = KV_HEADS * SHARES, WORDS = D / 8, PITCH = D + 8, STEPS = D / 16;
constexpr bool WHOLE_PAGES = PAGE % KEYS == 0;
// Whether a warp's queries stay in registers, beside its sums and scores.
constexpr bool KEEP = TILES * STEPS <= 4;

// Two halves, each of KEYS keys, then KEYS values, then TILE queries, at a pitch that spreads rows over the banks.
extern __shared__ Quad shared[];
constexpr u32 HALF_BYTES = 2 * KEYS * PITCH * 2, QUERIES = 2 * HALF_BYTES;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_prefill(PARAMS) {
    release_next();
    __shared__ int tile_slot[ROWS], tile_pos[ROWS];
    int unit = blockIdx.x % UNITS, kv_head = unit / SHARES, first_head = kv_head * GROUP + unit % SHARES * SHARE;
    // Later rows are of later positions and take longer: they start first.
    int first_row = ((rows + ROWS - 1) / ROWS - 1 - (int)blockIdx.x / UNITS) * ROWS;
    int lane = lane_id(), warp = warp_id();
    wait_for_previous();
    for (int i = threadIdx.x; i < ROWS; i += THREADS) {
        int row = first_row + i;
        tile_slot[i] = row < rows && pos[row] >= 0 ? slot[row] : -1;
        tile_pos[i] = row < rows ? pos[row] : -1;
    }

    u32 base = shared_address(shared);
    for (int i = threadIdx.x; i < TILE * WORDS; i += THREADS) {
        int line = i / WORDS, word = i % WORDS, row = first_row + line / SHARE;
        bool exists = line < ROWS * SHARE && row < rows;
        const T* from = q + (i64)(exists ? row : 0) * (HEADS * D) + (first_head + line % SHARE) * D + word * 8;
        copy_async(base + QUERIES + (line * PITCH + word * 8) * 2, from, exists);
    }
    copies_end_group();
    // The rows of this lane's lines, which are lane / 4 and lane / 4 + 8 of each sixteen.
    int line_row[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = ((warp * TILES + m) * 16 + h * 8 + lane / 4) / SHARE;
            line_row[m][h] = row < ROWS && first_row + row < rows ? row : -1;
        }
    }
    float sums[TILES][2 * STEPS][4] = {}, most[TILES][2], total[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            most[m][h] = -INFINITE;
            total[m][h] = 0;
        }
    }
    // Addresses of this lane's rows of the matrices it loads: queries and keys as they are, values transposed.
    u32 key_at = base + ((lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8) * 2;
    u32 value_at = base + ((KEYS + lane % 16) * PITCH + lane / 16 * 8) * 2;
    u32 query_at = base + QUERIES + ((warp * TILES * 16 + lane % 16) * PITCH + lane / 16 * 8) * 2;
    u32 query[TILES][KEEP ? STEPS : 1][4];
    __syncthreads();

    for (int run = 0, run_end; run < ROWS; run = run_end) {
        int sequence = tile_slot[run], last = -1;
        // The run's end and its largest position, the same in every warp.
        run_end = ROWS;
        for (int i = run; i < ROWS; i += 32) {
            int at = i + lane;
            u32 others = __ballot_sync(ALL_LANES, at >= ROWS || tile_slot[at < ROWS ? at : run] != sequence);
            int end = others ? i + __ffs(others) - 1 : i + 32;
            if (at < end) last = max(last, tile_pos[at]);
            if (others) {
                run_end = end;
                break;
            }
        }
        if (sequence < 0) continue;
        last = warp_largest(last);

        int limit[TILES][2], lowest = 0x7fffffff, highest = -1;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = line_row[m][h];
                limit[m][h] = row >= run && row < run_end ? tile_pos[row] : -1;
                lowest = min(lowest, limit[m][h]);
                highest = max(highest, limit[m][h]);
            }
        }
        lowest = -warp_largest(-lowest);
        highest = warp_largest(highest);

        const int* pages = table + (i64)sequence * PAGES_PER_SLOT;
        int page = pages[0];
        // Starts the copies of KEYS keys and values; with whole pages, theirs is in `page`, and the next is fetched.
        auto copy = [&](int start, int half) {
#pragma unroll
            for (int c = 0; c < (KEYS * WORDS + THREADS - 1) / THREADS; c++) {
                int i = c * THREADS + threadIdx.x, key = i / WORDS, word = i % WORDS, at = start + key;
                if (KEYS * WORDS % THREADS != 0 && i >= KEYS * WORDS) break;
                bool exists = at <= last;
                int its_page = WHOLE_PAGES ? page : pages[(exists ? at : 0) / PAGE];
                const T* from = kv + keys_of<KV_HEADS, PAGE, D>(its_page, kv_head) + at % PAGE * D + word * 8;
                u32 to = base + half * HALF_BYTES + (key * PITCH + word * 8) * 2;
                copy_async(to, from, exists);
                copy_async(to + KEYS * PITCH * 2, from + values_after_keys<KV_HEADS, PAGE, D>(), exists);
            }
            copies_end_group();
            if (WHOLE_PAGES && start + KEYS <= last) page = pages[(start + KEYS) / PAGE];
        };

        __syncthreads();
        copy(0, 0);
        for (int start = 0, half = 0; start <= last; start += KEYS, half ^= 1) {
            copies_wait<0>();
            __syncthreads();
            if (start + KEYS <= last) copy(start + KEYS, half ^ 1);
            if (start > highest) continue;
            if (KEEP && start == 0) {
#pragma unroll
                for (int m = 0; m < TILES; m++) {
#pragma unroll
                    for (int k = 0; k < (KEEP ? STEPS : 1); k++) {
                        load_matrices(query[m][k], query_at + (m * 16 * PITCH + k * 16) * 2);
                    }
                }
            }

            float score[TILES][KEYS / 8][4] = {};
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                if constexpr (!KEEP) {
#pragma unroll
                    for (int m = 0; m < TILES; m++) load_matrices(query[m][0], query_at + (m * 16 * PITCH + k * 16) * 2);
                }
#pragma unroll
                for (int n = 0; n < KEYS / 8; n += 2) {
                    u32 keys[4];
                    load_matrices(keys, key_at + half * HALF_BYTES + (n * 8 * PITCH + k * 16) * 2);
                    u32 low_keys[2] = {keys[0], keys[1]}, high_keys[2] = {keys[2], keys[3]};
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        mma<T>(score[m][n], query[m][KEEP ? k : 0], low_keys);
                        mma<T>(score[m][n + 1], query[m][KEEP ? k : 0], high_keys);
                    }
                }
            }
            if (start + KEYS - 1 > lowest) {
#pragma unroll
                for (int m = 0; m < TILES; m++) {
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int at = start + n * 8 + lane % 4 * 2 + i % 2;
                            if (at > limit[m][i / 2]) score[m][n][i] = -INFINITE;
                        }
                    }
                }
            }
            float factor[TILES][2];
#pragma unroll
            for (int m = 0; m < TILES; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float top = -INFINITE, sum = 0;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
                    float now = fmaxf(most[m][h], warp_max<4>(top) * SCALE), before = base_of(now);
                    factor[m][h] = power_of_two(most[m][h] - before);
                    most[m][h] = now;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int i = 2 * h; i < 2 * h + 2; i++) {
                            score[m][n][i] = power_of_two(score[m][n][i] * SCALE - before);
                            sum += score[m][n][i];
                        }
                    }
                    total[m][h] = total[m][h] * factor[m][h] + sum;
                }
            }
            // The probabilities as operands of the product with the values.
            u32 p[TILES][KEYS / 16][4];
#pragma unroll
            for (int m = 0; m < TILES; m++) {
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float* of = &score[m][2 * k + i / 2][i % 2 * 2];
                        p[m][k][i] = pair<T>(of[0], of[1]);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < 2 * STEPS; n += 2) {
                float added[TILES][2][4] = {};
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) {
                    u32 values[4];
                    load_matrices_transposed(values, value_at + half * HALF_BYTES + (k * 16 * PITCH + n * 8) * 2);
                    u32 low_values[2] = {values[0], values[1]}, high_values[2] = {values[2], values[3]};
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        mma<T>(added[m][0], p[m][k], low_values);
                        mma<T>(added[m][1], p[m][k], high_values);
                    }
                }
                // Rows that take no part keep their sums, whatever these values are.
#pragma unroll
                for (int m = 0; m < TILES; m++) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        float& sum = sums[m][n + i / 4][i % 4];
                        if (limit[m][i % 4 / 2] >= start) sum = sum * factor[m][i % 4 / 2] + added[m][i / 4][i % 4];
                    }
                }
            }
        }
    }
    copies_wait<0>();

#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float all = warp_sum<4>(total[m][h]);
            int row = line_row[m][h];
            if (row < 0) continue;
            bool live = tile_slot[row] >= 0;
            int head = first_head + (h * 8 + lane / 4 + (warp * TILES + m) * 16) % SHARE;
            Y* to = y + (i64)(first_row + row) * (HEADS * D) + head * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 2 * STEPS; n++) {
                Pack<Y, 2> out;
                out.at[0] = from_f32<Y>(live ? sums[m][n][2 * h] / all : 0.0f);
                out.at[1] = from_f32<Y>(live ? sums[m][n][2 * h + 1] / all : 0.0f);
                *(Pack<Y, 2>*)(to + n * 8) = out;
            }
        }
    }
}
