// An elementwise expression over operands that are broadcast to the result: `compute` is generated, and works on VECTOR
// adjacent elements.

extern "C" __global__ void __launch_bounds__(THREADS) pointwise(PARAMS) {
    release_next();
    wait_for_previous();
    i64 step = (i64)gridDim.x * THREADS * VECTOR;
    for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * VECTOR; i < count; i += step) COMPUTE(i);
}
