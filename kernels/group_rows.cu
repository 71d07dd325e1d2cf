// The stable sort of pairs by expert: experts [T, k] -> pairs [T * k], places [T, k], offsets [EXPERTS + 1], by one cluster of
// CLUSTER blocks; see group.cuh. With LOCAL experts are those of all ranks, and sorted are the pairs of this rank's, by their places
// LOCAL_OF(experts, pair) among these.
#include "group.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) group_rows(PARAMS) {
    extern __shared__ int scratch[];
    release_next();
    wait_for_previous();
#if LOCAL
    auto own = by_pair([=](int pair) { return LOCAL_OF(experts, pair); });
#else
    auto own = experts;
#endif
    group_pairs<EXPERTS, THREADS / WARP, CLUSTER>(own, count, pairs, places, offsets, scratch);
}
