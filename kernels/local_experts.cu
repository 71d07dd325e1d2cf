// Experts by their place among those that this rank has: chosen [rows, k] -> local [rows, k], -1 for no expert and for those of other
// ranks. `count` is rows * k. HAS(e) and BEFORE(e) are generated from sets of bits, one for 64 experts: whether the rank has expert e,
// and how many it has of those before it.

extern "C" __global__ void __launch_bounds__(THREADS) local_experts(PARAMS) {
    release_next();
    wait_for_previous();
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
        int expert = chosen[i];
        local[i] = (u32)expert < (u32)EXPERTS && HAS(expert) ? BEFORE(expert) : -1;
    }
}
