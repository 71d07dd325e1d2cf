// The paged cache of keys and values, and the softmax that is computed as scores come in.
#pragma once

#include "block.cuh"

// Element of a cache [pages, 2, KV_HEADS, PAGE, D] at which a head's keys of a page begin. Its values begin
// `values_after_keys` elements later.
template <int KV_HEADS, int PAGE, int D> __device__ __forceinline__ i64 keys_of(int page, int kv_head) {
    return ((i64)page * (2 * KV_HEADS) + kv_head) * ((i64)PAGE * D);
}
template <int KV_HEADS, int PAGE, int D> __device__ __forceinline__ constexpr i64 values_after_keys() {
    return (i64)KV_HEADS * PAGE * D;
}

// 2^x; 1 of 0, 0 of minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What is subtracted for a running maximum: 0 as long as no score has come, so that no difference is NaN. A maximum that
// stays gives a factor of exactly 1 on what was summed up before.
__device__ __forceinline__ float base_of(float max) { return max == -INFINITE ? 0.0f : max; }

// N adjacent elements as 32-bit words, in one load: up to sixteen bytes.
template <class T, int N> struct alignas(sizeof(T) * N) Words {
    u32 at[sizeof(T) * N / 4];
};
template <class T> struct alignas(sizeof(T)) Words<T, 1> {
    T one;
};

template <class T, int N> __device__ __forceinline__ float element(const Words<T, N>& words, int i) {
    if constexpr (N == 1) {
        return to_f32(words.one);
    } else if constexpr (sizeof(T) == 4) {
        return __uint_as_float(words.at[i]);
    } else {
        return i % 2 ? high<T>(words.at[i / 2]) : low<T>(words.at[i / 2]);
    }
}

// The largest over the warp.
__device__ __forceinline__ int warp_largest(int x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}
