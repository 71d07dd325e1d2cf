// A matrix product in f32 arithmetic with what follows it, for operands of any types and sizes:
// y [rows,..] = epilogue(x [rows,K] w [N,K]^T). Grouped: w [EXPERTS,N,K], and expert e multiplies rows
// offsets[e] .. offsets[e + 1] of the result; gathered: row r of the result is row pairs[r] / PER_TOKEN of x. By pair: row r
// has the expert experts[r], and is row r / PER_TOKEN of x. Rows without an expert are as if the product were zero.
//
// Where the product is two interleaved halves, a block's columns are as many of the first half and, after them, the same ones
// of the second, so that a thread has both numbers of each of its results.
//
// The sum over K is in ascending order in one accumulator (by pair: one a lane, then over the lanes).

#include "tiles.cuh"

static_assert(N == Y_COLUMNS * HALVES, "every column of the product counts");

// Row of w for the column of a result in one of the halves.
__device__ __forceinline__ i64 weight_row(int half, int column) {
    if (HALVES == 1) return column;
    return (i64)(column / BLOCK * 2 + half) * BLOCK + column % BLOCK;
}

#if BY_PAIR
// A block takes one row and BN columns, a warp one column after another.

extern "C" __global__ void __launch_bounds__(THREADS) tile_fma(PARAMS) {
    release_next();
    wait_for_previous();
    constexpr int TILES = (Y_COLUMNS + BN - 1) / BN;
    const int row = (int)blockIdx.x / TILES, column0 = (int)blockIdx.x % TILES * BN;
    const int expert = experts[row];
    const X* from = x + (i64)(row / PER_TOKEN) * K;
    for (int column = column0 + (int)warp_id(); column < min(column0 + BN, Y_COLUMNS); column += THREADS / (int)WARP) {
        float v[2] = {};
        if (expert >= 0) {
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                const W* weights = w + ((i64)expert * N + weight_row(half, column)) * K;
                for (int k = (int)lane_id() * VECTOR; k < K; k += (int)WARP * VECTOR) {
                    Pack<X, VECTOR> p = *(const Pack<X, VECTOR>*)(from + k);
                    Pack<W, VECTOR> q = *(const Pack<W, VECTOR>*)(weights + k);
#pragma unroll
                    for (int j = 0; j < VECTOR; j++) v[half] = fmaf(to_f32(p.at[j]), to_f32(q.at[j]), v[half]);
                }
                v[half] = warp_sum(v[half]);
            }
        }
        if (lane_id() == 0) y[(i64)row * Y_COLUMNS + column] = from_f32<Y>(EPILOGUE(v[0], v[1], row, column));
    }
}

#else
// A block computes BM x BN, a thread TM x TN of it, in quads of adjacent rows and columns that are spread over the tile, and a
// warp's threads are eight beside each other, four below: its reads of shared memory have no bank conflicts, and read little
// twice. K goes by in tiles of BK, as f32 in two buffers in shared memory, k outermost, with room after every eighth against
// conflicts of writes. While one buffer is in use, the next tile comes into registers, from there into the other buffer; the
// barrier after that separates its reads from the writes, both ways, and other blocks on the multiprocessor work meanwhile. Rows
// that a partial tile lacks are other rows again, whose results are not stored; beyond the end of K are zeros on both sides.

constexpr int ROW_RUN = TM < 4 ? TM : 4, ROW_APART = BM / (TM / ROW_RUN), COLUMN_APART = BN / (TN / 4);
constexpr int COLUMNS = BN / HALVES, CHUNKS = BK / VECTOR;
constexpr int X_COPIES = BM * CHUNKS / THREADS, W_COPIES = BN * CHUNKS / THREADS;
static_assert(BM / TM * (BN / TN) == THREADS && TM % ROW_RUN == 0 && TN % 4 == 0, "a thread for each part");
static_assert(HALVES == 1 || TN == 8, "one quad of each half");
constexpr int ACROSS = BN / TN, LANES_ACROSS = ACROSS < 8 ? ACROSS : 8, WARPS_ACROSS = ACROSS / LANES_ACROSS;
static_assert(ACROSS % LANES_ACROSS == 0 && (int)WARP % LANES_ACROSS == 0, "whole warps");

// Where k begins in a buffer of so many rows or columns.
__device__ constexpr int begin_of(int k, int width) { return k * (width + 4) + k / 8 * 8; }
static_assert(BM * CHUNKS % THREADS == 0 && BN * CHUNKS % THREADS == 0, "whole rounds of copies");

// Reads what is wanted only after other work, and begins before it: an ordinary load the compiler would move to its use.
template <class T> __device__ __forceinline__ T load_ahead(const T* from) {
    T value;
    if constexpr (sizeof(T) == 16) {
        const Quad q = load_fresh((const void*)from);
        value = *(const T*)&q;
    } else if constexpr (sizeof(T) == 8) {
        u64 bits;
        asm volatile("ld.global.b64 %0, [%1];" : "=l"(bits) : "l"(from));
        value = *(const T*)&bits;
    } else {
        value = *from;
    }
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) tile_fma(PARAMS) {
    release_next();
    wait_for_previous();
    __shared__ __align__(16) float x_tile[2][begin_of(BK, BM)], w_tile[2][begin_of(BK, BN)];
    const TileAt at = tile_of_block<(Y_COLUMNS + COLUMNS - 1) / COLUMNS, BAND>();
    const int column0 = at.column * COLUMNS;
#if GROUPED
    const GroupPart part = find_part<EXPERTS, BM>(offsets, at.row, rows);
    if (part.group < 0) return;
    const bool summed = part.group < EXPERTS;
    const int start = part.start, end = part.end;
    const W* weights = w + (i64)min(part.group, EXPERTS - 1) * N * K;
#else
    const bool summed = true;
    const int start = at.row * BM, end = rows;
    const W* weights = w;
#endif

    // A thread copies chunks of VECTOR elements along K.
    const int id = (int)threadIdx.x;
    const X* x_from[X_COPIES];
    const W* w_from[W_COPIES];
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) {
        int row = min(start + (id + i * THREADS) / CHUNKS, end - 1);
#if GATHERED
        row = summed ? pairs[row] / PER_TOKEN : 0;
#endif
        x_from[i] = x + (i64)row * K;
    }
