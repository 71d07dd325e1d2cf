// A matrix product on tensor cores with what follows it: y [rows,..] = epilogue(x [rows,K] w [N,K]^T), 16-bit operands,
// sums in f32. Grouped: w [EXPERTS,N,K], and expert e multiplies rows offsets[e] .. offsets[e + 1] of the result; gathered:
// row r of the result is row pairs[r] / PER_TOKEN of x. Rows past the last group are as if the product were zero.
//
// A block computes BM rows for BN rows of w, a warp WM x WN of that; see tiles.cuh for the order. K goes by in tiles of 64,
// which lie in a ring of STAGES buffers in shared memory: BM rows of x, then BN of w, each row 128 bytes, whose eight chunks
// of 16 bytes are permuted by the row's lowest three bits, so that neither copies nor ldmatrix have bank conflicts.
//
// A buffer is filled again only after the barrier that follows the last read of it; it is read only after the wait for its
// copies and a barrier. Rows that a partial tile lacks are other rows again, whose results are not stored; columns of K
// beyond the end are zeros on both sides.

#include "mma.cuh"
#include "tiles.cuh"

constexpr int BK = 64, K_STEPS = BK / 16, K_TILES = (K + BK - 1) / BK;
constexpr int ROW_BYTES = BK * 2, STAGE_BYTES = (BM + BN) * ROW_BYTES;
constexpr int MT = WM / 16, NT = WN / 8, OUT_TILES = NT / HALVES;
// Eight threads copy a row; each thread copies the same chunk of rows that are COPY_ROWS apart.
constexpr int COPY_ROWS = THREADS / 8, X_COPIES = BM / COPY_ROWS, W_COPIES = BN / COPY_ROWS;
static_assert(COPY_ROWS % 8 == 0 && BM % COPY_ROWS == 0 && BN % COPY_ROWS == 0, "whole rounds of copies");
static_assert(WM % 16 == 0 && WN % 16 == 0 && BM / WM * (BN / WN) * 32 == THREADS, "a warp for each part");
static_assert(K % 8 == 0 && N % (8 * HALVES) == 0 && STAGES >= 3, "chunks of sixteen bytes");

