// y = epilogue(x w^T) for few rows x: weights pass through a ring of slots in shared memory, which bulk copies fill. Rows and weights
// of one 16-bit type are multiplied on tensor cores (ring_mma.cuh), packed weights too (ring_packed.cuh), any others in f32
// (ring_fma.cuh).
//
// Work is divided into items: a tile of eight rows of a weight [N, K] for a group of at most COLUMNS rows of x, which lie in
// shared memory. Where the result has HALVES, a tile is four rows of the first and the four that belong to them of the second.
// Where an element of the result takes one row of each of several BANDS of the weight, which lie one after the other, an item is
// the same tile of all of them. A block has a run of items, and an item is UNITS units: for each of SUBS matrices, or of BANDS,
// CHUNKS parts of CHUNK columns. Unit u of the run is copied into slot u % SLOTS, RUN adjacent rows at once; each row is a line
// of LINE bytes there.
//
// A row of a packed weight ends with a header, which comes with its last columns; a warp keeps it for the end of the item, because
// the slot is filled again by then.
//
// A warp multiplies its STEPS steps, of SPAN columns, of every unit. After the last chunk of a matrix each warp leaves its sums; one
// barrier for each item later, one thread for each element of y adds them up, by warp, then over SUBS, and finishes it while the
// others go on. With a CONVOLUTION (convolution.cuh) it has read the earlier columns of its channel, and has summed them, by then:
// those of a block's first item before the wait, if they are there.
//
// The last warp only copies: when the others are done with a slot, it starts the copies of the unit that is next there, and
// nobody waits for it. The first units of a block are on their way before the kernels before this one are done, unless a routing
// chooses them.
//
// With HELD a block takes its first unit out of its slot into registers, unpacked where it is packed, before the kernel before this
// one is done, and the unit that is next in that slot follows it. So one unit more is there when the wait is over, and it costs no
// reads from slots then.
//
// With CLAIMS a block has but its first OWN items for sure and claims the others one by one from a counter, one ahead of what it
// copies: blocks are spread unevenly, as they start where there is room beside the kernel before, and the memory serves some
// multiprocessors faster. Claims go round: after one from each block that finds nothing left, the counter is zero again.
//
// Races: a slot is written when all warps have met, after adding up what they read from it, or have arrived at its barrier `empty`, after a
// fence between their reads and the copies to come, and read after a phase of its barrier `full`. What is claimed is told a barrier before it is asked for, because the unit copied next is at least
// two ahead. Sums lie in two buffers in turn: who writes to one has passed the barrier that followed the reading of it. Rows of x
// are staged between barriers. A routing or a convolution's state is read before the wait only if it is sure to be there. Each
// element of y belongs to one item, and with it a channel of a sequence's state, which nobody else reads or writes. The order of
// sums depends on constants only: not on other rows, nor on their number.
//
// Generated: FMA, whether in f32, PACKED, and WEIGHT, the weight as it is read; HELD; W, S, N, K, COLUMNS, WIDTH, SLOTS, CHUNK,
// CHUNKS, SPAN, SPAN_BYTES and HEADER_WORDS, none where weights are not packed, LINE, RUN, ONCE, PART, PITCH, SPLIT, DEPTH,
// ROW_WARPS, ROUTED, SUBS, BANDS, STAGED_SUBS, SHARING, WEIGHTED, HALVES, BLOCK, GROUP_ROOM, RESIDENT, RESTAGES, whether items have
// different rows, CLAIMS, CLAIMED (claims that a block remembers), OWN, for weighted sums the type P of the products, and
// CONVOLUTION if the product is the columns of one.

#include "bulk.cuh"
#include "convolution.cuh"
#include "list.cuh"

