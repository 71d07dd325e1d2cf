// Where the elements of a checkpoint tensor lie in the weight that is made of it, alone or with others.
#pragma once

#include "types.cuh"

// Element i of the tensor is element
//
//     i / part * whole + i % part / run * stride + offset + i % part % run
//
// of the weight: `part` elements of the tensor are in each `whole` of the weight, in runs that begin every `stride`.
struct Places {
    i64 part, whole, run, stride, offset;

    __device__ __forceinline__ i64 of(i64 i) const {
        i64 rest = i % part;
        return i / part * whole + rest / run * stride + offset + rest % run;
    }
};

// Elements that move as one where everything allows it.
constexpr int SOME = 8;

// Stores adjacent elements sixteen bytes at a time. Of elements of two bytes the compiler would make stores of four.
template <class T, int N> __device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
    constexpr int QUADS = sizeof(pack) / sizeof(Quad);
    static_assert(sizeof(pack) % sizeof(Quad) == 0, "whole stores");
    union {
        Pack<T, N> elements;
        Quad q[QUADS];
    } both = {pack};
#pragma unroll
    for (int i = 0; i < QUADS; i++)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"((Quad*)to + i), "r"(both.q[i].at[0]),
                     "r"(both.q[i].at[1]), "r"(both.q[i].at[2]), "r"(both.q[i].at[3])
                     : "memory");
}

// Writes the elements first..first + count of a tensor to their places in `to`, each by one thread; `make.one(n)` is the n-th
// of them and `make.some(n)` SOME from the n-th on, for n that SOME divides, used if `make.aligned()`.
template <class T, class Make> __device__ __forceinline__ void fill(T* to, i64 first, i64 count, Places places, Make make) {
    typedef Pack<T, SOME> Some;
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, step = (i64)gridDim.x * blockDim.x;
    i64 all = first | places.part | places.whole | places.run | places.stride | places.offset;
    i64 single = 0;
    // The divisions are of 32 bits then.
    constexpr i64 MOST = (i64)SOME << 32;
    if (all % SOME == 0 && (u64)to % sizeof(Some) == 0 && make.aligned() && first + count < MOST && places.part < MOST) {
        u32 part = (u32)(places.part / SOME), run = (u32)(places.run / SOME), begin = (u32)(first / SOME);
        i64 packs = count / SOME;
        for (i64 pack = at; pack < packs; pack += step) {
            u32 i = begin + (u32)pack, rest = i % part;
            i64 place = i / part * places.whole + rest / run * places.stride + places.offset + (i64)(rest % run) * SOME;
            store(to + place, make.some(pack * SOME));
        }
        single = packs * SOME;
    }
    for (i64 n = single + at; n < count; n += step) to[places.of(first + n)] = make.one(n);
}
