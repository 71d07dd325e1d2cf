// The last axis of x, COLUMNS long, cut into parts, each a tensor of its own. `place`, which is generated, tells where the
// elements of a row from a column on go; VECTOR divides every part and every block of them, so that a thread moves VECTOR
// at a time. Each element of x goes to one place.

extern "C" __global__ void __launch_bounds__(THREADS) split(PARAMS) {
    release_next();
    wait_for_previous();
    typedef Pack<T, VECTOR> Some;
    constexpr int PACKS = COLUMNS / VECTOR;
    i64 all = (i64)rows * PACKS, step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < all; i += step) {
        *(Some*)PLACE(i / PACKS, (int)(i % PACKS) * VECTOR) = *(const Some*)(x + i * VECTOR);
    }
}