constexpr int TILE = 8, TILES = N / (TILE * BANDS), OUT = TILE / HALVES;
// Products of an item, and units.
constexpr int PRODUCTS = SUBS * BANDS, UNITS = PRODUCTS * CHUNKS;
static_assert(BANDS == 1 || (SUBS == 1 && HALVES == 1 && !ROUTED));
// One warp fills slots, the others multiply.
constexpr int MULTIPLIERS = WARPS - 1;
constexpr int STEPS = (CHUNK + MULTIPLIERS * SPAN - 1) / (MULTIPLIERS * SPAN);
// Whether every step of every warp is inside its unit.
constexpr bool EXACT = K % CHUNK == 0 && CHUNK == STEPS * MULTIPLIERS * SPAN;
static_assert(COLUMNS * OUT <= THREADS && (!CLAIMS || (SLOTS >= 2 && SLOTS + HELD <= OWN * UNITS && SLOTS + 1 < CLAIMED)));
// Sums of an item, and bytes of a slot.
constexpr int SUMS = PRODUCTS * MULTIPLIERS * WIDTH * TILE, SLOT = TILE * LINE;

// `Multiply` has a warp's sums: `clear`, `multiply` for each unit of a matrix, from its slot or from a `Unit` that was taken from
// there, `store`.
#if FMA
#include "ring_fma.cuh"
#elif PACKED
#include "ring_packed.cuh"
#else
#include "ring_mma.cuh"
#endif

// Bytes of so many columns of a row of the weight, and of a whole row.
__device__ __forceinline__ int bytes_of(int columns) { return PACKED ? columns / 2 * 3 : columns * (int)sizeof(W); }
constexpr int HEADER = HEADER_WORDS * 4;
constexpr i64 ROW = (PACKED ? K / SPAN * SPAN_BYTES : K * (i64)sizeof(W)) + HEADER;
// Words of the headers of an item.
constexpr int HEADERS = PRODUCTS * TILE * HEADER_WORDS;

// The row of the weight that is row r of a tile of a band.
__device__ __forceinline__ int row_of(int tile, int band, int r) {
    if (HALVES == 1) return band * (N / BANDS) + tile * TILE + r;
    int column = tile * OUT + r % OUT;
    return column / BLOCK * (2 * BLOCK) + column % BLOCK + r / OUT * BLOCK;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) ring(PARAMS) {
    if (!ROUTED) release_next();
    extern __shared__ Quad dynamic_shared[];
    u8* const slots = (u8*)dynamic_shared;
    Group* const groups = (Group*)(slots + SLOTS * SLOT);
    float* const partial = (float*)(groups + GROUP_ROOM);
    u32* const headers = (u32*)(partial + 2 * SUMS);
    u64* const full = (u64*)(headers + 2 * HEADERS);
    u64* const empty = full + SLOTS;
    int* const claimed = (int*)(empty + SLOTS);
    constexpr int BEFORE = SLOTS * SLOT + GROUP_ROOM * 16 + (SUMS + HEADERS) * 8 + SLOTS * 16 + CLAIMED * 4;
    S* const staged = (S*)(dynamic_shared + (BEFORE + 15) / 16);

    auto row = [&](int r) -> i64 { return X_ROW(r); };
    auto stage = [&](S* to, int first, int count, int k0, bool writes) { STAGE; };
#ifdef CONVOLUTION
    // There is one group, so a thread's row is the same in each item.
    auto gated = CONVOLUTION;
    const bool convolves = (int)threadIdx.x < rows * OUT;
    auto finish = [&](float v0, float v1, float v2, i64 row, int column) {
        y[row * Y_COLUMNS + column] = from_f32<Y>(gated.finish(v0, v1, v2, (int)row, column));
    };
#else
    auto finish = [&](float v0, float v1, float, i64 row, int column) {
        y[row * Y_COLUMNS + column] = from_f32<Y>(EPILOGUE(v0, v1, row, column));
    };
#endif

    const bool filler = warp_id() == MULTIPLIERS;
    int first = 0, own = 0, items = 0;
    // Of the lane that claims: the item whose units are being copied, and what it has claimed beyond that.
    int current = 0;
    u32 next = 0;
    // Starts the copies of a unit of the run, if there is one: a warp, one lane of it.
    auto fill = [&](int unit) {
        if ((!CLAIMS && unit >= own * UNITS) || !elected()) return;
        int item = first + unit / UNITS, part = unit % UNITS, column = part % CHUNKS * CHUNK, expert = 0;
        const int band = BANDS > 1 ? part / CHUNKS : 0;
        if (CLAIMS && unit >= own * UNITS) {
            if (part == 0) {
                current = own * (int)gridDim.x + (int)next;
                if (current >= items) current = -1;
                else next = claim(claims, items - (own - 1) * gridDim.x - 1);
                claimed[unit / UNITS % CLAIMED] = current;
            }
            item = current;
            if (item < 0) return;
        }
        if (ROUTED) expert = groups[item / TILES * SUBS + part / CHUNKS].expert;
        u64* barrier = full + unit % SLOTS;
        const int end = min(column + CHUNK, K);
        u32 bytes = expert < 0 ? 0 : bytes_of(end - column) + (end == K ? HEADER : 0);
        barrier_expect(barrier, TILE * bytes);
        if (expert < 0) return;
        u8* to = slots + unit % SLOTS * SLOT;
        const u8* from = (const u8*)WEIGHT + (i64)expert * N * ROW + bytes_of(column);
#pragma unroll
        for (int r = 0; r < TILE; r += RUN)
            copy_bulk<ONCE>(to + r * LINE, from + row_of(item % TILES, band, r) * ROW, RUN * bytes, barrier);
    };
    auto start = [&](int count) {
        items = count * TILES;
        int each = CLAIMS ? OWN : items / (int)gridDim.x, longer = CLAIMS ? 0 : items % (int)gridDim.x, block = blockIdx.x;
        first = each * block + min(block, longer);
        own = each + (block < longer ? 1 : 0);
        for (int unit = warp_id(); unit < SLOTS; unit += WARPS) fill(unit);
    };

    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; slot++) {
            barrier_make(full + slot, 1);
            barrier_make(empty + slot, MULTIPLIERS * WARP);
        }
        barriers_made();
    }
    __syncthreads();
    if (!ROUTED) start(LIST);
    CONSTANTS;
