// Puts the elements first..first + count of a checkpoint tensor, of type T and adjacent in `from`, into their places in the weight
// `to`, as elements of the weight's type W. See layout.cuh.

struct Stored {
    const T* from;

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

// Nothing is released early: what comes next in the stream overwrites `from`. Eight blocks fill a multiprocessor.
extern "C" __global__ void __launch_bounds__(THREADS, 8) place(PARAMS) {
    wait_for_previous();
    fill(to, first, count, Places{part, whole, run, stride, offset}, Stored{from});
}
