// y = epilogue(x w^T) for few rows x, with 16-bit weights and rows, on tensor cores: the frame of stream.cuh, in which a
// step of a warp is 32 columns of 16 rows of the weight.
//
// The weight is the left operand, rows of x are the eight columns of the right one. A product of sixteen may take its k in
// any order, if both operands take the same: lane (g, t) loads eight adjacent elements 8t.. of rows g and g + 8 and of row g of
// x, and gives the first four to one mma and the others to the next. So weights go from memory into the registers of their
// mma, by sixteen bytes, past shared memory.

#include "stream.cuh"

struct Multiply {
    static constexpr int LOADS = 2, STRIDE = 8, ROWS = 16, SPAN = 32;
    // With one tile of columns, two sums, so that an mma waits for every second one before it.
    static constexpr int TILES = COLUMNS / 8, CHAINS = TILES == 1 ? 2 : 1;
    float sums[CHAINS][TILES][4];

    static __device__ __forceinline__ int lane_row() { return lane_id() / 4; }
    static __device__ __forceinline__ int lane_k() { return lane_id() % 4 * 8; }
    static __device__ __forceinline__ int lane_x() { return lane_k() + lane_row() * PITCH; }

    // Rows are an odd number of 64 bytes apart, so that eight lanes, of two rows, read different banks.
    static __device__ __forceinline__ S* at(S* to, int r, int k) { return to + r * PITCH + k; }
    static __device__ __forceinline__ void put(S* to, int r, int k, const float (&values)[8]) {
        Eight<S> eight;
        eight.set(values);
        *(Eight<S>*)at(to, r, k) = eight;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < CHAINS * TILES * 4; i++) sums[i / (TILES * 4)][i / 4 % TILES][i % 4] = 0;
    }

    __device__ __forceinline__ void multiply(const Quad (&a)[LOADS], const S* x, int count) {
        u32 lower[4] = {a[0].at[0], a[1].at[0], a[0].at[1], a[1].at[1]};
        u32 upper[4] = {a[0].at[2], a[1].at[2], a[0].at[3], a[1].at[3]};
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            if (n > 0 && n * 8 >= count) break;
            Quad b = {};
            if (n * 8 + lane_row() < count) b = *(const Quad*)(x + n * 8 * PITCH);
            mma<S>(sums[0][n], lower, {b.at[0], b.at[1]});
            mma<S>(sums[CHAINS - 1][n], upper, {b.at[2], b.at[3]});
        }
    }

    __device__ __forceinline__ void store(float* to, int line, int count) {
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = n * 8 + lane_id() % 4 * 2 + i % 2, row = lane_row() + i / 2 * 8;
                float sum = CHAINS == 2 ? sums[0][n][i] + sums[CHAINS - 1][n][i] : sums[0][n][i];
                if (column < count) to[column * line + row] = sum;
            }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) stream(PARAMS) {
    STREAM_BODY;
}
