// Clusters of N blocks along x: their barrier, and each other's shared memory. A cluster of one needs no special launch.
#pragma once

#include "mma.cuh"

// Every thread of the cluster arrives, then waits: what any of them wrote before is then visible to all. Shared memory of
// another block may be touched after a first barrier and before a last one.
template <int N> __device__ __forceinline__ void cluster_arrive() {
    if constexpr (N > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
// Makes nothing visible, and so does not wait for global memory.
template <int N> __device__ __forceinline__ void cluster_arrive_relaxed() {
    if constexpr (N > 1) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
template <int N> __device__ __forceinline__ void cluster_wait() {
    if constexpr (N > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
template <int N> __device__ __forceinline__ void cluster_sync() {
    if constexpr (N > 1) {
        cluster_arrive<N>();
        cluster_wait<N>();
    } else {
        __syncthreads();
    }
}

// The block's position in its cluster.
template <int N> __device__ __forceinline__ u32 cluster_rank() { return N > 1 ? blockIdx.x % N : 0; }

// The address of another block's shared variable, from this block's own.
__device__ __forceinline__ u32 remote_address(const void* own, u32 rank) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    return address;
}

// Reads and writes of another block's variable, given this block's own.
__device__ __forceinline__ u32 load_remote(const u32* own, u32 rank) {
    u32 x;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(remote_address(own, rank)) : "memory");
    return x;
}
__device__ __forceinline__ int load_remote(const int* own, u32 rank) { return (int)load_remote((const u32*)own, rank); }
__device__ __forceinline__ float load_remote(const float* own, u32 rank) {
    return __uint_as_float(load_remote((const u32*)own, rank));
}
__device__ __forceinline__ u64 load_remote(const u64* own, u32 rank) {
    u64 x;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(x) : "r"(remote_address(own, rank)) : "memory");
    return x;
}
__device__ __forceinline__ void store_remote(int* own, u32 rank, int x) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote_address(own, rank)), "r"(x) : "memory");
}
__device__ __forceinline__ void store_remote(u64* own, u32 rank, u64 x) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote_address(own, rank)), "l"(x) : "memory");
}

// Starts a store to a remote address, which then counts its bytes on a barrier of the same block (bulk.cuh), given as a remote
// address too. That block must not end before.
__device__ __forceinline__ void send(u32 to, float x, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(x), "r"(barrier)
                 : "memory");
}

// The same of four numbers, to a multiple of sixteen bytes.
__device__ __forceinline__ void send_four(u32 to, const float* x, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(barrier)
                 : "memory");
}

// A barrier of all threads of the cluster. What they wrote to shared memory before it is visible after it; it orders nothing
// else, and so does not wait for global memory. The last thing that a block does with a cluster is a barrier, so that no block
// ends while another reads its shared memory.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n\t"
                 "barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait.acquire;" ::
                     : "memory");
}
// The same where a cluster may be of one block.
template <int N> __device__ __forceinline__ void cluster_sync_shared() {
    if constexpr (N > 1) {
        cluster_barrier();
    } else {
        __syncthreads();
    }
}
