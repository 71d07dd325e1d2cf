// Threads that work together: sums and maxima in a fixed order, and the waiting of dependent launches.
#pragma once

#include "types.cuh"

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffff;

// Waits until every kernel before this one in the stream is done and its writes are visible. Nothing but weights and
// constants may be read, and nothing written, before it. Returns at once in a launch that depends on nothing.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel of the stream start up; it waits for this one's end by itself.
__device__ __forceinline__ void release_next() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x / WARP; }

// The sum over aligned groups of LANES lanes, the same bits in each of them.
template <int LANES = 32> __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

template <int LANES = 32> __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over the block, the same bits in every thread. `scratch` holds a number for each warp; all threads must call it.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    u32 warps = (blockDim.x + WARP - 1) / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    float sum = 0;
    for (u32 i = 0; i < warps; i++) sum += scratch[i];
    return sum;
}

// Asks for constants to be brought near, into the L2 cache: may stand before `wait_for_previous`. All threads call it.
template <class T> __device__ __forceinline__ void prefetch(const T* from, int count) {
    for (int i = threadIdx.x * 128; i < count * (int)sizeof(T); i += blockDim.x * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)from + i));
}
