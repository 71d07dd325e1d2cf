// Packs the rows of a weight of bf16 losslessly to 12 bits a number: the form of src/plan/packed.rs, byte for byte as
// src/runtime/weights/pack.rs makes it. A warp takes a row: it counts the exponents, chooses the 15 binades that hold most, and
// writes eight columns a lane, 256 a time. The second pass over a row finds it in the caches.
//
// Generated: SPAN_COLUMNS, SPAN_BYTES, HEADER_WORDS, MAX_EXCEPTIONS, CODES, the exponents that have one, and BASES that there are.

constexpr u32 EXPONENTS = 256, EIGHT = 8;

// The bits of one of eight columns.
__device__ __forceinline__ u32 element(const Quad& quad, u32 e) { return quad.at[e / 2] >> e % 2 * 16 & 0xffff; }

__device__ __forceinline__ u32 exponent(u32 bits) { return bits >> 7 & 0xff; }

// The smallest base that leaves the fewest exceptions, in each lane. A lane looks at bases beside each other.
__device__ __forceinline__ u32 best_base(const u32* counts) {
    constexpr u32 MINE = BASES / WARP;
    static_assert(MINE * WARP == BASES);
    u32 base = lane_id() * MINE, held = 0;
    for (u32 code = 1; code <= CODES; code++) held += counts[base + code];
    // A row has at most 2^16 columns.
    u32 best = 0;
    for (u32 i = 0; i < MINE; i++) {
        best = max(best, held << 8 | (EXPONENTS - 1 - (base + i)));
        held += counts[base + i + 1 + CODES] - counts[base + i + 1];
    }
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, step));
    return EXPONENTS - 1 - (best & 0xff);
}

// Nothing is released early: what comes next in the stream may read what this writes.
extern "C" __global__ void __launch_bounds__(THREADS) pack(PARAMS) {
    constexpr u32 WARPS = THREADS / WARP;
    __shared__ u32 all_counts[WARPS][EXPONENTS];
    wait_for_previous();
    u32* counts = all_counts[warp_id()];
    u32 lane = lane_id(), octets = (u32)columns / EIGHT;
    i64 row_words = columns / SPAN_COLUMNS * (SPAN_BYTES / 4) + HEADER_WORDS;
    for (i64 row = (i64)blockIdx.x * WARPS + warp_id(); row < rows; row += (i64)gridDim.x * WARPS) {
        const Quad* numbers = (const Quad*)(from + row * columns);
        u8* spans = (u8*)(to + row * row_words);
        u32* header = (u32*)(to + (row + 1) * row_words) - HEADER_WORDS;

        for (u32 i = lane; i < EXPONENTS; i += WARP) counts[i] = 0;
        __syncwarp();
        for (u32 octet = lane; octet < octets; octet += WARP) {
            Quad quad = numbers[octet];
#pragma unroll
            for (u32 e = 0; e < EIGHT; e++) atomicAdd(&counts[exponent(element(quad, e))], 1u);
        }
        __syncwarp();
        u32 base = best_base(counts);
        // The next row starts with zeros once all lanes have read.
        __syncwarp();

        u32 exceptions = 0;
        // Octets are a multiple of half a warp.
        for (u32 begin = 0; begin < octets; begin += WARP) {
            u32 octet = begin + lane, mine = 0, outside = 0;
            Quad quad = {};
            if (octet < octets) quad = numbers[octet];
            // Signs, codes and mantissas, two numbers a word.
            u32 pairs[4] = {};
#pragma unroll
            for (u32 e = 0; e < EIGHT; e++) {
                u32 bits = element(quad, e), code = exponent(bits) - base;
                bool coded = code - 1 < CODES;
                if (coded || (bits & 0x7fff) == 0) {
                    pairs[e / 2] |= ((bits & 0x807f) | (coded ? code : 0) << 7) << e % 2 * 16;
                } else {
                    outside |= 1u << e;
                    mine++;
                }
            }
            if (octet < octets) {
                u32* to = (u32*)(spans + octet / 16 * SPAN_BYTES) + octet % 4 * 4 + octet / 4 % 4;
                to[0] = pairs[0] | (pairs[3] & 0x07800780) << 4;
                to[16] = pairs[1] | (pairs[3] & 0x00780078) << 8;
                u32 rest = pairs[3] & 0x80078007;
                to[32] = pairs[2] | rest >> 4 | rest << 28;
            }
            if (__ballot_sync(ALL_LANES, mine > 0) == 0) continue;
            // The columns ascend with the lane.
            u32 before = mine;
#pragma unroll
            for (u32 step = 1; step < WARP; step *= 2) {
                u32 lower = __shfl_up_sync(ALL_LANES, before, step);
                if (lane >= step) before += lower;
            }
            u32 total = __shfl_sync(ALL_LANES, before, WARP - 1);
            u32 place = exceptions + before - mine;
#pragma unroll
            for (u32 e = 0; e < EIGHT; e++) {
                if (outside >> e & 1) {
                    if (place < MAX_EXCEPTIONS) header[1 + place] = octet * EIGHT + e | element(quad, e) << 16;
                    place++;
                }
            }
            exceptions += total;
        }
        // The bits of 2^(base - 96), and zeros behind the exceptions.
        if (lane == 0) header[0] = (base + 127 - 96) << 23;
        else if (lane < HEADER_WORDS && lane > exceptions) header[lane] = 0;
        if (lane == 0 && exceptions > MAX_EXCEPTIONS) atomicAdd(failed, 1);
    }
}
