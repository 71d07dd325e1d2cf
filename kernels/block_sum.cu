// The sum of BLOCKS blocks of rows, in their order, then the rest of the step: x [BLOCKS * rows, COLUMNS] -> y [rows, COLUMNS]. A thread
// has VECTOR adjacent columns of a row; `count` is the number of such in a block.

extern "C" __global__ void __launch_bounds__(THREADS) block_sum(PARAMS) {
    constexpr int BATCH = BLOCKS < 8 ? BLOCKS : 8;
    release_next();
    wait_for_previous();
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        i64 row = i / (COLUMNS / VECTOR);
        int column = (int)(i % (COLUMNS / VECTOR)) * VECTOR;
        float sum[VECTOR];
#pragma unroll 1
        for (int first = 0; first < BLOCKS; first += BATCH) {
            Pack<X, VECTOR> part[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                if (first + b < BLOCKS) part[b] = *(const Pack<X, VECTOR>*)(x + ((first + b) * (i64)count + i) * VECTOR);
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                if (first + b >= BLOCKS) break;
#pragma unroll
                for (int v = 0; v < VECTOR; v++) {
                    float addend = to_f32(part[b].at[v]);
                    sum[v] = first + b == 0 ? addend : __fadd_rn(sum[v], addend);
                }
            }
        }
        Pack<Y, VECTOR> out;
#pragma unroll
        for (int v = 0; v < VECTOR; v++) out.at[v] = from_f32<Y>(EPILOGUE(sum[v], 0.0f, row, column + v));
        *(Pack<Y, VECTOR>*)(y + row * COLUMNS + column) = out;
    }
}
