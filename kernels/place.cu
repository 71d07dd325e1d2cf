// Converts elements of a checkpoint tensor, `from[0..count]` being its elements first..first + count, and writes them to their
// places in the weight `to`: part of loading. Equal types keep their bits, others go through f32. See layout.cuh.

struct Read {
    const T* __restrict__ from;

    __device__ __forceinline__ bool aligned() const { return (u64)from % sizeof(Pack<T, SOME>) == 0; }

    __device__ __forceinline__ W one(i64 n) const { return converted<W>(from[n]); }

    __device__ __forceinline__ Pack<W, SOME> some(i64 n) const {
        Pack<T, SOME> in = *(const Pack<T, SOME>*)(from + n);
        Pack<W, SOME> out;
#pragma unroll
        for (int j = 0; j < SOME; j++) out.at[j] = converted<W>(in.at[j]);
        return out;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) place(PARAMS) {
    release_next();
    wait_for_previous();
    fill(to, first, count, Places{part, whole, run, stride, offset}, Read{from});
}