#ifdef CONVOLUTION
    if (!early) wait_for_previous();
    find_places(pos, slot, 0, rows);
#endif
    if (!ROUTED) __syncthreads();
    if (ROUTED) {
        if (!early) wait_for_previous();
        start(LIST);
    }
#ifdef CONVOLUTION
    if (convolves) gated.begin(threadIdx.x / OUT, first * OUT + threadIdx.x % OUT);
#endif
    // Leaves the headers of rows whose last columns a slot has, for sums of this number.
    auto keep = [&](int number, const u8* slot, int columns) {
#if PACKED
        if (warp_id() == 0) keep_headers(headers + number * (TILE * HEADER_WORDS), slot, columns);
#endif
    };

    Multiply product;
#if HELD
    typename Multiply::Unit held;
    if (own > 0 && !filler) {
        constexpr int COLUMNS_HELD = CHUNK < K ? CHUNK : K;
        barrier_wait(full, 0);
        held.take(slots, COLUMNS_HELD);
        if (CHUNKS == 1) keep(0, slots, COLUMNS_HELD);
        if (UNITS > 1) barrier_arrive_after_reads(empty);
    } else if (own > 0 && UNITS > 1) {
        barrier_wait(empty, 0);
        fill(SLOTS);
    }
#endif
    wait_for_previous();
    if (ROUTED) release_next();
    if (CLAIMS && filler && elected()) next = claim(claims, items - (own - 1) * gridDim.x - 1);

    int staged_key = 0, unit = 0, at = 0, odd = 0, buffer = 0;
    auto bring = [&](int item) {
        const Group* const entry = groups + item / TILES * SUBS;
        staged_key = item / TILES / SHARING;
        stage(staged, entry->first, entry->count * STAGED_SUBS, 0, item % TILES == 0);
        __syncthreads();
    };
    if (own > 0) bring(first);
#if HELD
    product.clear();
    if (own > 0 && !filler) {
        const Group* const entry = groups + first / TILES * SUBS;
        if (!ROUTED || entry->expert >= 0) product.multiply(held, staged, entry->count);
    }
    unit = 1;
    at = 1 % SLOTS;
    odd = 1 / SLOTS;
