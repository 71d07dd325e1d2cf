// Products by warpgroups of four warps with both operands in shared memory, and copies of tensors' boxes that put them there.
//
// Operands lie in rows of 64 elements of 16 bits, 128 bytes, of which eight make an atom of 1024 bytes, at multiples of that:
// chunk c of 16 bytes of row r lies at chunk c ^ (r % 8). A box copied with 128-byte swizzle lies so by itself.
#pragma once

#include "bulk.cuh"

// What the copy engine knows of a tensor, made by the driver.
struct alignas(128) TensorMap {
    u64 opaque[16];
};

// Arrives once all copies of sixteen bytes that the thread began (`copy_async`) are there: one of the barrier's arrivals.
__device__ __forceinline__ void barrier_arrive_copies(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts a copy of the box at these coordinates, innermost first, whose bytes arrive at the barrier. What lies outside of the
// tensor is zeros, and counts. What is read only ONCE need not stay in the L2 cache.
template <bool ONCE>
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int k, int row, int matrix, u64* barrier) {
    if constexpr (ONCE) {
        asm volatile("{\n\t.reg .b64 policy;\n\tcreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
                     "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%2, %3, %4}], [%5], policy;\n\t}" ::"r"(to),
                     "l"(map), "r"(k), "r"(row), "r"(matrix), "r"(shared_address(barrier))
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                     "l"(map), "r"(k), "r"(row), "r"(matrix), "r"(shared_address(barrier))
                     : "memory");
    }
}

// An operand for products: bits 0..13 are its address, 16..29 a step that this layout has no use for (1), 32..45 that from one
// atom to the next, all in sixteens of bytes; bits 62 and 63 say 128-byte swizzle (1). Sixteen elements further in a row are two
// sixteens of bytes further: the permutation is of address bits, so it holds for any start within an atom's first row.
__device__ __forceinline__ u64 operand(u32 address) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (u64)((address & 0x3ffff) >> 4);
}

// Orders what threads did to registers before the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of the groups of products begun are unfinished.
template <int N> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Nothing that uses x moves across.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// Gives registers of a warpgroup's threads away, or takes such.
template <int N> __device__ __forceinline__ void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Barriers of some of a block's warps, by number; 0 is the block's. Those that arrive go on at once, and what they wrote to memory
// is visible to those that sync, once so many threads have done one or the other.
__device__ __forceinline__ void warps_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void warps_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Stores four 8 x 8 matrices of 16-bit elements, transposed: where a lane has elements (g, 2t) and (g, 2t + 1) of matrix m in
// from[m], lane i gives the address of column i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices_transposed(u32 address, const u32 (&from)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}
