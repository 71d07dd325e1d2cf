// Blocks that form a cluster: barriers between them, and reading each other's shared memory.
#pragma once

#include "types.cuh"

// A barrier of all threads of the cluster. What they wrote to shared memory before it is visible after it; it orders nothing
// else, and so does not wait for global memory. The last thing that a block does with a cluster is a barrier, so that no block
// ends while another reads its shared memory.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n\t"
                 "barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait.acquire;" ::
                     : "memory");
}

// Reads what the block of this rank in the cluster has at the place of `local` in its own shared memory.
__device__ __forceinline__ float load_of_rank(const float* local, u32 rank) {
    u32 address = (u32)__cvta_generic_to_shared(local);
    float x;
    asm volatile("{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %1, %2;\n\t"
                 "ld.shared::cluster.f32 %0, [there];\n\t}"
                 : "=f"(x)
                 : "r"(address), "r"(rank)
                 : "memory");
    return x;
}
