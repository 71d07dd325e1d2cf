// How warps of ring.cu multiply rows and weights of any float types, packed weights too (packed.cuh): in f32, by FMA.
//
// A lane has elements of four rows of a tile and multiplies them by elements of x that it reads once: reads of x are what shared
// memory would be too slow for. Eight adjacent lanes read 128 adjacent bytes of a row, so no banks conflict, wherever the rows of a
// tile and of x begin. Of packed weights sixteen lanes read 64 adjacent bytes, and the others the same of the next row, an odd number
// of 64 bytes further.
#pragma once

#include "fma.cuh"

#if PACKED
#include "packed.cuh"

// A lane's eight elements of a step are those of word 4t + i of each third, for lane 4t + i.
struct Lanes : Fma<4, 16> {
    static __device__ __forceinline__ S* at(S* to, int r, int k) {
        const int lane = k % 32 / 8 * 4 + k % SPAN / 32;
        return to + r * PITCH + k / SPAN * SPAN + lane * 4;
    }
    static __device__ __forceinline__ void put(S* to, int r, int k, const float (&values)[8]) { put_halves(at(to, r, k), values); }
    // Where the one element k of row r is.
    static __device__ __forceinline__ S* one(S* to, int r, int k) { return at(to, r, k / 8 * 8) + k % 4 + k % 8 / 4 * (SPAN / 2); }
};
typedef Scaled<Lanes> Rows;
#else
typedef Fma<4, 16> Rows;
#endif

struct Multiply : Rows {
    static constexpr int LOADS = 1, ROWS = 4, LANES = 16;
    static_assert(SPAN == ::SPAN && ROWS * WARP == TILE * LANES);

    // Row r of a lane's four, and the first of them.
    static constexpr int APART = PACKED ? WARP / LANES : 1;
    static __device__ __forceinline__ int first_row() { return lane_id() / LANES * (PACKED ? 1 : ROWS); }

    // What a lane has of a step: elements of its rows.
    struct Step {
        Quad rows[ROWS];

        __device__ __forceinline__ void take(const u8* slot, int column) {
            const u8* from = slot + first_row() * LINE;
#pragma unroll
            for (int r = 0; r < ROWS; r++, from += APART * LINE) {
#if PACKED
                const u32* words = (const u32*)(from + column / SPAN * SPAN_BYTES) + lane_id() % LANES;
                unfold(rows[r].at, words[0], words[THIRD / 4], words[THIRD / 2]);
#else
                rows[r] = *(const Quad*)(from + (column + lane_k()) * sizeof(W));
#endif
            }
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
                if (is_live(i, live)) steps[i].take(slot, column_of(i));
        }
    };

    static __device__ __forceinline__ int column_of(int step) { return (warp_id() * STEPS + step) * SPAN; }
    static __device__ __forceinline__ bool is_live(int step, int live) {
        return EXACT || column_of(step) + (PACKED ? 0 : lane_k()) < live;
    }

    // Adds the products of a unit with `count` rows of x.
    __device__ __forceinline__ void multiply(const Unit& unit, const S* x, int count) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            if (is_live(i, unit.live)) Fma::multiply(unit.steps[i].rows, x + column_of(i) + lane_x(), count);
    }

    // The same of a slot of `live` columns.
    __device__ __forceinline__ void multiply(const u8* slot, const S* x, int count, int live) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (!is_live(i, live)) break;
            Step step;
            step.take(slot, column_of(i));
            Fma::multiply(step.rows, x + column_of(i) + lane_x(), count);
        }
    }

    // Leaves the warp's sums, in lines of a tile for each row of x.
    __device__ __forceinline__ void store(float* to, int count) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (c > 0 && c >= count) break;
            float sum[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) sum[r] = sums[r][c];
            // Of the lanes that share rows, each half adds up half of the rows, until a lane has one row; then all add up that.
#pragma unroll
            for (int apart = LANES / 2, left = ROWS / 2; apart > 0; apart /= 2, left /= 2) {
                if (left == 0) sum[0] += __shfl_xor_sync(ALL_LANES, sum[0], apart);
#pragma unroll
                for (int r = 0; r < left; r++) {
                    const bool upper = lane_id() & apart;
                    float given = __shfl_xor_sync(ALL_LANES, upper ? sum[r] : sum[r + left], apart);
                    sum[r] = (upper ? sum[r + left] : sum[r]) + given;
                }
            }
            const int row = first_row() + lane_id() % LANES / (LANES / ROWS) * APART;
            if (lane_id() % (LANES / ROWS) == 0) to[c * TILE + row] = sum[0];
        }
    }
};
