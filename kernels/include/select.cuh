// The order of numbers, and the largest of them.
#pragma once

#include "block.cuh"

// NaN as the lowest number.
__device__ __forceinline__ float number(float x) { return x != x ? -INFINITE : x; }

// An integer that is larger where x is; NaN counts as negative infinity, and the two zeros are equal. Never 0.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(__fadd_rn(number(x), 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u32 warp_largest(u32 x) {
    u32 y;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ u64 warp_largest(u64 x) {
    u32 high = warp_largest((u32)(x >> 32));
    u32 low = warp_largest((u32)(x >> 32) == high ? (u32)x : 0u);
    return (u64)high << 32 | low;
}

// A number at a position: what has the larger key comes first (is larger), of equal ones the lower position.
__device__ __forceinline__ u64 ranked(u32 key, u32 position) { return (u64)key << 32 | ~position; }
__device__ __forceinline__ u32 position_of(u64 rank) { return ~(u32)rank; }

constexpr u64 BEFORE_ALL = ~0ull;

// The next of `count` numbers after `last` (`BEFORE_ALL` to begin with), the same in all lanes; `key(i)` is the i-th one's
// key. All lanes must call it.
template <class Key> __device__ __forceinline__ u64 next_largest(int count, u64 last, Key key) {
    u64 best = 0;
    for (int i = lane_id(); i < count; i += WARP) {
        u64 rank = ranked(key(i), i);
        if (rank < last && rank > best) best = rank;
    }
    return warp_largest(best);
}
