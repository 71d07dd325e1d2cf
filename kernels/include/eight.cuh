// Eight adjacent elements, loaded and stored sixteen bytes at a time.
#pragma once

#include "types.cuh"

// As they are in memory.
template <class T> struct Eight {
    Quad quads[sizeof(T) / 2];

    __device__ __forceinline__ float at(int i) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(quads[i / 4].at[i % 4]);
        } else {
            u32 word = quads[0].at[i / 2];
            return i % 2 ? high<T>(word) : low<T>(word);
        }
    }
    __device__ __forceinline__ void set(const float (&x)[8]) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 8; i++) quads[i / 4].at[i % 4] = __float_as_uint(x[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) quads[0].at[i] = pair<T>(x[2 * i], x[2 * i + 1]);
        }
    }
};

// A load that stays where it is written, after `wait_for_previous` or, of constants, before it: loads past the coherent caches
// (`ld.global.nc`) are moved from before it to behind it by the assembler.
template <class T> __device__ __forceinline__ Eight<T> fresh(const T* from) {
    Eight<T> x;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(T) / 2); i++) x.quads[i] = load_fresh((const Quad*)from + i);
    return x;
}
