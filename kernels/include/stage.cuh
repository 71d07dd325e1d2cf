// Puts rows of x, finished by what a fused step does before its product, into shared memory: all threads of a block
// together. Used by kernels that read their rows once and stream weights past them.
//
// Generated: K, the elements of a row; PART, those that a block stages, of which the ones beyond K are zeros, from column k0
// on; SPLIT, the blocks of a cluster that stage the parts of the same rows; COLUMNS, the most rows; THREADS; DEPTH; X, the type
// of x; S, the type staged. `Layout::put(to, r, k, values)` stores eight elements of row r, `Layout::at(to, r, k)` is where;
// `row(i)` is the row of x for row i, negative for zeros. The caller synchronises, before and after.
#pragma once

#include "block.cuh"
#include "cluster.cuh"
#include "eight.cuh"
#include "mma.cuh"

constexpr int WARPS = THREADS / 32;

// What a layout does to eight elements that were copied as they are, if anything.
template <class Layout> __device__ __forceinline__ auto adjust(S* at, int) -> decltype(Layout::adjust(at)) { Layout::adjust(at); }
template <class Layout> __device__ __forceinline__ void adjust(S*, long) {}

// The rows as they are.
template <class Layout, class Row>
__device__ __forceinline__ void stage_plain(S* to, const X* x, int first, int count, int k0, Row row) {
    constexpr int VECTORS = PART / 8, ROUND = 4;
    if constexpr (SAME<X, S> && sizeof(S) == 2) {
        for (int r = 0; r < count; r++) {
            i64 from = row(first + r);
            for (int k = threadIdx.x * 8; k < PART; k += THREADS * 8) {
                bool valid = from >= 0 && k0 + k < K;
                copy_async_cached(shared_address(Layout::at(to, r, k)), valid ? x + from * K + k0 + k : x, valid);
            }
        }
        copies_end_group();
        copies_wait<0>();
        for (int r = 0; r < count; r++)
            for (int k = threadIdx.x * 8; k < PART; k += THREADS * 8) adjust<Layout>(Layout::at(to, r, k), 0);
    } else {
        for (int i = threadIdx.x; i < count * VECTORS; i += THREADS * ROUND) {
            Eight<X> found[ROUND] = {};
#pragma unroll
            for (int j = 0; j < ROUND; j++) {
                int at = i + j * THREADS, k = at % VECTORS * 8;
                if (at >= count * VECTORS || k0 + k >= K) continue;
                i64 from = row(first + at / VECTORS);
                if (from >= 0) found[j] = fresh(x + from * K + k0 + k);
            }
#pragma unroll
            for (int j = 0; j < ROUND; j++) {
                int at = i + j * THREADS;
                if (at >= count * VECTORS) continue;
                float values[8];
#pragma unroll
                for (int e = 0; e < 8; e++) values[e] = found[j].at(e);
                Layout::put(to, at / VECTORS, at % VECTORS * 8, values);
            }
        }
    }
}

// Vectors of eight elements that a thread loads at once, beside the weights that it has on their way.
template <class Layout> constexpr int IN_FLIGHT = sizeof(X) == 4 ? 2 : DEPTH * Layout::LOADS <= 8 ? 6 : 4;

