// A matrix product of many rows on Hopper's tensor cores with what follows it: y [rows,..] = epilogue(x [rows,K] w [N,K]^T),
// 16-bit operands, or with SPLIT rows of f32 and a weight of bf16; sums in f32. Grouped: w [EXPERTS,N,K], and expert e multiplies
// rows offsets[e] .. offsets[e + 1] of the result; gathered: row r of the result is row pairs[r] / PER_TOKEN of x. Rows past the
// last group are as if the product were zero.
//
// Tiles are BM rows of w by up to BN rows of x, the product's operands swapped: w's rows are the 64 of an instruction, x's rows
// its columns, of which there may be any multiple of eight, so that groups of any size waste little. A block takes tiles
// blockIdx.x, blockIdx.x + gridDim.x, ... of the list in parts.cuh. Its first warps multiply, 64 or 128 rows of w for each four
// of them; of the last four, COPIERS copy and FINISHERS, if any, finish. K goes by in steps of 64 through a ring of STAGES
// buffers: BM rows of w, then BN of x, 128 bytes each, as wgmma.cuh says. w comes as one box of its tensor map; x as boxes of
// BOX rows, or where it is gathered by copies of 16 bytes.
//
// With SPLIT those who copy take rows of x apart into TERMS terms of bf16 (terms.cuh), which lie one after the other, and w meets
// each of them. The unit that multiplies cuts every sum off towards zero where f32 would round: over a long K, and in the same
// direction each time, that is worse than sums of f32 in order. So it adds up one step of K, the smallest terms first, and ordinary
// additions do the rest.
//
// A buffer's barrier `full` ends a phase when its bytes and copies are there, `empty` when each multiplying warp has arrived,
// which it does after the products that read the buffer are done. Copies of 16 bytes are not made by the unit that the products
// read with (they are of the generic proxy): each copying thread waits for its own, LAG buffers later, fences, and then arrives.
// A buffer is freed when the next one's products have begun, so LAG is at most STAGES - 2. Boxes need no fence.
//
// Results go through shared memory, PIECE rows at a time for each four multiplying warps: these hold columns of x's rows, and
// memory wants rows. Without finishers they finish a piece themselves. There are then two buffers, taken in turn, and one
// barrier after writing: a thread that writes into a buffer again has passed the barrier of the piece between, and so have all,
// after reading that buffer. With finishers a piece is a whole tile, in one buffer, which FILLED hands over and DRAINED hands
// back, while the next tile is multiplied; the block's last tile is finished by those who multiplied it.
//
// With two SHARES a tile is a cluster's of two blocks, where there are too few tiles for all multiprocessors: each block has one half
// of K, and finishes one half of x's rows. It sends its sums of the other half, and adds those that it gets to its own: the sum of
// two numbers, whoever adds them. A cluster has one tile at the most, so that nobody need say that there is room for sums again.
//
// Which instructions add up an element, and in which order, depends on K and SHARES alone.

#include "wgmma.cuh"
#include "cluster.cuh"

constexpr int BK = 64, ROW_BYTES = BK * 2, K_TILES = (K + BK - 1) / BK / SHARES, K_STEPS = BK / 16;
constexpr int W_BYTES = BM * ROW_BYTES, X_BYTES = BN * ROW_BYTES, STAGE_BYTES = W_BYTES + TERMS * X_BYTES;
constexpr int COLUMN_TILES = (N + BM - 1) / BM;
constexpr int GROUP_THREADS = 128, MULTIPLIERS = THREADS / GROUP_THREADS - 1;
constexpr int COPY_THREADS = COPIERS * 32, FINISH_THREADS = FINISHERS * 32;
constexpr int WM = BM / MULTIPLIERS, MT = WM / 64;
static_assert(WM * MULTIPLIERS == BM && MT * 64 == WM, "whole instructions");
static_assert(BN % BOX == 0 && BOX % 8 == 0, "boxes stay within their buffer");
static_assert(K % 8 == 0 && N % (8 * HALVES) == 0 && BN % UNIT == 0 && UNIT % 8 == 0 && BN % 16 == 0, "whole chunks");

#include "parts.cuh"