#endif
    for (int nth = 0; CLAIMS || nth < own; nth++, buffer ^= 1) {
        const int item = nth < own ? first + nth : claimed[nth % CLAIMED];
        if (CLAIMS && item < 0) break;
        const int group = item / TILES, tile = item % TILES;
        if (RESTAGES && group / SHARING != staged_key) {
            // Every warp is done with the rows staged before.
            __syncthreads();
            bring(item);
        }
        const Group* const entry = groups + group * SUBS;
        const int count = entry->count, outs = count * OUT;
        // Loads what the epilogue will need.
        float touched = 0;
        const i64 y_row = (WEIGHTED ? group : entry->first) + threadIdx.x / OUT;
        const int column = threadIdx.x / OUT, out = threadIdx.x % OUT;
#ifdef CONVOLUTION
        if (convolves && nth > 0) gated.begin(column, tile * OUT + out);
        if (convolves) gated.ask(tile * OUT + out);
#else
        if ((int)threadIdx.x < outs) touched = EPILOGUE(0.0f, 0.0f, y_row, tile * OUT + out);
#endif

        float* const sums = partial + buffer * SUMS;
        for (int sub = 0; sub < PRODUCTS; sub++) {
            const S* x = staged + sub % STAGED_SUBS * PITCH;
            const bool live = !ROUTED || entry[sub].expert >= 0;
            const bool begun = HELD && nth == 0 && sub == 0;
            if (!begun) product.clear();
#pragma unroll 1
            for (int from = begun ? CHUNK : 0; from < K; from += CHUNK) {
                const int columns = min(CHUNK, K - from);
                if (!filler) {
                    barrier_wait(full + at, odd);
                    const u8* slot = slots + at * SLOT;
                    if (live) product.multiply(slot, x + from, count, columns);
                    if (from + CHUNK >= K) keep(buffer * PRODUCTS + sub, slot, columns);
                    if (UNITS > 1) barrier_arrive_after_reads(empty + at);
                } else if (UNITS > 1) {
                    barrier_wait(empty + at, odd);
                    fill(unit + SLOTS);
                }
                unit++;
                if (++at == SLOTS) {
                    at = 0;
                    odd ^= 1;
                }
            }
            if (!filler) product.store(sums + (sub * MULTIPLIERS + warp_id()) * (WIDTH * TILE), count);
        }
        asm volatile("" ::"f"(touched));
        __syncthreads();
        if (UNITS == 1 && filler) fill(unit - 1 + SLOTS);

        auto total = [&](int sub, int column, int row) {
            float sum = 0;
#pragma unroll
            for (int g = 0; g < MULTIPLIERS; g++) sum += sums[((sub * MULTIPLIERS + g) * WIDTH + column) * TILE + row];
#if PACKED
            const u32* header = headers + ((buffer * PRODUCTS + sub) * TILE + row) * HEADER_WORDS;
            sum = whole<Multiply>(sum, header, staged + sub % STAGED_SUBS * PITCH, column);
#endif
            return sum;
        };
        if ((int)threadIdx.x < outs) {
            float v0 = 0, v1 = 0, v2 = 0;
            if (WEIGHTED) {
                for (int sub = 0; sub < SUBS; sub++) {
                    if (entry[sub].expert < 0) continue;
                    v0 = __fadd_rn(v0, __fmul_rn(entry[sub].weight, rounded<P>(total(sub, 0, out))));
                }
            } else if (!ROUTED || entry->expert >= 0) {
                v0 = total(0, column, out);
                if (HALVES == 2) v1 = total(0, column, out + OUT);
                if (BANDS == 3) v1 = total(1, column, out), v2 = total(2, column, out);
            }
            finish(v0, v1, v2, y_row, tile * OUT + out);
        }
    }
    if (!ROUTED) return;
    // Rows of no group.
    i64 step = (i64)gridDim.x * THREADS, end = (i64)rows * Y_COLUMNS;
    for (i64 i = (i64)ROWS_USED * Y_COLUMNS + blockIdx.x * THREADS + threadIdx.x; i < end; i += step)
        finish(0.0f, 0.0f, 0.0f, i / Y_COLUMNS, (int)(i % Y_COLUMNS));
}