// The rows after an RMSNorm: ROW_WARPS warps a row (generated), several rows only if they are all that there are; the parts of
// a cluster add up their sums of squares. M is the type of the result.
template <class Layout, class M, class Row, class Weight>
__device__ __forceinline__ void
stage_norm(S* to, const X* x, int first, int count, int k0, Row row, const Weight* __restrict__ weight, float eps) {
    constexpr int LANES = 32 * ROW_WARPS, AT_ONCE = WARPS / ROW_WARPS, MOST = IN_FLIGHT<Layout>;
    constexpr int VECTORS = (PART / 8 + LANES - 1) / LANES, ROUND = VECTORS < MOST ? VECTORS : MOST;
    constexpr int ROUNDS = (VECTORS + ROUND - 1) / ROUND, TURNS = ROW_WARPS > 1 ? 1 : (COLUMNS + AT_ONCE - 1) / AT_ONCE;
    constexpr int ROWS = ROUNDS > 1 ? 1 : MOST / ROUND < TURNS ? MOST / ROUND : TURNS;
    __shared__ float sums[COLUMNS * ROW_WARPS];
    const int lane = threadIdx.x % LANES;
    // If a thread has but one vector of each row, its weights are on their way together with the rows.
    Eight<Weight> only = {};
    if (VECTORS == 1 && lane * 8 < PART && k0 + lane * 8 < K) only = fresh(weight + k0 + lane * 8);

    // Round i of the vectors of ROWS rows, from r on.
    Eight<X> found[ROWS][ROUND];
    auto load = [&](int r, int i) {
#pragma unroll
        for (int a = 0; a < ROWS; a++) {
            int at = r + a * AT_ONCE;
            i64 from = at < count ? row(first + at) : -1;
#pragma unroll
            for (int j = 0; j < ROUND; j++) {
                int k = ((i * ROUND + j) * LANES + lane) * 8;
                found[a][j] = Eight<X>{};
                if (from >= 0 && k < PART && k0 + k < K) found[a][j] = fresh(x + from * K + k0 + k);
            }
        }
    };
    for (int r = threadIdx.x / LANES; r < count; r += AT_ONCE * ROWS) {
        float sum[ROWS] = {};
#pragma unroll 1
        for (int i = 0; i < ROUNDS; i++) {
            load(r, i);
#pragma unroll
            for (int a = 0; a < ROWS; a++)
#pragma unroll
                for (int e = 0; e < ROUND * 8; e++) sum[a] += found[a][e / 8].at(e % 8) * found[a][e / 8].at(e % 8);
        }
#pragma unroll
        for (int a = 0; a < ROWS; a++) {
            sum[a] = warp_sum(sum[a]);
            int at = r + a * AT_ONCE;
            if (lane_id() == 0 && at < count) sums[at * ROW_WARPS + lane / 32] = sum[a];
        }
    }
    cluster_sync<SPLIT>();
    for (int r = threadIdx.x / LANES; r < count; r += AT_ONCE * ROWS) {
        float scale[ROWS];
#pragma unroll
        for (int a = 0; a < ROWS; a++) {
            int at = min(r + a * AT_ONCE, count - 1);
            float sum = 0;
#pragma unroll
            for (int i = 0; i < SPLIT * ROW_WARPS; i++) {
                const float* part = sums + at * ROW_WARPS + i % ROW_WARPS;
                if constexpr (SPLIT > 1) sum += load_remote(part, i / ROW_WARPS);
                else sum += *part;
            }
            scale[a] = 1.0f / sqrtf(sum / (float)K + eps);
        }
#pragma unroll 1
        for (int i = 0; i < ROUNDS; i++) {
            load(r, i);
#pragma unroll
            for (int j = 0; j < ROUND; j++) {
                int k = ((i * ROUND + j) * LANES + lane) * 8;
                if (k >= PART) continue;
                Eight<Weight> by = only;
                if (VECTORS > 1 && k0 + k < K) by = *(const Eight<Weight>*)(weight + k0 + k);
#pragma unroll
                for (int a = 0; a < ROWS; a++) {
                    float values[8];
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        float normed = rounded<X>(__fmul_rn(found[a][j].at(e), scale[a]));
                        values[e] = rounded<M>(__fmul_rn(normed, by.at(e)));
                    }
                    if (r + a * AT_ONCE < count) Layout::put(to, r + a * AT_ONCE, k, values);
                }
            }
        }
    }
}

// Positions and slots of rows.
struct Places {
    int positions[COLUMNS];
    int slots[COLUMNS];
};
__device__ __forceinline__ Places& shared_places() {
    __shared__ Places places;
    return places;
}
// The caller synchronises.
__device__ __forceinline__ void find_places(const int* pos, const int* slot, int first, int count) {
    Places& places = shared_places();
    for (int r = threadIdx.x; r < count; r += THREADS) {
        places.positions[r] = load_early(pos + first + r);
        places.slots[r] = load_early(slot + first + r);
    }
}

// What a convolution may find out before the wait, if its state and inputs are there: the places of the first rows, while the
// columns of theirs that it will read are brought near. The caller synchronises.
template <int TAPS, int RING_COLUMNS, class Ring>
__device__ __forceinline__ void look_ahead(const Ring* ring, const int* pos, const int* slot, int rows) {
    constexpr int LINES = (K * (int)sizeof(Ring) + 127) / 128, EACH = LINES * (TAPS - 1);
    int count = min(rows, COLUMNS);
    find_places(pos, slot, 0, count);
    for (int i = threadIdx.x; i < count * EACH; i += THREADS) {
        int r = i / EACH, column = load_early(pos + r) - (TAPS - 1 - i % EACH / LINES), at = load_early(slot + r);
        if (at < 0 || column < 0) continue;
        const u8* from = (const u8*)(ring + ((i64)at * RING_COLUMNS + column % RING_COLUMNS) * K) + i % LINES * 128;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
    }
}


