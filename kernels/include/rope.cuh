// Heads on their way to attention: normalised by their root mean square, and rotated by their position.
#pragma once

#include "block.cuh"

// Rotates an element of a head's first half together with the one at the same place of the second.
__device__ __forceinline__ void rotate_pair(float& x, float& y, float cosine, float sine) {
    float first = __fsub_rn(__fmul_rn(x, cosine), __fmul_rn(y, sine));
    y = __fadd_rn(__fmul_rn(y, cosine), __fmul_rn(x, sine));
    x = first;
}

// A head of 2 * HALF elements, held by an aligned group of LANES lanes: x has elements of the first half, E adjacent ones at a
// time, and y those at the same places of the second. Places beyond the half hold zeros.
template <int HALF, int LANES, int E> struct Halves {
    static constexpr int SPANS = (HALF / E + LANES - 1) / LANES;
    float x[SPANS * E], y[SPANS * E];

    static __device__ __forceinline__ int place(int span, int lane) { return (span * LANES + lane) * E; }

    template <class T> __device__ __forceinline__ void load(const T* head, int lane) {
#pragma unroll
        for (int span = 0; span < SPANS; span++) {
            int at = place(span, lane);
            Pack<T, E> first{}, second{};
            if (at < HALF) {
                first = *(const Pack<T, E>*)(head + at);
                second = *(const Pack<T, E>*)(head + HALF + at);
            }
#pragma unroll
            for (int e = 0; e < E; e++) {
                x[span * E + e] = to_f32(first.at[e]);
                y[span * E + e] = to_f32(second.at[e]);
            }
        }
    }

    template <class T> __device__ __forceinline__ void store(T* head, int lane) const {
#pragma unroll
        for (int span = 0; span < SPANS; span++) {
            int at = place(span, lane);
            if (at >= HALF) continue;
            Pack<T, E> first, second;
#pragma unroll
            for (int e = 0; e < E; e++) {
                first.at[e] = from_f32<T>(x[span * E + e]);
                second.at[e] = from_f32<T>(y[span * E + e]);
            }
            *(Pack<T, E>*)(head + at) = first;
            *(Pack<T, E>*)(head + HALF + at) = second;
        }
    }

    // The head's sum of squares, in each of its lanes. All lanes of the warp must call it.
    __device__ __forceinline__ float squares() const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < SPANS * E; i++) sum += x[i] * x[i] + y[i] * y[i];
        return warp_sum<LANES>(sum);
    }

    // Divides by the root mean square, rounds to X, weights, rounds to N.
    template <class X, class N> __device__ __forceinline__ void normalise(float squares, float eps, const Halves& weight) {
        float scale = 1.0f / sqrtf(squares / (2 * HALF) + eps);
#pragma unroll
        for (int i = 0; i < SPANS * E; i++) {
            x[i] = rounded<N>(__fmul_rn(rounded<X>(__fmul_rn(x[i], scale)), weight.x[i]));
            y[i] = rounded<N>(__fmul_rn(rounded<X>(__fmul_rn(y[i], scale)), weight.y[i]));
        }
    }

    // Rotates by angles whose cosines are in x and whose sines are in y, and rounds to R.
    template <class R> __device__ __forceinline__ void rotate(const Halves& angles) {
#pragma unroll
        for (int i = 0; i < SPANS * E; i++) {
            rotate_pair(x[i], y[i], angles.x[i], angles.y[i]);
            x[i] = rounded<R>(x[i]);
            y[i] = rounded<R>(y[i]);
        }
    }
};
