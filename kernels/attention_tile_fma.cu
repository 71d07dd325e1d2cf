// Attention of packed rows in f32 arithmetic: q [rows, HEADS * D], cache [pages, 2, KV_HEADS, PAGE, D], block table
// [slots, PAGES_PER_SLOT], y [rows, HEADS * D]; zeros in rows without a slot.
//
// A block takes TILE lines, which are ROWS rows times SHARE query heads of one KV head, and a warp DOWN * LINES of them. Rows of
// one slot that follow each other are a run; run after run is gone through, its positions KEYS at a time from position 0 on to
// the largest, and its rows are written. Keys and values have a buffer each: values are copied while scores are computed, the
// next keys while values are added up. Behind the barrier before either, its own copies have landed and nobody reads the other's
// buffer any more.
//
// Of a warp's lines by keys, and by columns of values, a lane has every DOWN-th line and every ACROSS-th key or vector: LINES by
// KEYS / ACROSS scores, LINES by D / ACROSS sums. All reads are of sixteen bytes along a line or key, whose pitch spreads them
// over the banks. Adjacent lanes are below each other and lanes two apart beside each other, so that of two lanes with the
// same address in each sixteen one read of shared memory serves both. Probabilities pass between the lanes of a warp through
// memory of its own, a lane's next to each other: the sum over positions takes them in that order.
//
// What is not live is never part of a sum. Scores of positions beyond a row's own are replaced, whatever they are; keys and
// values beyond the largest position of the run are zeros in shared memory. Lines of rows of other runs hold anything: none of
// their sums is stored, and no line has a part in another's.
//
// A row's bits do not depend on its neighbours: tiles begin at multiples of KEYS positions wherever a run begins; of a tile
// that begins beyond a row's position the probabilities are exact zeros and the factor on its sums is exactly 1; and the sum of
// a line is over its own positions in an order that the line's place does not change.

#include "mma.cuh"
#include "runs.cuh"

constexpr int DOWN = 4, ACROSS = 8, WARPS = THREADS / 32, WARP_LINES = DOWN * LINES, TILE = WARP_LINES * WARPS;
// Rows that a warp has lines of, the first and the last maybe not all.
constexpr int WARP_ROWS = (WARP_LINES - 1) / SHARE + (WARP_LINES % SHARE == 0 ? 1 : 2);
constexpr int ROWS = TILE / SHARE, OWN_KEYS = KEYS / ACROSS, OWN_COLUMNS = D / ACROSS, CHUNKS = D / 4;
constexpr int VECTOR = OWN_COLUMNS % 4 == 0 ? 4 : OWN_COLUMNS % 2 == 0 ? 2 : 1;
constexpr bool WHOLE_PAGES = PAGE % KEYS == 0;
// Keys that the block copies at once.
constexpr int AT_ONCE = THREADS / CHUNKS;
static_assert(D % ACROSS == 0 && OWN_KEYS % 4 == 0, "whole vectors");

// Queries, keys, values, probabilities.
constexpr int PITCH = D + 4, P_PITCH = KEYS + 4;
constexpr int KEYS_AT = TILE * PITCH, VALUES_AT = KEYS_AT + KEYS * PITCH, P_AT = VALUES_AT + KEYS * D;
extern __shared__ Quad shared[];

