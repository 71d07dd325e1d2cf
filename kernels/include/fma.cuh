// Products of a weight of any float type and few rows of x, in f32: LANES adjacent lanes read adjacent sixteen bytes of ROWS rows
// of the weight, and each multiplies its elements by those of every row of x, which are staged in f32. Sums stay in the lanes.
//
// Generated: W, S, which is float, COLUMNS, the most rows of x, and PITCH, the elements from one of them to the next.
#pragma once

#include "block.cuh"

template <int ROWS, int LANES> struct Fma {
    // Elements in sixteen bytes, and columns of a step.
    static constexpr int VECTOR = 16 / sizeof(W), SPAN = LANES * VECTOR;
    float sums[ROWS][COLUMNS];

    // A lane's first column of a step, and where its elements of x are.
    static __device__ __forceinline__ int lane_k() { return lane_id() % LANES * VECTOR; }
    static __device__ __forceinline__ int lane_x() { return lane_id() % LANES * 4; }

    // Eight elements of a lane are staged as two fours, the first fours of all lanes before the second, so that adjacent lanes
    // always read adjacent sixteen bytes.
    static __device__ __forceinline__ S* at(S* to, int r, int k) {
        return to + r * PITCH + (VECTOR == 8 ? k / SPAN * SPAN + k % SPAN / 2 : k);
    }
    static __device__ __forceinline__ void put(S* to, int r, int k, const float (&values)[8]) { put_halves(at(to, r, k), values); }
    static __device__ __forceinline__ void put_halves(S* first, const float (&values)[8]) {
        *(Pack<float, 4>*)first = Pack<float, 4>{{values[0], values[1], values[2], values[3]}};
        *(Pack<float, 4>*)(first + (VECTOR == 8 ? SPAN / 2 : 4)) = Pack<float, 4>{{values[4], values[5], values[6], values[7]}};
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS * COLUMNS; i++) sums[i / COLUMNS][i % COLUMNS] = 0;
    }

    static __device__ __forceinline__ float element(const Quad& a, int i) {
        if constexpr (sizeof(W) == 4) {
            return __uint_as_float(a.at[i]);
        } else {
            return i % 2 ? high<W>(a.at[i / 2]) : low<W>(a.at[i / 2]);
        }
    }

    // Adds the products of a step with `count` rows of x.
    __device__ __forceinline__ void multiply(const Quad (&a)[ROWS], const S* x, int count) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (c > 0 && c >= count) break;
#pragma unroll
            for (int half = 0; half < VECTOR / 4; half++) {
                Pack<float, 4> b = *(const Pack<float, 4>*)(x + c * PITCH + half * (SPAN / 2));
#pragma unroll
                for (int l = 0; l < ROWS; l++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[l][c] += element(a[l], half * 4 + i) * b.at[i];
            }
        }
    }
};
