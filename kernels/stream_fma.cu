// y = epilogue(x w^T) for few rows x, of any float types, in f32: the frame of stream.cuh, in which a step of a warp is sixteen
// bytes a lane of each of four rows of the weight.
//
// Rows of x are staged in f32. A lane multiplies its elements by those of every row of x; the lanes' sums are added where a
// slice ends.

#include "stream.cuh"

struct Multiply {
    // Elements in sixteen bytes.
    static constexpr int VECTOR = 16 / sizeof(W);
    static constexpr int LOADS = 4, STRIDE = 1, ROWS = 4, SPAN = 32 * VECTOR;
    float sums[LOADS][COLUMNS];

    static __device__ __forceinline__ int lane_row() { return 0; }
    static __device__ __forceinline__ int lane_k() { return lane_id() * VECTOR; }
    static __device__ __forceinline__ int lane_x() { return lane_id() * 4; }

    // Eight elements of a lane are staged as two fours, the first fours of all lanes before the second, so that the lanes of a
    // warp always read adjacent sixteen bytes.
    static __device__ __forceinline__ float* at(float* to, int r, int k) {
        return to + r * PITCH + (VECTOR == 8 ? k / SPAN * SPAN + k % SPAN / 2 : k);
    }
    static __device__ __forceinline__ void put(float* to, int r, int k, const float (&values)[8]) {
        float* first = at(to, r, k);
        *(Pack<float, 4>*)first = Pack<float, 4>{{values[0], values[1], values[2], values[3]}};
        *(Pack<float, 4>*)(first + (VECTOR == 8 ? SPAN / 2 : 4)) = Pack<float, 4>{{values[4], values[5], values[6], values[7]}};
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < LOADS * COLUMNS; i++) sums[i / COLUMNS][i % COLUMNS] = 0;
    }

    static __device__ __forceinline__ float element(const Quad& a, int i) {
        if constexpr (sizeof(W) == 4) {
            return __uint_as_float(a.at[i]);
        } else {
            return i % 2 ? high<W>(a.at[i / 2]) : low<W>(a.at[i / 2]);
        }
    }

    __device__ __forceinline__ void multiply(const Quad (&a)[LOADS], const S* x, int count) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (c > 0 && c >= count) break;
#pragma unroll
            for (int half = 0; half < VECTOR / 4; half++) {
                Pack<float, 4> b = *(const Pack<float, 4>*)(x + c * PITCH + half * (SPAN / 2));
#pragma unroll
                for (int l = 0; l < LOADS; l++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[l][c] += element(a[l], half * 4 + i) * b.at[i];
            }
        }
    }

    __device__ __forceinline__ void store(float* to, int line, int count) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (c >= count) break;
#pragma unroll
            for (int l = 0; l < LOADS; l++) {
                float sum = warp_sum(sums[l][c]);
                if (lane_id() == 0) to[c * line + l] = sum;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) stream_fma(PARAMS) {
    STREAM_BODY;
}
