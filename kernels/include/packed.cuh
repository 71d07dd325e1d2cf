// Rows of bf16 as plan/packed.rs packs them, for ring.cu.
//
// A span of 128 columns of a row has 192 bytes, in three thirds: word 4t + i of each third is of the eight columns 8t.. of part i of 32
// columns. What three words have are the weights but for their exponents, which lack the row's base. That is a factor of the row, in
// its header. Numbers whose exponents lie elsewhere are in the header, too, and zeros here.
//
// Weights lie near the smallest number that is not subnormal, so rows of x are staged times 2^96; the header takes that back. Numbers
// of x from 2^32 on are infinite by that.
//
// Generated: SPAN, the columns of a span, SPAN_BYTES, and HEADER_WORDS: of a row's header, the factor, then numbers by themselves, each
// with its column in the lower half, until one is zero.
#pragma once

#include "eight.cuh"

constexpr int THIRD = SPAN_BYTES / 3;
static_assert(SAME<W, bf16> && SPAN == 128 && THIRD == 64 && K % SPAN == 0);

// Rows of x as `Plain` stages them, times 2^96.
template <class Plain> struct Scaled : Plain {
    static __device__ __forceinline__ void put(S* to, int r, int k, const float (&values)[8]) {
        float large[8];
#pragma unroll
        for (int i = 0; i < 8; i++) large[i] = values[i] * 0x1p96f;
        Plain::put(to, r, k, large);
    }
    // What was put there as it is.
    static __device__ __forceinline__ void adjust(S* at) {
        Eight<S> eight = *(const Eight<S>*)at;
        float large[8];
#pragma unroll
        for (int i = 0; i < 8; i++) large[i] = eight.at(i) * 0x1p96f;
        eight.set(large);
        *(Eight<S>*)at = eight;
    }
};

// Four pairs of numbers that three words have: bf16 but for the rows' bases.
__device__ __forceinline__ void unfold(u32 (&pairs)[4], u32 first, u32 second, u32 third) {
    pairs[0] = first & 0x87ff87ffu;
    pairs[1] = second & 0x87ff87ffu;
    pairs[2] = third & 0x87ff87ffu;
    pairs[3] = ((first >> 4) & 0x07800780u) | ((second >> 8) & 0x00780078u) | (__funnelshift_l(third, third, 4) & 0x80078007u);
}

// Leaves the headers of a tile's rows, which follow the last columns of a slot of `live` ones: one warp.
__device__ __forceinline__ void keep_headers(u32* headers, const u8* slot, int live) {
    const int row = lane_id() / 4, quad = lane_id() % 4;
    const Quad* from = (const Quad*)(slot + row * LINE + live / SPAN * SPAN_BYTES);
    ((Quad*)(headers + row * HEADER_WORDS))[quad] = from[quad];
}

// What a sum over the codes of a row of the weight and row r of x, as staged, is with the row's header.
template <class Layout> __device__ __forceinline__ float whole(float sum, const u32* header, S* x, int r) {
    float rest = 0;
#pragma unroll 1
    for (int i = 1; i < HEADER_WORDS && header[i] >> 16 != 0; i++)
        rest += __uint_as_float(header[i] & 0xffff0000u) * to_f32(*Layout::one(x, r, header[i] & 0xffff));
    return sum * __uint_as_float(header[0]) + rest * 0x1p-96f;
}
