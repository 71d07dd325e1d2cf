// Rotary embedding: x [rows, WIDTH] of heads of 2 * HALF elements to y of the same shape, each head rotated by its row's
// position. A thread takes pairs, one of each half of a head; no other thread touches them.

#include "rope.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) rope(PARAMS) {
    release_next();
    wait_for_previous();
    constexpr int PAIRS = WIDTH / 2;
    i64 count = (i64)rows * PAIRS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        i64 row = i / PAIRS;
        int pair = (int)(i % PAIRS), place = pair % HALF;
        i64 at = row * WIDTH + pair / HALF * (2 * HALF) + place;
        float sine, cosine;
        sincosf((float)pos[row] * FREQUENCIES[place], &sine, &cosine);
        float first = to_f32(x[at]), second = to_f32(x[at + HALF]);
        rotate_pair(first, second, cosine, sine);
        y[at] = from_f32<Y>(first);
        y[at + HALF] = from_f32<Y>(second);
    }
}
