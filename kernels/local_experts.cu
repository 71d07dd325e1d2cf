// Experts by their place among those that this rank has: chosen [rows, k] -> local [rows, k], -1 for no expert, for those of other
// ranks, and where it is another rank's turn to run one that several have. `count` is rows * k. LOCAL_OF(chosen, i) is generated, from
// sets of bits that are arguments; whose turn it is, the bits of a row's `weights [rows, k]` say.

extern "C" __global__ void __launch_bounds__(THREADS) local_experts(PARAMS) {
    release_next();
    wait_for_previous();
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) local[i] = LOCAL_OF(chosen, i);
}
