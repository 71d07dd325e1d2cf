// y = epilogue(x w^T) for few rows x, of any float types, in f32: the frame of stream.cuh, in which a step of a warp is sixteen
// bytes a lane of each of four rows of the weight (fma.cuh). The lanes' sums are added where a slice ends.

#include "fma.cuh"
#include "stream.cuh"

struct Multiply : Fma<4, 32> {
    static constexpr int LOADS = 4, STRIDE = 1, ROWS = 4;

    static __device__ __forceinline__ int lane_row() { return 0; }

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