// A buffer of results: PIECE rows of the WM columns that four warps have, with room between rows against bank conflicts.
constexpr int OUT_ROW = WM + 16 / (int)sizeof(P), OUT_BYTES = PIECE * OUT_ROW * (int)sizeof(P), OUT_BUFFERS = FINISHERS ? 1 : 2;
constexpr int OUT_PIECE = PIECE * OUT_ROW;
constexpr int OUT_AT = STAGES * STAGE_BYTES, BARRIERS_AT = OUT_AT + MULTIPLIERS * OUT_BUFFERS * OUT_BYTES;
constexpr int SUMS_AT = BARRIERS_AT + STAGES * 16, SUMS_BYTES = SHARES > 1 ? BM * BN / SHARES * 4 : 0;
constexpr int PARTS_AT = SUMS_AT + SUMS_BYTES + (SHARES > 1 ? 16 : 0);
static_assert(SHARES == 1 || (!GROUPED && !SPLIT && FINISHERS == 0 && SUMS_AT % 16 == 0), "a tile for each cluster");
static_assert(SHARES == 1 || ((K + BK - 1) / BK % SHARES == 0 && BN / PIECE % SHARES == 0 && BN % 32 == 0), "even shares");
static_assert(COPIERS + FINISHERS <= 4 && PIECE % 16 == 0 && BN % PIECE == 0 && (FINISHERS == 0 || PIECE == BN), "whole pieces");
// Columns of the result that a thread finishes at a time, how often that is in a row, and vectors in work at once, fewer where
// there are few registers.
constexpr int VECTOR = 16 / sizeof(P), ROW_VECTORS = WM / HALVES / VECTOR;
constexpr int MOST_AT_ONCE = RESIDENT * MULTIPLIERS > 2 ? 2 : 4, PIECE_VECTORS = PIECE * ROW_VECTORS / GROUP_THREADS;
constexpr int AT_ONCE = PIECE_VECTORS < 1 ? 1 : PIECE_VECTORS < MOST_AT_ONCE ? PIECE_VECTORS : MOST_AT_ONCE;
// The first of the barriers of each four warps: their own, then those of them and the finishers.
constexpr int OWN = 1, FILLED = OWN + MULTIPLIERS, DRAINED = FILLED + MULTIPLIERS;

// Position in the ring, and whether it goes around for an odd time.
struct Cursor {
    int stage;
    u32 odd;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, odd ^= 1;
    }
};

#if SPLIT
#include "terms.cuh"
#else
// Adds to d the product of a tile with its first COUNT rows of x. The products of a buffer are begun before those of the buffer
// before are done.
template <int COUNT>
__device__ __forceinline__ void multiply(float (&d)[MT][BN / 2], Cursor& at, u64* full, u64* empty, u32 ring, u32 w_row) {
#pragma unroll 1
    for (int k = 0; k < K_TILES; k++) {
        barrier_wait(full + at.stage, at.odd);
        const u32 buffer = ring + at.stage * STAGE_BYTES;
        const u64 w = operand(buffer + w_row * ROW_BYTES), x = operand(buffer + W_BYTES);
        products_begin();
#pragma unroll
        for (int step = 0; step < K_STEPS; step++)
#pragma unroll
            for (int m = 0; m < MT; m++)
                product<COUNT>(d[m], w + (m * 64 * ROW_BYTES + step * 32 >> 4), x + (step * 32 >> 4));
        products_end_group();
        if (k > 0) {
            products_wait<1>();
            if (lane_id() == 0) barrier_arrive(empty + (at.stage == 0 ? STAGES - 1 : at.stage - 1));
        }
        at.next();
    }
    products_wait<0>();
    if (lane_id() == 0) barrier_arrive(empty + (at.stage == 0 ? STAGES - 1 : at.stage - 1));
}
#endif

// The same for a number of rows that is known when the kernel runs, UNIT at a time.
template <int UNITS>
__device__ __forceinline__ void multiply_some(int count, float (&d)[MT][BN / 2], Cursor& at, u64* full, u64* empty, u32 ring,
                                              u32 w_row) {
    if constexpr (UNITS > 0) {
        if (count == UNITS * UNIT)
            multiply<UNITS * UNIT>(d, at, full, empty, ring, w_row);
        else
            multiply_some<UNITS - 1>(count, d, at, full, empty, ring, w_row);
    }
}