#pragma unroll
    for (int i = 0; i < W_COPIES; i++) {
        int place = (id + i * THREADS) / CHUNKS;
        w_from[i] = weights + weight_row(place / COLUMNS, min(column0 + place % COLUMNS, Y_COLUMNS - 1)) * K;
    }
    Pack<X, VECTOR> x_next[X_COPIES];
    Pack<W, VECTOR> w_next[W_COPIES];
    auto fetch = [&](int k0) {
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            int k = k0 + (id + i * THREADS) % CHUNKS * VECTOR;
            x_next[i] = {};
            if (K % BK == 0 || k < K) x_next[i] = load_ahead((const Pack<X, VECTOR>*)(x_from[i] + k));
        }
#pragma unroll
        for (int i = 0; i < W_COPIES; i++) {
            int k = k0 + (id + i * THREADS) % CHUNKS * VECTOR;
            w_next[i] = {};
            if (K % BK == 0 || k < K) w_next[i] = load_ahead((const Pack<W, VECTOR>*)(w_from[i] + k));
        }
    };
    auto put = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            int place = (id + i * THREADS) / CHUNKS, k = (id + i * THREADS) % CHUNKS * VECTOR;
#pragma unroll
            for (int j = 0; j < VECTOR; j++) x_tile[buffer][begin_of(k + j, BM) + place] = to_f32(x_next[i].at[j]);
        }
#pragma unroll
        for (int i = 0; i < W_COPIES; i++) {
            int place = (id + i * THREADS) / CHUNKS, k = (id + i * THREADS) % CHUNKS * VECTOR;
#pragma unroll
            for (int j = 0; j < VECTOR; j++) w_tile[buffer][begin_of(k + j, BN) + place] = to_f32(w_next[i].at[j]);
        }
    };

    const int warp = id / (int)WARP, lane = id % (int)WARP;
    const int m_thread = (warp / WARPS_ACROSS * ((int)WARP / LANES_ACROSS) + lane / LANES_ACROSS) * ROW_RUN;
    const int n_thread = (warp % WARPS_ACROSS * LANES_ACROSS + lane % LANES_ACROSS) * 4;
    float d[TM][TN] = {};
    if (summed) {
        fetch(0);
        put(0);
        __syncthreads();
        int buffer = 0;
        for (int k0 = 0; k0 < K; k0 += BK) {
            // After the last tile the same one again, for nothing: without branches the loads begin before the arithmetic.
            fetch(k0 + BK < K ? k0 + BK : k0);
#pragma unroll
            for (int k = 0; k < BK; k++) {
                Pack<float, ROW_RUN> a[TM / ROW_RUN];
                Pack<float, 4> b[TN / 4];
#pragma unroll
                for (int i = 0; i < TM / ROW_RUN; i++)
                    a[i] = *(const Pack<float, ROW_RUN>*)&x_tile[buffer][begin_of(k, BM) + m_thread + i * ROW_APART];
#pragma unroll
                for (int j = 0; j < TN / 4; j++)
                    b[j] = *(const Pack<float, 4>*)&w_tile[buffer][begin_of(k, BN) + n_thread + j * COLUMN_APART];
#pragma unroll
                for (int i = 0; i < TM; i++)
#pragma unroll
                    for (int j = 0; j < TN; j++)
                        d[i][j] = fmaf(a[i / ROW_RUN].at[i % ROW_RUN], b[j / 4].at[j % 4], d[i][j]);
            }
            put(buffer ^ 1);
            __syncthreads();
            buffer ^= 1;
        }
    }

#pragma unroll
    for (int i = 0; i < TM; i++) {
        const int row = start + m_thread + i / ROW_RUN * ROW_APART + i % ROW_RUN;
        if (row >= end) continue;
#pragma unroll
        for (int j = 0; j < TN / HALVES; j += 4) {
            const int column = column0 + n_thread + j / 4 * COLUMN_APART;
            Pack<Y, 4> made;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const float v1 = HALVES == 2 ? d[i][(j + c + 4) % TN] : 0.0f;
                if (column + c < Y_COLUMNS) made.at[c] = from_f32<Y>(EPILOGUE(d[i][j + c], v1, row, column + c));
            }
            Y* to = y + (i64)row * Y_COLUMNS + column;
            if (Y_COLUMNS % 4 == 0) {
                if (column < Y_COLUMNS) *(Pack<Y, 4>*)to = made;
            } else {
#pragma unroll
                for (int c = 0; c < 4; c++)
                    if (column + c < Y_COLUMNS) to[c] = made.at[c];
            }
        }
    }
}
#endif
