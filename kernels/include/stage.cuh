// Puts rows of x, finished by what a fused step does before its product, into shared memory: all threads of a block
// together. Used by kernels that read their rows once and stream weights past them.
//
// Generated: K, the elements of a row; PART, those that a block stages, of which the ones beyond K are zeros, from column k0
// on; SPLIT, the blocks of a cluster that stage the parts of the same rows; COLUMNS, the most rows; THREADS; X, the type of
// x; S, the type staged. `Layout::put(to, r, k, values)` stores eight elements of row r, `Layout::at(to, r, k)` is where;
// `row(i)` is the row of x for row i, negative for zeros. The caller synchronises, before and after.
#pragma once

#include "block.cuh"
#include "mma.cuh"

constexpr int WARPS = THREADS / 32;

// Eight adjacent elements, as they are in memory.
template <class T> struct Eight {
    Quad quads[sizeof(T) / 2];

    __device__ __forceinline__ float at(int i) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(quads[i / 4].at[i % 4]);
        } else {
            u32 word = quads[0].at[i / 2];
            return i % 2 ? high<T>(word) : low<T>(word);
        }
    }
    __device__ __forceinline__ void set(const float (&x)[8]) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 8; i++) quads[i / 4].at[i % 4] = __float_as_uint(x[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) quads[0].at[i] = pair<T>(x[2 * i], x[2 * i + 1]);
        }
    }
};

template <class T> __device__ __forceinline__ Eight<T> fresh(const T* from) {
    Eight<T> x;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(T) / 2); i++) x.quads[i] = load_fresh((const Quad*)from + i);
    return x;
}

template <class A, class B> struct Same {
    static constexpr bool VALUE = false;
};
template <class A> struct Same<A, A> {
    static constexpr bool VALUE = true;
};