// Sends the other block of the cluster this thread's sums of the rows of x that it finishes, and adds its sums of those that this
// block finishes, the MINEth half.
template <int MINE> __device__ __forceinline__ void exchange_sums(float (&d)[MT][BN / 2], float* sums, u64* arrived) {
    constexpr int HALF = BN / 4, FOURS = HALF / 4, STEP = MULTIPLIERS * GROUP_THREADS * 4;
    const u32 barrier = remote_address(arrived, 1 - MINE), to = remote_address(sums + threadIdx.x * 4, 1 - MINE);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < FOURS; i++) send_four(to + (m * FOURS + i) * STEP * 4, d[m] + (1 - MINE) * HALF + i * 4, barrier);
    barrier_wait_for_cluster(arrived, 0);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const auto four = *(const Pack<float, 4>*)(sums + (m * FOURS + i) * STEP + threadIdx.x * 4);
#pragma unroll
            for (int j = 0; j < 4; j++) d[m][MINE * HALF + i * 4 + j] += four.at[j];
        }
}

// Stores a warp's part of a product, 16 columns of 16 rows. A lane has rows 2t and 2t + 1, then 8 further, for columns g and g + 8
// each, with g = lane / 4 and t = lane % 4.
template <class P> __device__ __forceinline__ void put_sixteen(P* to, const float* of) {
    const int lane = (int)lane_id();
    if constexpr (sizeof(P) == 2) {
        const u32 four[4] = {pair<P>(of[0], of[1]), pair<P>(of[2], of[3]), pair<P>(of[4], of[5]), pair<P>(of[6], of[7])};
        store_matrices_transposed(shared_address(to + (lane / 16 * 8 + lane % 8) * OUT_ROW + lane / 8 % 2 * 8), four);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            to[(i / 4 * 8 + lane % 4 * 2 + i % 2) * OUT_ROW + i / 2 % 2 * 8 + lane / 4] = of[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) wgmma(PARAMS) {
    release_next();
    extern __shared__ __align__(1024) u8 shared[];
    const u32 ring = shared_address(shared);
    u64 *full = (u64*)(shared + BARRIERS_AT), *empty = full + STAGES;
    [[maybe_unused]] float* const sums = (float*)(shared + SUMS_AT);
    [[maybe_unused]] u64* const arrived = (u64*)(shared + SUMS_AT + SUMS_BYTES);
    Parts* parts = (Parts*)(shared + PARTS_AT);
    const int warp = (int)warp_id(), thread = (int)threadIdx.x % GROUP_THREADS;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_make(full + s, SPLIT ? 1 + COPIERS : GATHERED ? 1 + COPY_THREADS : 1);
            barrier_make(empty + s, MULTIPLIERS * 4);
        }
        if (SHARES > 1) {
            barrier_make(arrived, 1);
            barrier_expect(arrived, SUMS_BYTES);
        }
        barriers_made();
        prefetch(&w_map);
#if !GATHERED && !SPLIT
        prefetch(&x_map);
#endif
    }
#if GROUPED
    wait_for_previous();
    if (warp == MULTIPLIERS * 4) list_parts(parts, offsets, rows);
#else
    if (threadIdx.x == MULTIPLIERS * GROUP_THREADS)
        parts->starts[0] = parts->before[0] = 0, parts->starts[1] = rows, parts->before[1] = (rows + BN - 1) / BN;
#endif
    __syncthreads();
    // Those who write into the other block wait for its barriers to be there.
    cluster_arrive_relaxed<SHARES>();
    const int tiles = parts->before[GROUPS] * COLUMN_TILES;
    // This block's place among those with tiles of their own, how many there are, and the first step of K.
    const int block = (int)blockIdx.x / SHARES, blocks = (int)gridDim.x / SHARES;
    const int k0 = (int)cluster_rank<SHARES>() * K_TILES;
    int group = 0;
    Cursor at = {0, 0};
    P* const out = (P*)(shared + OUT_AT);

    // Finishes the rows of a tile from `row0` on that are in a buffer, the columns of four multiplying warps: `threads` threads.
    auto finish = [&](const P* from, const Tile& tile, int mine, int row0, int thread, int threads) {
        const int count = min(tile.end - tile.first - row0, PIECE) * ROW_VECTORS;
        const int column0 = (tile.column * BM + mine * WM) / HALVES;
        for (int begin = thread; begin < count; begin += threads * AT_ONCE) {
            // All loads before the stores, which might be to what is loaded; no branches in between.
            Operands<VECTOR> operands[AT_ONCE] = {};
            Pack<P, VECTOR> values[AT_ONCE][HALVES] = {};
            Y* to[AT_ONCE];
            bool valid[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int vector = begin + i * threads, inside = vector % ROW_VECTORS * VECTOR, column = column0 + inside;
                const i64 row = tile.first + row0 + vector / ROW_VECTORS;
                to[i] = y + row * Y_COLUMNS + column;
                valid[i] = vector < count && (N % BM == 0 || column < Y_COLUMNS);
                if (valid[i]) operands[i] = OPERANDS(VECTOR, row, column);
                const P* place = from + vector / ROW_VECTORS * OUT_ROW + (HALVES == 2 ? inside / 8 * 16 + inside % 8 : inside);
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    if (valid[i]) values[i][half] = *(const Pack<P, VECTOR>*)(place + half * 8);
            }
            Pack<Y, VECTOR> made[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                for (int c = 0; c < VECTOR; c++)
                    made[i].at[c] =
                        from_f32<Y>(finished(to_f32(values[i][0].at[c]), to_f32(values[i][HALVES - 1].at[c]), operands[i], c));
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (valid[i]) *(Pack<Y, VECTOR>*)to[i] = made[i];
        }
    };

    if (warp >= MULTIPLIERS * 4) {
#if MANY_REGISTERS
        registers_release<COPY_REGISTERS>();
#endif
        if (warp >= MULTIPLIERS * 4 + COPIERS) {
            wait_for_previous();
            const int finisher = (int)threadIdx.x - MULTIPLIERS * GROUP_THREADS - COPY_THREADS;
            if (finisher < FINISH_THREADS)
                for (int index = block; index + blocks < tiles; index += blocks) {
                    const Tile tile = find_tile(parts, index, group);
                    for (int mine = 0; mine < MULTIPLIERS; mine++) {
                        warps_sync(FILLED + mine, GROUP_THREADS + FINISH_THREADS);
                        finish(out + mine * OUT_PIECE, tile, mine, 0, finisher, FINISH_THREADS);
                        warps_arrive(DRAINED + mine, GROUP_THREADS + FINISH_THREADS);
                    }
                }
            return;
        }
        // Announces a buffer with so many bytes of x, and begins the copy of its weights.
        auto copy_weights = [&](int stage, const Tile& tile, int k, u32 x_bytes) {
            barrier_expect(full + stage, W_BYTES + x_bytes);
            copy_box<W_ONCE>(ring + stage * STAGE_BYTES, &w_map, (k0 + k) * BK, tile.column * BM, tile.group, full + stage);
        };
        const bool first = warp == MULTIPLIERS * 4 && elected();
        [[maybe_unused]] int early = 0;
#if !GROUPED
        // Weights may be read while the kernel before is still at work.
        if (first && block < tiles) {
            const Tile tile = find_tile(parts, block, group);
            const u32 x_bytes = SPLIT ? 0 : (tile.count + BOX - 1) / BOX * BOX * ROW_BYTES;
            for (; early < STAGES && early < K_TILES; early++) copy_weights(early, tile, early, x_bytes);
        }
        wait_for_previous();
#endif
#if SPLIT
#if !GATHERED
        const int* const pairs = nullptr;
#endif
        auto copy_later_weights = [&](int stage, const Tile& tile, int k) {
            if (early > 0)
                early--;
            else if (first)
                copy_weights(stage, tile, k, 0);
        };
        copy_rows_apart(x, pairs, parts, tiles, group, copy_later_weights, full, empty, ring);
#elif GATHERED
        // Eight threads copy a row; each thread copies the same chunk of rows that are ROUND apart.
        constexpr int ROUND = COPY_THREADS / 8, ROUNDS = (BN + ROUND - 1) / ROUND, LAG = STAGES > 3 ? 2 : 1;
        static_assert(ROUND % 4 == 0 && LAG <= STAGES - 2, "every other row's chunk is moved by four, if at all");
        const int chunk = thread % 8, row0 = thread / 8;
        const u32 copy_to = W_BYTES + row0 * ROW_BYTES + ((chunk ^ (row0 % 8)) << 4);
        // The buffer whose copies are waited for next, and how many have been begun but not waited for.
        Cursor done = {0, 0};
        int begun = 0;
        auto arrive = [&] {
            fence_for_copies();
            barrier_arrive(full + done.stage);
            done.next();
        };
        for (int index = block; index < tiles; index += blocks) {
            const Tile tile = find_tile(parts, index, group);
            if (tile.group == EXPERTS) break;
            auto has = [&](int i) { return i * ROUND < tile.count && (BN % ROUND == 0 || row0 + i * ROUND < BN); };
            // Where the thread's rows are in x, in sixteens of bytes; beyond the group's end, the last row again.
            u32 from[ROUNDS];
#pragma unroll
            for (int i = 0; i < ROUNDS; i++)
                if (has(i))
                    from[i] = (u32)(load_fresh(pairs + min(tile.first + row0 + i * ROUND, tile.end - 1)) / PER_TOKEN) * (K / 8);
#pragma unroll 1
            for (int k = 0; k < K_TILES; k++) {
                barrier_wait(empty + at.stage, at.odd ^ 1);
                const u32 buffer = ring + at.stage * STAGE_BYTES;
                if (first) copy_weights(at.stage, tile, k, 0);
                const u32 position = k * 8 + chunk;
                const bool valid = K % BK == 0 || position < K / 8;
#pragma unroll
                for (int i = 0; i < ROUNDS; i++)
                    if (has(i))
                        copy_async((buffer + copy_to ^ i * ROUND % 8 << 4) + i * ROUND * ROW_BYTES,
                                   (const u8*)x + ((u64)(from[i] + (valid ? position : 0)) << 4), valid);
                copies_end_group();
                at.next();
                if (begun == LAG) {
                    copies_wait<LAG>();
                    arrive();
                } else {
                    begun++;
                }
            }
        }
        copies_wait<0>();
        for (; begun > 0; begun--) arrive();
#else
        if (first) {
            for (int index = block; index < tiles; index += blocks) {
                const Tile tile = find_tile(parts, index, group);
#if GROUPED
                if (tile.group == EXPERTS) break;
#endif
                const int boxes = (tile.count + BOX - 1) / BOX;
#pragma unroll 1
                for (int k = 0; k < K_TILES; k++) {
                    const u32 buffer = ring + at.stage * STAGE_BYTES;
                    if (early > 0) {
                        early--;
                    } else {
                        barrier_wait(empty + at.stage, at.odd ^ 1);
                        copy_weights(at.stage, tile, k, boxes * BOX * ROW_BYTES);
                    }
                    for (int i = 0; i < boxes; i++)
                        copy_box<false>(buffer + W_BYTES + i * BOX * ROW_BYTES, &x_map, (k0 + k) * BK, tile.first + i * BOX, 0,
                                        full + at.stage);
                    at.next();
                }
            }
        }
#endif
    } else {
#if MANY_REGISTERS
        registers_take<PRODUCT_REGISTERS>();
#endif
        wait_for_previous();
        const int mine = warp / 4;
        int which = 0;
        float d[MT][BN / 2];
        for (int index = block; index < tiles; index += blocks) {
            const Tile tile = find_tile(parts, index, group);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < BN / 2; i++) d[m][i] = 0.0f;
#if GROUPED
            if (tile.group < EXPERTS)
#endif
                multiply_some<BN / UNIT>(tile.count, d, at, full, empty, ring, mine * WM);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < BN / 2; i++) pin(d[m][i]);

            if constexpr (SHARES > 1) {
                cluster_wait<SHARES>();
                if (k0 == 0)
                    exchange_sums<0>(d, sums, arrived);
                else
                    exchange_sums<1>(d, sums, arrived);
            }
            const bool last = FINISHERS == 0 || index + blocks >= tiles;
#pragma unroll
            for (int piece = 0; piece < BN / PIECE; piece++) {
                if (piece * PIECE >= tile.end - tile.first) break;
                if (SHARES > 1 && piece / (BN / PIECE / SHARES) * K_TILES != k0) continue;
                P* const to = out + mine * OUT_BUFFERS * OUT_PIECE + (FINISHERS ? 0 : which * OUT_PIECE);
                which ^= 1;
                if (FINISHERS && index >= blocks) warps_sync(DRAINED + mine, GROUP_THREADS + FINISH_THREADS);
#pragma unroll
                for (int j = 0; j < PIECE / 8; j += 2)
                    if (piece * PIECE + j * 8 < tile.end - tile.first)
#pragma unroll
                        for (int m = 0; m < MT; m++)
                            put_sixteen(to + j * 8 * OUT_ROW + m * 64 + warp % 4 * 16, d[m] + (piece * (PIECE / 8) + j) * 4);
                if (last) {
                    warps_sync(OWN + mine, GROUP_THREADS);
                    finish(to, tile, mine, piece * PIECE, thread, GROUP_THREADS);
                } else {
                    warps_arrive(FILLED + mine, GROUP_THREADS + FINISH_THREADS);
                }
            }
        }
    }
}
