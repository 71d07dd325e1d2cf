// Writes keys and values [rows, KV_HEADS * D] to the pages of their rows' slots: cache [pages, 2, KV_HEADS, PAGE, D], block
// table [slots, PAGES_PER_SLOT]. A thread takes VECTOR adjacent elements of a key and the same of the value. No two rows are
// of the same position of a slot, so that no element has two writers. Rows without a slot are left out.

#include "attention.cuh"

template <class X> __device__ __forceinline__ void convert(const X* from, KV* to) {
    Pack<X, VECTOR> x = *(const Pack<X, VECTOR>*)from;
    Pack<KV, VECTOR> out;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) out.at[e] = from_f32<KV>(to_f32(x.at[e]));
    *(Pack<KV, VECTOR>*)to = out;
}

extern "C" __global__ void __launch_bounds__(THREADS) kv_write(PARAMS) {
    release_next();
    wait_for_previous();
    constexpr int VECTORS = KV_HEADS * D / VECTOR;
    i64 count = (i64)rows * VECTORS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        i64 row = i / VECTORS;
        int column = (int)(i % VECTORS) * VECTOR;
        int position = pos[row], sequence = slot[row];
        if (position < 0 || sequence < 0) continue;
        int page = table[(i64)sequence * PAGES_PER_SLOT + position / PAGE];
        i64 to = keys_of<KV_HEADS, PAGE, D>(page, column / D) + (i64)(position % PAGE) * D + column % D;
        i64 from = row * (KV_HEADS * D) + column;
        convert(k + from, kv + to);
        convert(v + from, kv + to + values_after_keys<KV_HEADS, PAGE, D>());
    }
}
