// How warps of ring.cu multiply 16-bit rows and weights of the same type: on tensor cores.
//
// Lane (g, t) reads eight adjacent elements 8t.. of row g of the tile, of row g of x and of row g + 8: the first four are those of
// one mma, the others of the next, as a product of sixteen may take its k in any order. Weights are the right operand, of eight
// columns; x is the left one.
#pragma once

#include "bulk.cuh"
#include "eight.cuh"

static_assert(SPAN == 32);

struct Multiply {
    static constexpr int LOADS = 1, CHAINS = STEPS > 4 ? 4 : 2;
    float sums[CHAINS][4];

    static __device__ __forceinline__ int lane_row() { return lane_id() / 4; }
    static __device__ __forceinline__ int lane_k() { return lane_id() % 4 * 8; }

    // Rows of x are an odd number of 64 bytes apart, so that eight lanes, of two rows, read different banks.
    static __device__ __forceinline__ S* at(S* to, int r, int k) { return to + r * PITCH + k; }
    static __device__ __forceinline__ void put(S* to, int r, int k, const float (&values)[8]) {
        Eight<S> eight;
        eight.set(values);
        *(Eight<S>*)at(to, r, k) = eight;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < CHAINS * 4; i++) sums[i / 4][i % 4] = 0;
    }

    // Adds the products of the slot's columns, of which there are `live`, with `count` rows of x. Rows of x beyond them are any
    // other row: no row's sums depend on another row.
    __device__ __forceinline__ void multiply(const u8* slot, const S* x, int count, int live) {
        const int first = warp_id() * (STEPS * SPAN) + lane_k(), row = lane_row();
        const u8* from = slot + row * LINE;
        const S* lower = x + (row < count ? row : 0) * PITCH;
        const S* upper = x + (row + 8 < count ? row + 8 : 0) * PITCH;
        Quad next;
        auto load = [&](const void* from, int column) {
            return EXACT || column < live ? *(const Quad*)((const W*)from + column) : Quad{};
        };
        // Lines begin at the same bank: of two steps, odd rows read the second one first.
        const int other = row % 2 * SPAN;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int column = first + i * SPAN;
            Quad a = load(lower, column), below = {}, b;
            if (COLUMNS > 8) below = load(upper, column);
            if (i % 2 == 0 && i + 1 < STEPS) {
                Quad one = load(from, column + other), two = load(from, column + SPAN - other);
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    b.at[w] = other ? two.at[w] : one.at[w];
                    next.at[w] = other ? one.at[w] : two.at[w];
                }
            } else {
                b = i % 2 == 0 ? load(from, column) : next;
            }
            mma<S>(sums[2 * i % CHAINS], {a.at[0], below.at[0], a.at[1], below.at[1]}, {b.at[0], b.at[1]});
            mma<S>(sums[(2 * i + 1) % CHAINS], {a.at[2], below.at[2], a.at[3], below.at[3]}, {b.at[2], b.at[3]});
        }
    }

    // Leaves the warp's sums, in lines of a tile for each row of x.
    __device__ __forceinline__ void store(float* to, int count) {
#pragma unroll
        for (int half = 0; half < (COLUMNS > 8 ? 2 : 1); half++) {
            int row = lane_row() + half * 8, column = lane_id() % 4 * 2, i = half * 2;
            Pack<float, 2> sum;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                sum.at[e] = sums[0][i + e] + sums[1][i + e];
                if (CHAINS == 4) sum.at[e] += sums[CHAINS - 2][i + e] + sums[CHAINS - 1][i + e];
            }
            if (row < count) *(Pack<float, 2>*)(to + row * TILE + column) = sum;
        }
    }
};