// Over the lanes beside each other.
template <class F> __device__ __forceinline__ float across(float x, F f) {
#pragma unroll
    for (int step = 2; step <= ACROSS; step *= 2) x = f(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attention_tile_fma(PARAMS) {
    release_next();
    __shared__ int slots[ROWS], positions[ROWS];
    float* const memory = (float*)shared;
    const int warp = (int)warp_id(), lane = (int)lane_id();
    const int below = lane % 2 + lane / 16 * 2, beside = lane / 2 % ACROSS;
    const Part part = part_of<ROWS>((int)blockIdx.x, rows);
    wait_for_previous();
    find_rows<ROWS>(slots, positions, slot, pos, part.first_row, rows);
    const u32 base = shared_address(shared);
    for (int i = (int)threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
        const int line = i / CHUNKS, chunk = i % CHUNKS, row = part.first_row + line / SHARE;
        const bool exists = line / SHARE < ROWS && row < rows;
        const float* from = q + (i64)(exists ? row : 0) * (HEADS * D) + (part.first_head + line % SHARE) * D + chunk * 4;
        copy_async(base + (line * PITCH + chunk * 4) * 4, from, exists);
    }
    __syncthreads();

    // The lane's first line, and where it reads.
    const int line = warp * WARP_LINES + below;
    const float *query_at = memory + line * PITCH, *key_at = memory + KEYS_AT + beside * PITCH;
    const float* value_at = memory + VALUES_AT + beside * VECTOR;
    float* const p_at = memory + P_AT + line * P_PITCH;

    for (int first = 0; first < ROWS;) {
        const Run run = run_from<ROWS>(first, slots, positions);
        const int end = run.slot < 0 ? 0 : run.last + 1;
        // Rows of the run that this warp has lines of.
        const Reach reach = reach_of<WARP_ROWS>(warp * WARP_LINES / SHARE, first, run.end, positions);
        float sums[LINES][OWN_COLUMNS] = {}, most[LINES], total[LINES];
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            most[i] = -INFINITE;
            total[i] = 0;
        }

        // Begins the copies of a tile; of whole pages, `page` is the tile's.
        const int* pages = table + (i64)max(run.slot, 0) * PAGES_PER_SLOT;
        int page = end > 0 ? pages[0] : 0;
        auto copy = [&](int start, u32 to, int pitch, i64 after) {
            const u32 key = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
            if (THREADS % CHUNKS != 0 && key >= AT_ONCE) return;
            const float* cached = kv + after + chunk * 4;
            if (WHOLE_PAGES)
                cached += keys_of<KV_HEADS, PAGE, D>(page, part.kv_head) + ((u32)start % PAGE + key) * D;
            to = base + (to + key * pitch + chunk * 4) * 4;
#pragma unroll
            for (int k = 0; k < KEYS; k += AT_ONCE) {
                if (KEYS % AT_ONCE != 0 && k + key >= KEYS) break;
                const u32 at = start + k + key;
                const bool exists = at < (u32)end;
                const float* from = cached + k * D;
                if (!WHOLE_PAGES)
                    from = cached + keys_of<KV_HEADS, PAGE, D>(pages[(exists ? at : 0) / PAGE], part.kv_head) + at % PAGE * D;
                copy_async(to + k * pitch * 4, from, exists);
            }
        };

        if (end > 0) copy(0, KEYS_AT, PITCH, 0);
#pragma unroll 1
        for (int start = 0; start < end; start += KEYS) {
            const bool active = start <= reach.highest;
            copies_end_group();
            copies_wait<0>();
            __syncthreads();
            copy(start, VALUES_AT, D, values_after_keys<KV_HEADS, PAGE, D>());
            copies_end_group();
            if (WHOLE_PAGES && start + KEYS < end) page = pages[(start + KEYS) / PAGE];

            if (active) {
                float score[LINES][OWN_KEYS] = {};
#pragma unroll 2
                for (int d = 0; d < D; d += 4) {
                    Pack<float, 4> query[LINES];
#pragma unroll
                    for (int i = 0; i < LINES; i++) query[i] = *(const Pack<float, 4>*)(query_at + i * DOWN * PITCH + d);
#pragma unroll
                    for (int j = 0; j < OWN_KEYS; j++) {
                        const Pack<float, 4> key = *(const Pack<float, 4>*)(key_at + j * ACROSS * PITCH + d);
#pragma unroll
                        for (int e = 0; e < 4; e++)
#pragma unroll
                            for (int i = 0; i < LINES; i++) score[i][j] = fmaf(query[i].at[e], key.at[e], score[i][j]);
                    }
                }
                if (start + KEYS - 1 > reach.lowest) {
#pragma unroll
                    for (int i = 0; i < LINES; i++) {
                        const int limit = positions[min((line + i * DOWN) / SHARE, ROWS - 1)] - start - beside;
#pragma unroll
                        for (int j = 0; j < OWN_KEYS; j++)
                            if (j * ACROSS > limit) score[i][j] = -INFINITE;
                    }
                }
#pragma unroll
                for (int i = 0; i < LINES; i++) {
                    float top = score[i][0], sum = 0;
#pragma unroll
                    for (int j = 1; j < OWN_KEYS; j++) top = fmaxf(top, score[i][j]);
                    top = across(top, [](float a, float b) { return fmaxf(a, b); });
                    const float now = fmaxf(most[i], top * SCALE), before = base_of(now);
                    const float factor = power_of_two(most[i] - before);
                    most[i] = now;
#pragma unroll
                    for (int j = 0; j < OWN_KEYS; j += 4) {
                        Pack<float, 4> p;
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            p.at[e] = power_of_two(score[i][j + e] * SCALE - before);
                            sum += p.at[e];
                        }
                        *(Pack<float, 4>*)(p_at + i * DOWN * P_PITCH + beside * OWN_KEYS + j) = p;
                    }
                    total[i] = total[i] * factor + sum;
#pragma unroll
                    for (int c = 0; c < OWN_COLUMNS; c++) sums[i][c] *= factor;
                }
            }

            copies_wait<0>();
            __syncthreads();
            if (start + KEYS < end) copy(start + KEYS, KEYS_AT, PITCH, 0);
            if (!active) continue;
#pragma unroll 1
            for (int of = 0; of < ACROSS; of++) {
#pragma unroll
                for (int j = 0; j < OWN_KEYS; j += 4) {
                    Pack<float, 4> p[LINES];
#pragma unroll
                    for (int i = 0; i < LINES; i++)
                        p[i] = *(const Pack<float, 4>*)(p_at + i * DOWN * P_PITCH + of * OWN_KEYS + j);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float* values = value_at + (of + (j + e) * ACROSS) * D;
#pragma unroll
                        for (int c = 0; c < OWN_COLUMNS; c += VECTOR) {
                            const Pack<float, VECTOR> value = *(const Pack<float, VECTOR>*)(values + c * ACROSS);
#pragma unroll
                            for (int v = 0; v < VECTOR; v++)
#pragma unroll
                                for (int i = 0; i < LINES; i++)
                                    sums[i][c + v] = fmaf(p[i].at[e], value.at[v], sums[i][c + v]);
                        }
                    }
                }
            }
        }

        // Where results go is found anew for each run, rather than kept in registers.
        u32 line_now = line;
        pin(line_now);
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            const float all = across(total[i], [](float a, float b) { return a + b; });
            const float each = run.slot < 0 ? 0.0f : 1.0f / all;
            const int own = ((int)line_now + i * DOWN) / SHARE, head = part.first_head + ((int)line_now + i * DOWN) % SHARE;
            if (own < first || own >= run.end || part.first_row + own >= rows) continue;
            Y* to = y + (i64)(part.first_row + own) * (HEADS * D) + head * D + beside * VECTOR;
#pragma unroll
            for (int c = 0; c < OWN_COLUMNS; c += VECTOR) {
                Pack<Y, VECTOR> out;
#pragma unroll
                for (int v = 0; v < VECTOR; v++) out.at[v] = from_f32<Y>(sums[i][c + v] * each);
                *(Pack<Y, VECTOR>*)(to + c * ACROSS) = out;
            }
        }
        first = run.end;
    }
    copies_wait<0>();
}