// The rows c * (conv(b * x) + bias) of (b, c, x), three parts of a row of x: the columns before the row's own come from a ring
// of RING_COLUMNS by position, TAPS - 1 of them, so each sequence may have but one row. With `writes`, b * x goes into the
// ring, to a column that is none of those read. U, V, B and M are the types that b * x, the convolution, that with its bias,
// and the result are rounded to. A thread keeps its channels from row to row.
template <class Layout, class M, class U, class V, class B, int TAPS, int RING_COLUMNS, class Weight, class Ring, class Bias>
__device__ __forceinline__ void stage_short_conv(
    S* to, const X* x, int first, int count, int k0, const Weight* __restrict__ weight, Ring* ring, const int* pos,
    const int* slot, const Bias* bias, bool writes, bool known
) {
    constexpr int VECTORS = PART / 8, ACROSS = VECTORS < THREADS ? VECTORS : THREADS, DOWN = THREADS / ACROSS;
    constexpr int ROUND = IN_FLIGHT<Layout> > 4 && COLUMNS > DOWN ? 2 : 1, EARLIER = TAPS > 1 ? TAPS - 1 : 1;
    Places& places = shared_places();
    int *positions = places.positions, *slots = places.slots;
    if (!known || first != 0) {
        find_places(pos, slot, first, count);
        __syncthreads();
    }
    if (threadIdx.x >= ACROSS * DOWN) return;
    for (int k = threadIdx.x % ACROSS * 8; k < PART; k += ACROSS * 8) {
        const int channel = k0 + k;
        const bool inside = channel < K;
        Eight<Weight> by[TAPS] = {};
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++)
            if (inside) by[tap] = ((const Eight<Weight>*)(weight + (i64)channel * TAPS))[tap];
        for (int r0 = threadIdx.x / ACROSS; r0 < count; r0 += DOWN * ROUND) {
            Eight<X> b[ROUND] = {}, c[ROUND] = {}, v[ROUND] = {};
            Eight<Ring> earlier[ROUND][EARLIER] = {};
#pragma unroll
            for (int a = 0; a < ROUND; a++) {
                int r = r0 + a * DOWN;
                if (r >= count || !inside) continue;
                const X* from = x + (i64)(first + r) * (3 * K) + channel;
                b[a] = fresh(from);
                c[a] = fresh(from + K);
                v[a] = fresh(from + 2 * K);
                const Ring* columns = ring + (i64)slots[r] * (RING_COLUMNS * (i64)K) + channel;
#pragma unroll
                for (int tap = 0; tap < TAPS - 1; tap++) {
                    int from_position = positions[r] - (TAPS - 1 - tap);
                    if (slots[r] >= 0 && from_position >= 0)
                        earlier[a][tap] = fresh(columns + from_position % RING_COLUMNS * (i64)K);
                }
            }
#pragma unroll
            for (int a = 0; a < ROUND; a++) {
                int r = r0 + a * DOWN;
                if (r >= count) continue;
                bool live = inside && slots[r] >= 0 && positions[r] >= 0;
                float u[8], values[8];
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    u[e] = rounded<U>(__fmul_rn(b[a].at(e), v[a].at(e)));
                    float sum = 0;
#pragma unroll
                    for (int tap = 0; tap < TAPS; tap++) {
                        int flat = e * TAPS + tap;
                        float column = tap == TAPS - 1 ? u[e] : earlier[a][tap < TAPS - 1 ? tap : 0].at(e);
                        sum = __fadd_rn(sum, __fmul_rn(by[flat / 8].at(flat % 8), column));
                    }
                    sum = rounded<V>(live ? sum : 0.0f);
                    if (bias != nullptr && inside) sum = rounded<B>(__fadd_rn(sum, to_f32(bias[channel + e])));
                    values[e] = rounded<M>(__fmul_rn(c[a].at(e), sum));
                }
                Layout::put(to, r, k, values);
                if (writes && live) {
                    Eight<Ring> written;
                    written.set(u);
                    i64 column = (i64)slots[r] * RING_COLUMNS + positions[r] % RING_COLUMNS;
                    *(Eight<Ring>*)(ring + column * K + channel) = written;
                }
            }
        }
    }
}
