// How warps of ring.cu multiply rows of bf16 and weights of bf16 that are packed (packed.cuh): on tensor cores.
//
// Lane (g, t) reads sixteen bytes of each third of a span of row g, which are columns 8t.. of its four parts.
#pragma once

#include "packed.cuh"
#include "ring_sums.cuh"

static_assert(SAME<S, bf16>);

struct Multiply : Scaled<MmaSums<4>> {
    static __device__ __forceinline__ S* one(S* to, int r, int k) { return at(to, r, k); }

    // What a lane has of a step: a row's pairs, by part.
    struct Step {
        u32 pairs[4][4];

        __device__ __forceinline__ void take(const u8* slot, int column) {
            const Quad* line = (const Quad*)(slot + lane_row() * LINE + column / SPAN * SPAN_BYTES + lane_id() % 4 * 16);
            const Quad first = line[0], second = line[THIRD / 16], third = line[THIRD / 8];
#pragma unroll
            for (int p = 0; p < 4; p++) unfold(pairs[p], first.at[p], second.at[p], third.at[p]);
        }
    };
    // A warp's steps of a unit.
    struct Unit {
        Step steps[STEPS];
        int live;

        __device__ __forceinline__ void take(const u8* slot, int columns) {
            live = columns;
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                if (EXACT || column_of(i) < live) steps[i].take(slot, column_of(i));
        }
    };

    static __device__ __forceinline__ int column_of(int step) { return (warp_id() * STEPS + step) * SPAN; }

    // Adds the products of a step with `count` rows of x. Rows of x beyond them are any other row: no row's sums depend on another row.
    __device__ __forceinline__ void multiply(const Step& step, const S* x, int count) {
        const int row = lane_row();
        const S* lower = x + (row < count ? row : 0) * PITCH + lane_k();
        const S* upper = x + (row + 8 < count ? row + 8 : 0) * PITCH + lane_k();
#pragma unroll
        for (int p = 0; p < 4; p++) {
            Quad a = *(const Quad*)(lower + p * 32), below = {};
            if (COLUMNS > 8) below = *(const Quad*)(upper + p * 32);
            const u32* b = step.pairs[p];
            mma<S>(sums[p % 2 * 2], {a.at[0], below.at[0], a.at[1], below.at[1]}, {b[0], b[1]});
            mma<S>(sums[p % 2 * 2 + 1], {a.at[2], below.at[2], a.at[3], below.at[3]}, {b[2], b[3]});
        }
    }

    // The same of a unit.
    __device__ __forceinline__ void multiply(const Unit& unit, const S* x, int count) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            if (EXACT || column_of(i) < unit.live) multiply(unit.steps[i], x + column_of(i), count);
    }

    // The same of a slot of `live` columns.
    __device__ __forceinline__ void multiply(const u8* slot, const S* x, int count, int live) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (!EXACT && column_of(i) >= live) break;
            Step step;
            step.take(slot, column_of(i));
            multiply(step, x + column_of(i), count);
        }
    }
};
