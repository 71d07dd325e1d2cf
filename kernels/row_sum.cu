// The sum of each row in ascending order: x [rows, COLUMNS] -> y [rows, 1]. A thread has a row.

extern "C" __global__ void __launch_bounds__(THREADS) row_sum(PARAMS) {
    release_next();
    wait_for_previous();
    for (i64 row = (i64)blockIdx.x * THREADS + threadIdx.x; row < rows; row += (i64)gridDim.x * THREADS) {
        float sum = 0;
#pragma unroll 8
        for (int i = 0; i < COLUMNS; i++) sum = __fadd_rn(sum, to_f32(x[row * COLUMNS + i]));
        y[row] = from_f32<Y>(sum);
    }
}
