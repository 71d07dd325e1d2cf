// Numbers of f32 as sums of three of bf16, for products by units that multiply bf16.
//
// A term is what the terms before it leave, cut off after eight significant bits: cut and not rounded, so that the largest numbers
// do not become infinite. Together the three are the number itself, all 24 bits, but for what is below 2^-133, as numbers under
// 2^-110 have it. What is infinite or not a number is its own first term, and the others are zero: infinity - infinity is not.
// A weight that is infinite makes NaN of them.
//
// With what wgmma.cu, whose constants it takes, does with them: rows on their way into shared memory, and products.
#pragma once

static_assert(TERMS == 3 && SAME<X, float>, "three terms of eight bits are a number of f32");

// The first of a number's terms, if it is finite.
__device__ __forceinline__ float cut(float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000); }

// The upper halves of two words.
__device__ __forceinline__ u32 upper_halves(float lower, float upper) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(y) : "r"(__float_as_uint(lower)), "r"(__float_as_uint(upper)));
    return y;
}

// Two numbers rounded towards zero: as `cut` does, and what is not a number stays so.
__device__ __forceinline__ u32 first_terms(float lower, float upper) {
    u32 y;
    asm("cvt.rz.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(upper), "f"(lower));
    return y;
}

// Puts the terms of four adjacent numbers, eight bytes each, at places that are so far apart.
__device__ __forceinline__ void put_terms(u32 to, u32 apart, const Quad& four) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __uint_as_float(four.at[i]);
#pragma unroll
    for (int term = 0; term < TERMS; term++) {
        const u32 lower = term == 0 ? first_terms(x[0], x[1]) : upper_halves(x[0], x[1]);
        const u32 upper = term == 0 ? first_terms(x[2], x[3]) : upper_halves(x[2], x[3]);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + term * apart), "r"(lower), "r"(upper) : "memory");
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = term > 0 || fabsf(x[i]) < INFINITE ? x[i] - cut(x[i]) : 0.0f;
    }
}

// Adds to sums the product of a tile with its first COUNT rows of x. Each part of w meets several terms: if HELD, it comes into
// registers once, which leaves shared memory to the rows.
template <int COUNT>
__device__ __forceinline__ void multiply(float (&sums)[MT][BN / 2], Cursor& at, u64* full, u64* empty, u32 ring, u32 w_row) {
#pragma unroll 1
    for (int k = 0; k < K_TILES; k++) {
        barrier_wait(full + at.stage, at.odd);
        const u32 buffer = ring + at.stage * STAGE_BYTES;
        const u64 x = operand(buffer + W_BYTES);
#if HELD
        // A lane has the pairs that `mma` says (mma.cuh), of sixteen rows for each warp.
        const u32 lane = lane_id(), row = buffer + (w_row + warp_id() % 4 * 16 + lane % 16) * ROW_BYTES;
        u32 held[MT][K_STEPS][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int step = 0; step < K_STEPS; step++)
                load_matrices(held[m][step], row + m * 64 * ROW_BYTES + ((step * 2 + lane / 16 ^ lane % 8) << 4));
        auto part = [&](int m, int step) -> const u32(&)[4] { return held[m][step]; };
#else
        const u64 w = operand(buffer + w_row * ROW_BYTES);
        auto part = [&](int m, int step) { return w + (m * 64 * ROW_BYTES + step * 32 >> 4); };
#endif
        float d[MT][BN / 2];
        products_begin();
#pragma unroll
        for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
            for (int step = 0; step < K_STEPS; step++)
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const u64 x_at = x + (term * X_BYTES + step * 32 >> 4);
                    if (term == TERMS - 1 && step == 0)
                        first_product<COUNT>(d[m], part(m, step), x_at);
                    else
                        product<COUNT>(d[m], part(m, step), x_at);
                }
        products_end_group();
        products_wait<0>();
        if (lane_id() == 0) barrier_arrive(empty + at.stage);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < COUNT / 2; i++) {
                pin(d[m][i]);
                sums[m][i] += d[m][i];
            }
        at.next();
    }
}

// What the COPIERS warps do: for each step of K of a block's tiles what `copy_weights` does, and the rows, taken apart.
//
// Sixteen threads read a row, four elements each; each thread reads the same four of rows that are ROUND apart. A batch of rows is
// on its way while the others are taken apart.
template <class CopyWeights>
__device__ __forceinline__ void copy_rows_apart(const X* x, const int* pairs, const Parts* parts, int tiles, int group,
                                                const CopyWeights& copy_weights, u64* full, u64* empty, u32 ring) {
    constexpr int ROUND = COPY_THREADS / 16, ROUNDS = BN / ROUND, BATCH = ROUNDS < 4 ? ROUNDS : 4, QUADS = K / 4;
    static_assert(ROUND % 8 == 0, "a thread's rows have one place in the permutation");
    const int thread = (int)threadIdx.x % GROUP_THREADS, chunk = thread % 16, row0 = thread / 16;
    const u32 put_to = W_BYTES + row0 * ROW_BYTES + ((chunk / 2 ^ row0 % 8) << 4) + chunk % 2 * 8;
    Cursor at = {0, 0};
    for (int index = (int)blockIdx.x; index < tiles; index += (int)gridDim.x) {
        const Tile tile = find_tile(parts, index, group);
#if GROUPED
        if (tile.group == EXPERTS) break;
#endif
        // Where the thread's rows are in x, in sixteens of bytes; beyond the group's end, the last row again.
        u32 from[ROUNDS];
        Quad ahead[ROUNDS];
        auto fetch = [&](int begin, int k) {
            const int position = k * (BK / 4) + chunk;
#pragma unroll
            for (int i = begin; i < begin + BATCH; i++) {
                ahead[i] = {};
                if (K % BK == 0 || position < QUADS) ahead[i] = load_fresh((const u8*)x + ((u64)(from[i] + position) << 4));
            }
        };
#pragma unroll
        for (int begin = 0; begin < ROUNDS; begin += BATCH) {
            if (begin * ROUND >= tile.count) break;
#pragma unroll
            for (int i = begin; i < begin + BATCH; i++) {
                int row = min(tile.first + row0 + i * ROUND, tile.end - 1);
#if GATHERED
                row = load_fresh(pairs + row) / PER_TOKEN;
#endif
                from[i] = (u32)row * QUADS;
            }
            fetch(begin, 0);
        }
#pragma unroll 1
        for (int k = 0; k < K_TILES; k++) {
            barrier_wait(empty + at.stage, at.odd ^ 1);
            copy_weights(at.stage, tile, k);
            const u32 to = ring + at.stage * STAGE_BYTES + put_to;
#pragma unroll
            for (int begin = 0; begin < ROUNDS; begin += BATCH) {
                if (begin * ROUND >= tile.count) break;
#pragma unroll
                for (int i = begin; i < begin + BATCH; i++) put_terms(to + i * ROUND * ROW_BYTES, X_BYTES, ahead[i]);
                if (k + 1 < K_TILES) fetch(begin, k + 1);
            }
            // The unit that multiplies sees what was written before its barrier's phase ends.
            fence_for_copies();
            __syncwarp();
            if (lane_id() == 0) barrier_arrive(full + at.stage);
            at.next();
        }
    }
}