// The bits of two adjacent elements, if these are of 16.
template <class T> __device__ __forceinline__ u32 word(const Pack<T, 2>& two) {
    if constexpr (sizeof(T) == 2)
        return (u32)two.at[0].bits | (u32)two.at[1].bits << 16;
    else
        return 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) tile(PARAMS) {
    release_next();
    extern __shared__ __align__(128) u8 shared[];
    const u32 ring = shared_address(shared);
    const int lane = (int)lane_id(), warp = (int)warp_id();
    const TileAt at = tile_of_block<(N + BN - 1) / BN, BAND>();
    const int n0 = at.column * BN;

#if GROUPED
    wait_for_previous();
    const GroupPart part = find_part<EXPERTS, BM>(offsets, at.row, rows);
    if (part.group < 0) return;
    const int k_tiles = part.group < EXPERTS ? K_TILES : 0;
    const int start = part.start, end = part.end;
    const X* weights = w + (i64)min(part.group, EXPERTS - 1) * N * K;
#else
    const int k_tiles = K_TILES, start = at.row * BM, end = rows;
    const X* weights = w;
#endif

    const int chunk = (int)threadIdx.x % 8, copy_row = (int)threadIdx.x / 8;
    const u32 copy_to = copy_row * ROW_BYTES + ((chunk ^ (copy_row % 8)) << 4);
    // Copies begin for this thread's chunks of K tile `tile`: zeros where the chunk is past the end.
    auto copy_weights = [&](int tile, u32 stage) {
        int k = tile * BK + chunk * 8;
        bool valid = K % BK == 0 || k < K;
#pragma unroll
        for (int i = 0; i < W_COPIES; i++) {
            int row = n0 + copy_row + i * COPY_ROWS;
            if (N % BN != 0) row = min(row, N - 1);
            copy_async(stage + BM * ROW_BYTES + copy_to + i * COPY_ROWS * ROW_BYTES, weights + (i64)row * K + (valid ? k : 0),
                       valid);
        }
    };

#if !GROUPED
    // Weights may be read while the kernel before is still at work.
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        if (s < k_tiles) copy_weights(s, ring + s * STAGE_BYTES);
    wait_for_previous();
#endif

    int x_row[X_COPIES];
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) {
        int row = min(start + copy_row + i * COPY_ROWS, end - 1);
#if GATHERED
        x_row[i] = k_tiles > 0 ? pairs[row] / PER_TOKEN : 0;
#else
        x_row[i] = row;
#endif
    }
    auto copy_x = [&](int tile, u32 stage) {
        int k = tile * BK + chunk * 8;
        bool valid = K % BK == 0 || k < K;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++)
            copy_async(stage + copy_to + i * COPY_ROWS * ROW_BYTES, x + (i64)x_row[i] * K + (valid ? k : 0), valid);
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < k_tiles) {
            copy_x(s, ring + s * STAGE_BYTES);
#if GROUPED
            copy_weights(s, ring + s * STAGE_BYTES);
#endif
        }
        copies_end_group();
    }

    // Where the warp's part of the tile begins, and each lane's rows of ldmatrix in it. For x the matrices of a load are
    // rows 0 .. 7, rows 8 .. 15, then the same for the next eight k; for w two chunks of k, then of the next eight rows.
    const int m_warp = warp / (BN / WN) * WM, n_warp = warp % (BN / WN) * WN;
    const u32 x_lane = (m_warp + lane % 16) * ROW_BYTES, x_chunk = ((lane / 16) ^ (lane % 8)) << 4;
    const u32 w_lane = (BM + n_warp + lane % 8 + lane / 16 * 8) * ROW_BYTES, w_chunk = ((lane / 8 % 2) ^ (lane % 8)) << 4;
    float d[MT][NT][4] = {};
    u32 a[2][MT][4], b[2][NT][2];
    auto load_fragments = [&](int buffer, u32 stage, int step) {
#pragma unroll
        for (int i = 0; i < MT; i++)
            load_matrices(a[buffer][i], stage + x_lane + (x_chunk ^ (step << 5)) + i * 16 * ROW_BYTES);
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            u32 four[4];
            load_matrices(four, stage + w_lane + (w_chunk ^ (step << 5)) + j * 8 * ROW_BYTES);
            b[buffer][j][0] = four[0], b[buffer][j][1] = four[1];
            b[buffer][j + 1][0] = four[2], b[buffer][j + 1][1] = four[3];
        }
    };

    // Fragments are loaded one step of sixteen k ahead of their use, across tiles too.
    u32 reading = ring, writing = ring + (STAGES - 1) * STAGE_BYTES;
    const u32 ring_end = ring + STAGES * STAGE_BYTES;
    copies_wait<STAGES - 2>();
    __syncthreads();
    load_fragments(0, reading, 0);
    for (int tile = 0; tile < k_tiles; tile++) {
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) {
            if (step == K_STEPS - 1) {
                copies_wait<STAGES - 2>();
                __syncthreads();
                reading = reading + STAGE_BYTES == ring_end ? ring : reading + STAGE_BYTES;
            }
            load_fragments((step + 1) % 2, reading, (step + 1) % K_STEPS);
            if (step == 0) {
                if (tile + STAGES - 1 < k_tiles) {
                    copy_x(tile + STAGES - 1, writing);
                    copy_weights(tile + STAGES - 1, writing);
                }
                copies_end_group();
                writing = writing + STAGE_BYTES == ring_end ? ring : writing + STAGE_BYTES;
            }
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++) mma<X>(d[i][j], a[step % 2][i], b[step % 2][j]);
        }
    }

    // A thread has columns 2t and 2t + 1 of each n tile. Where the result is 16 bits wide, neighbours exchange, so that one
    // has four columns of a tile, the other four of the next, and each sector of memory is written as a whole.
    constexpr bool EXCHANGE = sizeof(Y) == 2 && OUT_TILES % 2 == 0;
    constexpr int TOGETHER = EXCHANGE ? 2 : 1;
    auto inside = [&](int row, int column) { return row < end && (N % BN == 0 || column < Y_COLUMNS); };
    const int column0 = (n0 + n_warp) / HALVES, t = lane % 4;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const int row = start + m_warp + i * 16 + upper * 8 + lane / 4;
#pragma unroll
            for (int j = 0; j < OUT_TILES; j += TOGETHER) {
                Pack<Y, 2> made[TOGETHER];
#pragma unroll
                for (int o = 0; o < TOGETHER; o++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int column = column0 + (j + o) * 8 + t * 2 + c;
                        const float v0 = d[i][(j + o) * HALVES][upper * 2 + c];
                        const float v1 = HALVES == 2 ? d[i][(j + o) * HALVES + HALVES - 1][upper * 2 + c] : 0.0f;
                        float value = 0;
                        if (inside(row, column)) value = EPILOGUE(v0, v1, row, column);
                        made[o].at[c] = from_f32<Y>(value);
                    }
                if constexpr (EXCHANGE) {
                    u32 first = word(made[0]), second = word(made[TOGETHER - 1]);
                    u32 other = __shfl_xor_sync(ALL_LANES, t % 2 == 0 ? second : first, 1);
                    const int column = column0 + (j + t % 2) * 8 + t / 2 * 4;
                    Pack<u32, 2> four = t % 2 == 0 ? Pack<u32, 2>{first, other} : Pack<u32, 2>{other, second};
                    if (inside(row, column)) *(Pack<u32, 2>*)(y + (i64)row * Y_COLUMNS + column) = four;
                } else {
                    const int column = column0 + j * 8 + t * 2;
                    if (inside(row, column)) *(Pack<Y, 2>*)(y + (i64)row * Y_COLUMNS + column) = made[0];
                }
            }
        }
}
