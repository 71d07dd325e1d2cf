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
// warp's threads are eight beside each other, four below. Adjacent lanes are below each other and lanes two apart beside each
// other, so that of two lanes with the same address in each sixteen one read of shared memory serves both. The registers of a
// product's operands can hardly be read as fast as products begin: every other row goes backwards over its columns, and each
// product has one operand in common with the one before it. K goes by in tiles of BK, as f32 in two buffers in shared memory, k
// outermost, with room after every eighth against conflicts of writes. While one buffer is in use, the next tile comes into
// registers, from there into the other buffer; the barrier after that separates its reads from the writes, both ways, and other
// blocks on the multiprocessor work meanwhile. Rows that a partial tile lacks are other rows again, whose results are not
// stored; beyond the end of K are zeros on both sides.

constexpr int ROW_RUN = TM < 4 ? TM : 4, ROW_APART = BM / (TM / ROW_RUN), COLUMN_APART = BN / (TN / 4);
constexpr int COLUMNS = BN / HALVES;
static_assert(BM / TM * (BN / TN) == THREADS && TM % ROW_RUN == 0 && TN % 4 == 0, "a thread for each part");
static_assert(HALVES == 1 || TN == 8, "one quad of each half");
constexpr int ACROSS = BN / TN, LANES_ACROSS = ACROSS < 8 ? ACROSS : 8, WARPS_ACROSS = ACROSS / LANES_ACROSS;
static_assert(ACROSS % LANES_ACROSS == 0 && (int)WARP % LANES_ACROSS == 0, "whole warps");

// A tile of WIDTH rows or columns of type T: the block's threads copy chunks of VECTOR elements along K, of sixteen bytes where
// K allows it, a thread the same chunk of every so many rows.
template <class T, int WIDTH> struct Tile {
    static constexpr int QUAD = 16 / (int)sizeof(T), EACH = WIDTH * BK / THREADS, WIDE = EACH < QUAD ? EACH : QUAD;
    static constexpr int VECTOR = K % WIDE == 0 ? WIDE : ::VECTOR;
    static constexpr int CHUNKS = BK / VECTOR, APART = THREADS / CHUNKS, COPIES = WIDTH / APART;
    static_assert(THREADS % CHUNKS == 0 && WIDTH % APART == 0, "whole rounds of copies");
    static constexpr int ROOM = CHUNKS < 8 ? 32 / CHUNKS : 4;

    // Where k begins in a buffer.
    __device__ static constexpr int begin(int k) { return k * (WIDTH + 4) + k / 8 * ROOM; }

    Pack<T, VECTOR> next[COPIES];

    // Writes the chunks to a buffer.
    __device__ __forceinline__ void put(float* buffer) const {
        const int place = (int)threadIdx.x / CHUNKS, k = (int)threadIdx.x % CHUNKS * VECTOR;
#pragma unroll
        for (int i = 0; i < COPIES; i++)
#pragma unroll
            for (int j = 0; j < VECTOR; j++) buffer[begin(k + j) + place + i * APART] = to_f32(next[i].at[j]);
    }
};
typedef Tile<X, BM> XTile;
typedef Tile<W, BN> WTile;

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

// Reads the thread's chunks of the tile at k0; zeros beyond the end of K.
template <class T, int WIDTH>
__device__ __forceinline__ void fetch_rows(Tile<T, WIDTH>& tile, const T* from, u32 (&rows)[Tile<T, WIDTH>::COPIES], int k0) {
    typedef Tile<T, WIDTH> Of;
    const int k = k0 + (int)threadIdx.x % Of::CHUNKS * Of::VECTOR;
#pragma unroll
    for (int i = 0; i < Of::COPIES; i++) {
        pin(rows[i]);
        tile.next[i] = {};
        if (K % BK == 0 || k < K) tile.next[i] = load_ahead((const Pack<T, Of::VECTOR>*)(from + k + (u64)rows[i] * K));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) tile_fma(PARAMS) {
    release_next();
    wait_for_previous();
    __shared__ __align__(16) float x_buffers[2][XTile::begin(BK)], w_buffers[2][WTile::begin(BK)];
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

    // Rows of x and w that the thread copies from. An address is one operation from a row, which takes half its registers.
    const int id = (int)threadIdx.x;
    u32 x_rows[XTile::COPIES], w_rows[WTile::COPIES];
#pragma unroll
    for (int i = 0; i < XTile::COPIES; i++) {
        int row = min(start + id / XTile::CHUNKS + i * XTile::APART, end - 1);
#if GATHERED
        row = summed ? pairs[row] / PER_TOKEN : 0;
#endif
        x_rows[i] = (u32)row;
    }
#pragma unroll
    for (int i = 0; i < WTile::COPIES; i++) {
        const int place = id / WTile::CHUNKS + i * WTile::APART;
        w_rows[i] = (u32)weight_row(place / COLUMNS, min(column0 + place % COLUMNS, Y_COLUMNS - 1));
    }
    XTile x_tile;
    WTile w_tile;
    auto fetch = [&](int k0) {
        fetch_rows(x_tile, x, x_rows, k0);
        fetch_rows(w_tile, weights, w_rows, k0);
    };

    const int warp = id / (int)WARP, lane = id % (int)WARP;
    const int below = lane % 2 + lane / (2 * LANES_ACROSS) * 2, beside = lane / 2 % LANES_ACROSS;
    const int m_thread = (warp / WARPS_ACROSS * ((int)WARP / LANES_ACROSS) + below) * ROW_RUN;
    const int n_thread = (warp % WARPS_ACROSS * LANES_ACROSS + beside) * 4;
    float d[TM][TN] = {};
    if (summed) {
        fetch(0);
        x_tile.put(x_buffers[0]);
        w_tile.put(w_buffers[0]);
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
                    a[i] = *(const Pack<float, ROW_RUN>*)&x_buffers[buffer][XTile::begin(k) + m_thread + i * ROW_APART];
#pragma unroll
                for (int j = 0; j < TN / 4; j++)
                    b[j] = *(const Pack<float, 4>*)&w_buffers[buffer][WTile::begin(k) + n_thread + j * COLUMN_APART];
#pragma unroll
                for (int i = 0; i < TM; i++)
#pragma unroll
                    for (int step = 0; step < TN; step++) {
                        const int j = i % 2 == 0 ? step : TN - 1 - step;
                        d[i][j] = fmaf(a[i / ROW_RUN].at[i % ROW_RUN], b[j / 4].at[j % 4], d[i][j]);
                    }
            }
            buffer ^= 1;
            x_tile.put(x_buffers[buffer]);
            w_tile.put(w_buffers[buffer]);
            __syncthreads();
        }
    }

    // Zero, as no compiler knows: otherwise the sums would have to lie where a store of four takes them, and their registers
    // would be in the way of the operands' at every product.
    const int nothing = rows >> 31;
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
                const float v0 = __int_as_float(__float_as_int(d[i][j + c]) | nothing);
                if (column + c < Y_COLUMNS) made.at[c] = from_f32<Y>(EPILOGUE(v0, v1, row, column + c));
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
