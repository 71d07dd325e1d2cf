// Makes the elements first..first + count of a synthetic tensor and writes them to their places in the weight `to`: the
// numbers of src/runtime/weights/synthetic.rs bit for bit, rounded to the tensor's type T and then to the weight's, W. See
// layout.cuh.

__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

// Integers are rounded towards zero.
template <class To> __device__ __forceinline__ To stored(float x) {
    if constexpr (SAME<To, int>) {
        return __float2int_rz(x);
    } else {
        return from_f32<To>(rounded<T>(x));
    }
}

struct Numbers {
    u64 key;
    i64 first;
    float center, scale;

    __device__ __forceinline__ bool aligned() const { return true; }

    __device__ __forceinline__ W one(i64 n) const {
        u64 bits = mix(key + (u64)(first + n + 1) * 0x9e3779b97f4a7c15);
        // Both exact: a multiple of 2^-23 in [-1, 1).
        float u = __fadd_rn(__fmul_rn((float)(u32)(bits >> 40), 0x1p-23f), -1.0f);
        return stored<W>(__fadd_rn(center, __fmul_rn(scale, u)));
    }

    __device__ __forceinline__ Pack<W, SOME> some(i64 n) const {
        Pack<W, SOME> out;
#pragma unroll
        for (int j = 0; j < SOME; j++) out.at[j] = one(n + j);
        return out;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) synthesize(PARAMS) {
    release_next();
    wait_for_previous();
    fill(to, first, count, Places{part, whole, run, stride, offset}, Numbers{(u64)key, first, center, scale});
}
