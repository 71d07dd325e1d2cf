// The stable sort of pairs by expert: experts [T, k] -> pairs [T * k], places [T, k], offsets [EXPERTS + 1], by one cluster of
// CLUSTER blocks; see group.cuh.
#include "group.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) group_rows(PARAMS) {
    extern __shared__ int scratch[];
    release_next();
    wait_for_previous();
    group_pairs<EXPERTS, THREADS / WARP, CLUSTER>(experts, count, pairs, places, offsets, scratch);
}
