// How warps of ring.cu multiply 16-bit rows and weights of the same type: on tensor cores.
//
// Lane (g, t) reads eight adjacent elements 8t.. of row g of the tile, of row g of x and of row g + 8: the first four are those of
// one mma, the others of the next, as a product of sixteen may take its k in any order.
#pragma once

#include "ring_sums.cuh"

static_assert(SPAN == 32);

constexpr int CHAINS = STEPS > 4 ? 4 : 2;

struct Multiply : MmaSums<CHAINS> {
    // A warp's steps of a unit: sixteen bytes of each of a row of the weight.
    struct Unit {
        Quad steps[STEPS];
        int live;

        __device__ __forceinline__ void take(const u8* slot, int columns) {
            live = columns;
#pragma unroll
            for (int i = 0; i < STEPS; i += 2) take_two(steps[i], steps[i + 1 < STEPS ? i + 1 : i], slot, i, live);
        }
    };

    static __device__ __forceinline__ int column_of(int step) { return (warp_id() * STEPS + step) * SPAN + lane_k(); }
    static __device__ __forceinline__ Quad load(const void* from, int column, int live) {
        return EXACT || column < live ? *(const Quad*)((const W*)from + column) : Quad{};
    }

    // What a lane has of step i, and of the next one if there is one, of a slot of `live` columns. Lines begin at the same bank: of
    // two steps, odd rows read the second one first.
    static __device__ __forceinline__ void take_two(Quad& first, Quad& second, const u8* slot, int i, int live) {
        const u8* from = slot + lane_row() * LINE;
        if (i + 1 == STEPS) {
            first = load(from, column_of(i), live);
            return;
        }
        const bool other = lane_row() % 2;
        const Quad one = load(from, column_of(other ? i + 1 : i), live), two = load(from, column_of(other ? i : i + 1), live);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            first.at[w] = other ? two.at[w] : one.at[w];
            second.at[w] = other ? one.at[w] : two.at[w];
        }
    }

    // Adds the products of step i with `count` rows of x. Rows of x beyond them are any other row: no row's sums depend on another row.
    __device__ __forceinline__ void multiply(const Quad& b, int i, const S* x, int count, int live) {
        const int row = lane_row();
        Quad a = load(x + (row < count ? row : 0) * PITCH, column_of(i), live), below = {};
        if (COLUMNS > 8) below = load(x + (row + 8 < count ? row + 8 : 0) * PITCH, column_of(i), live);
        mma<S>(sums[2 * i % CHAINS], {a.at[0], below.at[0], a.at[1], below.at[1]}, {b.at[0], b.at[1]});
        mma<S>(sums[(2 * i + 1) % CHAINS], {a.at[2], below.at[2], a.at[3], below.at[3]}, {b.at[2], b.at[3]});
    }

    // The same of a unit.
    __device__ __forceinline__ void multiply(const Unit& unit, const S* x, int count) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) multiply(unit.steps[i], i, x, count, unit.live);
    }

    // The same of a slot of `live` columns.
    __device__ __forceinline__ void multiply(const u8* slot, const S* x, int count, int live) {
        Quad b, next;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (i % 2 == 0) take_two(b, next, slot, i, live);
            multiply(i % 2 == 0 ? b : next, i, x, count, live);
        }
    }
};
