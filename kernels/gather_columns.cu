// Elements of each row by column: x [rows, COLUMNS], columns [rows, CHOSEN] -> y [rows, CHOSEN]; zero where the column is
// negative. A thread has an element.

extern "C" __global__ void __launch_bounds__(THREADS) gather_columns(PARAMS) {
    release_next();
    wait_for_previous();
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        int column = columns[i];
        y[i] = from_f32<Y>(column < 0 ? 0.0f : to_f32(x[i / CHOSEN * COLUMNS + column]));
    }
}