// The rows as they are.
template <class Layout, class Row>
__device__ __forceinline__ void stage_plain(S* to, const X* x, int first, int count, int k0, Row row) {
    constexpr int VECTORS = PART / 8, ROUND = 4;
    if constexpr (Same<X, S>::VALUE && sizeof(S) == 2) {
        for (int r = 0; r < count; r++) {
            i64 from = row(first + r);
            for (int k = threadIdx.x * 8; k < PART; k += THREADS * 8) {
                bool valid = from >= 0 && k0 + k < K;
                copy_async(shared_address(Layout::at(to, r, k)), valid ? x + from * K + k0 + k : x, valid);
            }
        }
        copies_end_group();
        copies_wait<0>();
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

// The rows after an RMSNorm: ROW_WARPS warps a row (generated); the parts of a cluster add up their sums of squares.
template <class Layout, class M, class Row, class Weight>
__device__ __forceinline__ void
stage_norm(S* to, const X* x, int first, int count, int k0, Row row, const Weight* __restrict__ weight, float eps) {
    constexpr int LANES = 32 * ROW_WARPS, ROUND = PART / 8 > 2 * LANES ? 4 : PART / 8 > LANES ? 2 : 1;
    __shared__ float sums[COLUMNS * ROW_WARPS];
    int lane = threadIdx.x % LANES;
    auto load = [&](i64 from, int k) {
        Eight<X> found = {};
        if (from >= 0 && k < PART && k0 + k < K) found = fresh(x + from * K + k0 + k);
        return found;
    };
    for (int r = threadIdx.x / LANES; r < count; r += WARPS / ROW_WARPS) {
        i64 from = row(first + r);
        float sum = 0;
        for (int k = lane * 8; k < PART; k += LANES * 8 * ROUND) {
            Eight<X> found[ROUND];
#pragma unroll
            for (int j = 0; j < ROUND; j++) found[j] = load(from, k + j * LANES * 8);
#pragma unroll
            for (int j = 0; j < ROUND; j++)
#pragma unroll
                for (int e = 0; e < 8; e++) sum += found[j].at(e) * found[j].at(e);
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) sums[r * ROW_WARPS + lane / 32] = sum;
    }
    if constexpr (SPLIT > 1) cluster_sync();
    else __syncthreads();
    for (int r = threadIdx.x / LANES; r < count; r += WARPS / ROW_WARPS) {
        i64 from = row(first + r);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < SPLIT * ROW_WARPS; i++) {
            const float* at = sums + r * ROW_WARPS + i % ROW_WARPS;
            if constexpr (SPLIT > 1) sum += cluster_read(at, i / ROW_WARPS);
            else sum += *at;
        }
        float scale = 1.0f / sqrtf(sum / (float)K + eps);
        for (int k = lane * 8; k < PART; k += LANES * 8 * ROUND) {
            Eight<X> found[ROUND];
#pragma unroll
            for (int j = 0; j < ROUND; j++) found[j] = load(from, k + j * LANES * 8);
#pragma unroll
            for (int j = 0; j < ROUND; j++) {
                int at = k + j * LANES * 8;
                if (at >= PART) continue;
                Eight<Weight> by = {};
                if (k0 + at < K) by = *(const Eight<Weight>*)(weight + k0 + at);
                float values[8];
#pragma unroll
                for (int e = 0; e < 8; e++)
                    values[e] = rounded<M>(__fmul_rn(rounded<X>(__fmul_rn(found[j].at(e), scale)), by.at(e)));
                Layout::put(to, r, at, values);
            }
        }
    }
}

// The rows c * (conv(b * x) + bias) of (b, c, x), three parts of a row of x: the columns before the row's own come from a ring
// of RING_COLUMNS by position, TAPS - 1 of them, so each sequence may have but one row. With `writes`, b * x goes into the
// ring, to a column that is none of those read. U, V, B and M are the types that b * x, the convolution, that with its bias,
// and the result are rounded to.
template <class Layout, class M, class U, class V, class B, int TAPS, int RING_COLUMNS, class Weight, class Ring, class Bias>
__device__ __forceinline__ void stage_short_conv(
    S* to, const X* x, int first, int count, int k0, const Weight* __restrict__ weight, Ring* ring, const int* pos,
    const int* slot, const Bias* __restrict__ bias, bool writes
) {
    constexpr int VECTORS = PART / 8;
    for (int i = threadIdx.x; i < count * VECTORS; i += THREADS) {
        int r = i / VECTORS, k = i % VECTORS * 8, channel = k0 + k;
        float values[8] = {};
        if (channel < K) {
            int at = load_fresh(slot + first + r), p = load_fresh(pos + first + r);
            const X* from = x + (i64)(first + r) * (3 * K) + channel;
            Eight<X> b = fresh(from), x2 = fresh(from + 2 * K), c = fresh(from + K);
            bool live = at >= 0 && p >= 0;
            Ring* columns = ring + (i64)(live ? at : 0) * (RING_COLUMNS * (i64)K) + channel;
            Eight<Ring> earlier[TAPS > 1 ? TAPS - 1 : 1] = {};
#pragma unroll
            for (int tap = 0; tap < TAPS - 1; tap++) {
                int back = TAPS - 1 - tap;
                if (live && p >= back) earlier[tap] = fresh((const Ring*)columns + (p - back) % RING_COLUMNS * (i64)K);
            }
            Eight<Weight> by[TAPS];
#pragma unroll
            for (int tap = 0; tap < TAPS; tap++) by[tap] = ((const Eight<Weight>*)(weight + (i64)channel * TAPS))[tap];
            float u[8];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                u[e] = rounded<U>(__fmul_rn(b.at(e), x2.at(e)));
                float sum = 0;
#pragma unroll
                for (int tap = 0; tap < TAPS; tap++) {
                    int flat = e * TAPS + tap;
                    float column = tap == TAPS - 1 ? u[e] : earlier[tap < TAPS - 1 ? tap : 0].at(e);
                    sum = __fadd_rn(sum, __fmul_rn(by[flat / 8].at(flat % 8), column));
                }
                sum = rounded<V>(live ? sum : 0.0f);
                if (bias != nullptr) sum = rounded<B>(__fadd_rn(sum, to_f32(bias[channel + e])));
                values[e] = rounded<M>(__fmul_rn(c.at(e), sum));
            }
            if (writes && live) {
                Eight<Ring> written;
                written.set(u);
                *(Eight<Ring>*)(columns + p % RING_COLUMNS * (i64)K) = written;
            }
        }
        Layout::put(to, r, k, values);
    }
}
