// Element types and conversions. No header of the CUDA toolkit is included anywhere, so that a compiler without its
// headers is enough.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The upper half of binary32, and binary16.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(int x) { return (float)x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }

// Two numbers, rounded to T, in a word. The conversion of one number by itself would become an instruction of the slow unit for
// conversions (F2F), this one belongs to ordinary arithmetic.
template <class T> __device__ __forceinline__ u32 pair(float lower, float upper);
template <> __device__ __forceinline__ u32 pair<bf16>(float lower, float upper) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(upper), "f"(lower));
    return y;
}
template <> __device__ __forceinline__ u32 pair<f16>(float lower, float upper) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(upper), "f"(lower));
    return y;
}
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return {(u16)pair<bf16>(x, 0.0f)}; }
template <> __device__ __forceinline__ f16 from_f32<f16>(float x) { return {(u16)pair<f16>(x, 0.0f)}; }

// x as an element of T would hold it.
template <class T> __device__ __forceinline__ float rounded(float x) { return to_f32(from_f32<T>(x)); }

template <class A, class B> constexpr bool SAME = false;
template <class A> constexpr bool SAME<A, A> = true;

// x as an element of another type; of the same type, the same bits.
template <class To, class From> __device__ __forceinline__ To converted(From x) {
    if constexpr (SAME<To, From>) {
        return x;
    } else {
        return from_f32<To>(to_f32(x));
    }
}

// N adjacent elements, loaded and stored as one.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// Sixteen bytes.
struct alignas(16) Quad {
    u32 at[4];
};

// Asks for memory into the second cache. Right before `wait_for_previous` too, whoever writes there: no value is read.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Reads sixteen bytes that nothing writes while the kernel runs and that are read once: weights.
__device__ __forceinline__ Quad load_once(const void* from) {
    Quad q;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.at[0]), "=r"(q.at[1]), "=r"(q.at[2]), "=r"(q.at[3])
                 : "l"(from));
    return q;
}

// The same, or zeros.
__device__ __forceinline__ Quad load_once_if(bool wanted, const void* from) {
    Quad q = {};
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(q.at[0]), "+r"(q.at[1]), "+r"(q.at[2]), "+r"(q.at[3])
                 : "l"(from), "r"((u32)wanted));
    return q;
}

// Reads what a kernel before this one wrote: never moved before `wait_for_previous`.
__device__ __forceinline__ Quad load_fresh(const void* from) {
    Quad q;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.at[0]), "=r"(q.at[1]), "=r"(q.at[2]), "=r"(q.at[3])
                 : "l"(from));
    return q;
}
__device__ __forceinline__ int load_fresh(const int* from) {
    int x;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

// Nothing that uses x moves across.
__device__ __forceinline__ void pin(u32& x) { asm volatile("" : "+r"(x)::"memory"); }

// The same past caches that other kernels on this multiprocessor have filled: before `wait_for_previous`, of what is there by then.
__device__ __forceinline__ int load_early(const int* from) {
    int x;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
__device__ __forceinline__ u16 load_early(const u16* from) {
    u16 x;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(x) : "l"(from) : "memory");
    return x;
}

// The two elements of a word, in f32.
template <class T> __device__ __forceinline__ float low(u32 word) { return to_f32(T{(u16)(word & 0xffff)}); }
template <class T> __device__ __forceinline__ float high(u32 word) { return to_f32(T{(u16)(word >> 16)}); }
