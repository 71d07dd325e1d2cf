// How warps of ring.cu multiply rows of bf16 and weights of bf16 that are packed (plan/packed.rs): on tensor cores.
//
// A span of 128 columns of a row of the weight has 192 bytes. Lane (g, t) reads sixteen bytes of each third of row g, which are columns
// 8t.. of four parts of 32 columns: the weights as they are but for their exponents, which lack the row's base. That is a factor of
// the row, in its header. Numbers whose exponents lie elsewhere are in the header, too, and zeros here.
//
// Weights lie near the smallest number that is not subnormal, so rows of x are staged times 2^96; the header takes that back. Numbers
// of x from 2^32 on are infinite by that.
#pragma once

#include "ring_sums.cuh"

static_assert(SAME<S, bf16> && SAME<W, bf16> && SPAN == 128 && K % SPAN == 0);

// Words of a row's header: the factor, then numbers by themselves, each with its column in the lower half, until one is zero.
constexpr int HEADER_WORDS = 16;

struct Multiply : MmaSums<4> {
    static __device__ __forceinline__ float scaled(float x) { return x * 0x1p96f; }

    static __device__ __forceinline__ void put(S* to, int r, int k, const float (&values)[8]) {
        float large[8];
#pragma unroll
        for (int i = 0; i < 8; i++) large[i] = scaled(values[i]);
        MmaSums<4>::put(to, r, k, large);
    }
    // What was put there as it is.
    static __device__ __forceinline__ void adjust(S* at) {
        Eight<S> eight = *(const Eight<S>*)at;
        float large[8];
#pragma unroll
        for (int i = 0; i < 8; i++) large[i] = scaled(eight.at(i));
        eight.set(large);
        *(Eight<S>*)at = eight;
    }

    // Four pairs of numbers that three words have: bf16 but for the rows' bases.
    static __device__ __forceinline__ void unfold(u32 (&pairs)[4], u32 first, u32 second, u32 third) {
        pairs[0] = first & 0x87ff87ffu;
        pairs[1] = second & 0x87ff87ffu;
        pairs[2] = third & 0x87ff87ffu;
        pairs[3] = ((first >> 4) & 0x07800780u) | ((second >> 8) & 0x00780078u) |
            (__funnelshift_l(third, third, 4) & 0x80078007u);
    }

    // Adds the products of the slot's columns, of which there are `live`, with `count` rows of x. Rows of x beyond them are any
    // other row: no row's sums depend on another row.
    __device__ __forceinline__ void multiply(const u8* slot, const S* x, int count, int live) {
        const int begin = warp_id() * (STEPS * SPAN), row = lane_row();
        const u8* from = slot + row * LINE + begin / 2 * 3 + lane_id() % 4 * 16;
        const S* lower = x + (row < count ? row : 0) * PITCH + begin + lane_k();
        const S* upper = x + (row + 8 < count ? row + 8 : 0) * PITCH + begin + lane_k();
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (!EXACT && begin + i * SPAN >= live) break;
            const Quad* line = (const Quad*)(from + i * (SPAN / 2 * 3));
            const Quad first = line[0], second = line[4], third = line[8];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                Quad a = *(const Quad*)(lower + i * SPAN + p * 32), below = {};
                if (COLUMNS > 8) below = *(const Quad*)(upper + i * SPAN + p * 32);
                u32 b[4];
                unfold(b, first.at[p], second.at[p], third.at[p]);
                mma<S>(sums[p % 2 * 2], {a.at[0], below.at[0], a.at[1], below.at[1]}, {b[0], b[1]});
                mma<S>(sums[p % 2 * 2 + 1], {a.at[2], below.at[2], a.at[3], below.at[3]}, {b[2], b[3]});
            }
        }
    }

    // Leaves the headers of a tile's rows, which follow the last columns of a slot of `live` ones: one warp.
    static __device__ __forceinline__ void keep(u32* headers, const u8* slot, int live) {
        const int quad = lane_id() % 4;
        const Quad* from = (const Quad*)(slot + lane_row() * LINE + live / 2 * 3);
        ((Quad*)(headers + lane_row() * HEADER_WORDS))[quad] = from[quad];
    }

    // What a sum over the codes of a row of the weight and a row of x is with the row's header.
    static __device__ __forceinline__ float whole(float sum, const u32* header, const S* x) {
        float rest = 0;
#pragma unroll 1
        for (int i = 1; i < HEADER_WORDS && header[i] >> 16 != 0; i++)
            rest += __uint_as_float(header[i] & 0xffff0000u) * to_f32(x[header[i] & 0xffff]);
        return sum * __uint_as_float(header[0]) + rest * 0x1p-96f;
    }
};
