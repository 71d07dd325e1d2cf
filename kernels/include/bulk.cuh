// Bulk copies from global into shared memory, and the barriers that they arrive on.
#pragma once

#include "mma.cuh"

// A barrier whose phases end when so many arrivals and the bytes announced are there. One thread makes a block's barriers,
// then all threads synchronise.
__device__ __forceinline__ void barrier_make(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the last of them: copies see them too.
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Between the thread's reads and writes of shared memory and what copies, and products by warpgroups, do with it afterwards.
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrives when the calling thread has read what copies will then write anew. They pass ordinary reads: a read that is still under way, behind
// those of another block, say, may otherwise find what was copied after an arrival that follows it.
__device__ __forceinline__ void barrier_arrive_after_reads(u64* barrier) {
    fence_for_copies();
    barrier_arrive(barrier);
}

// Arrives, and announces so many bytes.
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of phase 0, 1, 2, ... by whether that is odd. What was copied is then visible to the calling thread.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 odd) {
    u32 address = shared_address(barrier), done;
    do {
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done)
                     : "r"(address), "r"(odd)
                     : "memory");
    } while (!done);
}

// The same for what other blocks of the cluster sent (cluster.cuh).
__device__ __forceinline__ void barrier_wait_for_cluster(u64* barrier, u32 odd) {
    u32 address = shared_address(barrier), done;
    do {
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done)
                     : "r"(address), "r"(odd)
                     : "memory");
    } while (!done);
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// True in one lane, the same one each time, of a warp whose lanes all call it.
__device__ __forceinline__ bool elected() {
    u32 is;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(is));
    return is;
}

// Starts a copy of bytes, addresses and count of which sixteen divides. What is read only ONCE need not stay in the L2 cache.
template <bool ONCE> __device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
    if constexpr (ONCE) {
        asm volatile("{\n\t.reg .b64 policy;\n\tcreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
                     "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
                     "policy;\n\t}" ::"r"(shared_address(to)),
                     "l"(from), "r"(bytes), "r"(shared_address(barrier))
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to)),
                     "l"(from), "r"(bytes), "r"(shared_address(barrier))
                     : "memory");
    }
}

// Takes the next number of a counter in global memory, which goes from `last` to 0 again.
__device__ __forceinline__ u32 claim(int* counter, u32 last) {
    u32 number;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(number) : "l"(counter), "r"(last) : "memory");
    return number;
}
