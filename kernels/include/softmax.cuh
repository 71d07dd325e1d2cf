// A tile of scores, 64 lines by KEYS positions, in the registers of a warpgroup, on its way to probabilities: what the running
// softmax does between the product with keys and that with values.
#pragma once

#include "attention.cuh"
#include "wgmma.cuh"

// Nothing that uses any of x moves across.
template <class X, int N> __device__ __forceinline__ void pin_all(X (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) pin(x[i]);
}

// Never stops for what is a sum of exponentials: all that makes x comes before what follows.
__device__ __forceinline__ void stop_if_negative(float x) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.lt.f32 p, %0, 0f00000000;\n\t@p trap;\n\t}" ::"f"(x) : "memory");
}

// Hides the scores of a tile's positions beyond a row's own, in the lane's lines `line` and `line` + 8, from what follows.
__device__ __forceinline__ void hide(float (&score)[KEYS / 2], int start, int line, const int* positions) {
    int limit[2];
#pragma unroll
    for (int h = 0; h < 2; h++) limit[h] = positions[min((line + h * 8) / SHARE, WG_ROWS - 1)] - start - (int)lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + i % 2 > limit[i / 2 % 2]) score[i] = -INFINITE;
}

// What a lane knows of its two lines: the largest score so far, and the sum of its columns' exponentials.
struct Lines {
    float most[2], total[2];

    // Takes a tile's scores in and makes exponentials of them; gives what earlier sums are to be multiplied by.
    __device__ __forceinline__ void take(float (&score)[KEYS / 2], float (&factor)[2]) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = -INFINITE, sum = 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(score[4 * n + 2 * h], score[4 * n + 2 * h + 1]));
            const float now = fmaxf(most[h], warp_max<4>(top) * SCALE), before = base_of(now);
            factor[h] = power_of_two(most[h] - before);
            most[h] = now;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 4 * n + 2 * h; i < 4 * n + 2 * h + 2; i++) {
                    score[i] = power_of_two(score[i] * SCALE - before);
                    sum += score[i];
                }
            }
            total[h] = total[h] * factor[h] + sum;
        }
    }
};

// Rounds a tile's exponentials: the accumulators of scores are laid out as the operand of the next product is.
__device__ __forceinline__ void round_all(u32 (&p)[KEYS / 16][4], const float (&score)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) p[i / 4][i % 4] = pair<T>(score[2 * i], score[2 * i + 1]);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) pin_all(p[step]);
}
