// y[r] = x[rows[r] / EACH], converted, zeros where the index is none of x: an embedding, a choice of rows, or tokens in the order of
// their experts, EACH of a token. Rows have COLUMNS elements; a thread moves VECTOR at a time, and no two threads the same.

extern "C" __global__ void __launch_bounds__(THREADS) gather_rows(PARAMS) {
    release_next();
    wait_for_previous();
    constexpr int PACKS = COLUMNS / VECTOR;
    i64 all = (i64)count * PACKS, step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < all; i += step) {
        int index = rows[i / PACKS], row = index < 0 ? index : index / EACH;
        Pack<Y, VECTOR> out;
        if ((u32)row < (u32)x_rows) {
            Pack<X, VECTOR> in = *(const Pack<X, VECTOR>*)(x + (i64)row * COLUMNS + i % PACKS * VECTOR);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) out.at[j] = converted<Y>(in.at[j]);
        } else {
#pragma unroll
            for (int j = 0; j < VECTOR; j++) out.at[j] = Y{};
        }
        *(Pack<Y, VECTOR>*)(y + i * VECTOR) = out;
    }
}
