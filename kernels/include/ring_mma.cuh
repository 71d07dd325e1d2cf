// How warps of ring.cu multiply 16-bit rows and weights of the same type: on tensor cores.
//
// Lane (g, t) reads eight adjacent elements 8t.. of row g of the tile, of row g of x and of row g + 8: the first four are those of
// one mma, the others of the next, as a product of sixteen may take its k in any order.
#pragma once

#include "ring_sums.cuh"

static_assert(SPAN == 32);

constexpr int CHAINS = STEPS > 4 ? 4 : 2;

struct Multiply : MmaSums<CHAINS> {
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
};
