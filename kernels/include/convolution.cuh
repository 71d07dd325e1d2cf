// The gated convolution of a product's columns b, c and x, for rows each of which is a sequence of its own: an element of y by one
// thread, which has one row, and one channel at a time.
//
//     u = b * x,   y = c * (sum over taps of weight[tap] * u[position - (TAPS - 1 - tap)] + bias)      in the order of taps, in f32
//
// with the roundings of short_conv.cu. The u of earlier positions come from a ring of RING_COLUMNS columns by position; the row's
// own goes there, to a column that is none of those read. For a row of no sequence the sum is zero, and nothing is written.
#pragma once

#include "stage.cuh"

// Values are rounded to P as the product makes them, to Q with the product's own bias, `shift`, to U as the product of b and x, to
// V as the sum, and to B with the bias of the convolution.
template <class P, class Q, class U, class V, class B, int TAPS, int RING_COLUMNS, int CHANNELS, class Weight, class Ring,
          class Bias, class Shift>
struct Convolution {
    const Weight* __restrict__ weight;
    Ring* ring;
    const Bias* bias;
    const Shift* shift;

    // Of the channel: the sum over the earlier columns, and the weight of the row's own.
    float sum, last;

    __device__ __forceinline__ Ring* column(int slot, int position, int channel) const {
        return ring + ((i64)slot * RING_COLUMNS + position % RING_COLUMNS) * CHANNELS + channel;
    }

    static __device__ __forceinline__ float read(const Ring* from) {
        if constexpr (sizeof(Ring) == 4) return __int_as_float(load_early((const int*)from));
        else return to_f32(Ring{load_early((const u16*)from)});
    }

    // Reads the earlier columns of a channel, after `find_places`; before the wait, if they are there.
    __device__ __forceinline__ void begin(int row, int channel) {
        const int position = shared_places().positions[row], slot = shared_places().slots[row];
        sum = 0;
#pragma unroll
        for (int tap = 0; tap < TAPS - 1; tap++) {
            int from = position - (TAPS - 1 - tap);
            if (slot >= 0 && from >= 0)
                sum = __fadd_rn(sum, __fmul_rn(to_f32(weight[(i64)channel * TAPS + tap]), read(column(slot, from, channel))));
        }
    }
    // Reads what else `finish` takes.
    __device__ __forceinline__ void ask(int channel) { last = to_f32(weight[(i64)channel * TAPS + TAPS - 1]); }

    // An element of a band of the product, as the convolution takes it.
    __device__ __forceinline__ float stored(float v, int band, int channel) const {
        v = rounded<P>(v);
        return shift == nullptr ? v : rounded<Q>(__fadd_rn(v, to_f32(shift[band * CHANNELS + channel])));
    }

    // The element of y, after the wait.
    __device__ __forceinline__ float finish(float b, float c, float x, int row, int channel) const {
        const int position = shared_places().positions[row], slot = shared_places().slots[row];
        const bool live = slot >= 0 && position >= 0;
        float u = rounded<U>(__fmul_rn(stored(b, 0, channel), stored(x, 2, channel)));
        float value = rounded<V>(live ? __fadd_rn(sum, __fmul_rn(last, u)) : 0.0f);
        if (bias != nullptr) value = rounded<B>(__fadd_rn(value, to_f32(bias[channel])));
        if (live) *column(slot, position, channel) = from_f32<Ring>(u);
        return __fmul_rn(stored(c, 1, channel), value);
    }
};

template <class P, class Q, class U, class V, class B, int TAPS, int RING_COLUMNS, int CHANNELS, class Weight, class Ring,
          class Bias, class Shift>
__device__ __forceinline__ Convolution<P, Q, U, V, B, TAPS, RING_COLUMNS, CHANNELS, Weight, Ring, Bias, Shift> convolution(
    const Weight* __restrict__ weight, Ring* ring, const Bias* bias, const Shift* shift
) {
    return {weight, ring, bias, shift};
}
