// How warps of ring.cu multiply rows and weights of any float types: in f32, by FMA.
//
// A lane reads its elements of four adjacent rows of a tile and multiplies them by elements of x that it reads once: reads of x
// are what shared memory would be too slow for. Eight adjacent lanes read 128 adjacent bytes, so no banks conflict, wherever the
// rows of a tile and of x begin.
#pragma once

#include "fma.cuh"

struct Multiply : Fma<4, 16> {
    static constexpr int LOADS = 1, ROWS = 4, LANES = 16;
    static_assert(SPAN == ::SPAN && ROWS * WARP == TILE * LANES);

    // Adds the products of the slot's columns, of which there are `live`, with `count` rows of x.
    __device__ __forceinline__ void multiply(const u8* slot, const S* x, int count, int live) {
        const int first = warp_id() * (STEPS * SPAN);
        const u8* from = slot + lane_id() / LANES * (ROWS * LINE) + lane_k() * sizeof(W);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int column = first + i * SPAN;
            if (!EXACT && column + lane_k() >= live) break;
            Quad a[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) a[r] = *(const Quad*)(from + r * LINE + column * sizeof(W));
            Fma::multiply(a, x + column + lane_x(), count);
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
            if (lane_id() % (LANES / ROWS) == 0) to[c * TILE + lane_id() / (LANES / ROWS)] = sum[0];
        }
    }
};
