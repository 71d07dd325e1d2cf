// The router of a mixture of experts: x [rows, K] -> (normalised x,) gate product, scores, the CHOSEN experts of each row and
// their weights (, and with GROUP the sort of all pairs by expert).
//
// A cluster of CLUSTER blocks has ROWS rows, each block a slice of SLICE elements of K for all experts: gate weights are read
// once a cluster, and before the wait. Then
// - with NORM, sums of squares of the slices are exchanged, and each block normalises its slice;
// - each block multiplies its slices of x and gate: in each of 4 interleaved parts of the slice a sum in order, by tensor
//   cores (MMA) or by threads, then the 4 sums in order; so that a row's bits depend on the row alone;
// - warps of all blocks take rows, add the blocks' partial products in order of the blocks, and select (route.cuh).
// - with GROUP there is one cluster, whose first block gets all choices and sorts them.
//
// Slices are staged in shared memory with zeros past K, the last row and the last expert. Rows are 16 bytes longer than the
// slice, so that 8 adjacent ones at one place lie in different banks.
#include "group.cuh"
#include "route.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int PARTS = 4;
constexpr int X_STRIDE = SLICE + 16 / sizeof(X);
constexpr int G_STRIDE = SLICE + 16 / sizeof(G);
constexpr int EXPERTS_UP = (EXPERTS + 15) / 16 * 16;
constexpr int P_STRIDE = EXPERTS_UP + 4;

struct Shared {
    alignas(16) X x[ROWS][X_STRIDE];
    alignas(16) G gate[EXPERTS_UP][G_STRIDE];
    // The product by parts, SPLIT of them each from its own tasks.
    alignas(16) float partial[SPLIT][ROWS][P_STRIDE];
    alignas(16) float bias[EXPERTS];
    alignas(16) Choices choices[WARPS];
#if NORM
    alignas(16) W norm[SLICE];
    alignas(16) float squares[ROWS];
#endif
#if GROUP
    alignas(16) int chosen[ROWS * CHOSEN];
    alignas(16) int scratch[group_scratch(EXPERTS, WARPS)];
#endif
};
static_assert(sizeof(Shared) <= SHARED);

// Starts copying the elements from `first` on of `valid` rows of K, and zeros for what is not there, up to `count` rows.
template <int VECTOR, int STRIDE, class T>
__device__ __forceinline__ void stage(T* to, const T* from, int count, int valid, int first) {
    constexpr int PACKS = SLICE / VECTOR;
    for (int i = threadIdx.x; i < count * PACKS; i += THREADS) {
        int row = i / PACKS, column = i % PACKS * VECTOR;
        bool there = row < valid && first + column < K;
        const T* source = there ? from + (i64)row * K + first + column : from;
        T* dest = to + row * STRIDE + column;
        if constexpr (VECTOR * sizeof(T) == 16) {
            copy_async(shared_address(dest), source, there);
        } else {
            Pack<T, VECTOR> pack = {};
            if (there) pack = *(const Pack<T, VECTOR>*)source;
            *(Pack<T, VECTOR>*)dest = pack;
        }
    }
}

// Eight adjacent elements of shared memory, 16-byte aligned.
__device__ __forceinline__ void load_8(float (&to)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        Quad q = *(const Quad*)(from + i);
#pragma unroll
        for (int j = 0; j < 4; j++) to[i + j] = __uint_as_float(q.at[j]);
    }
}
template <class T> __device__ __forceinline__ void load_8(float (&to)[8], const T* from) {
    Quad q = *(const Quad*)from;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        to[2 * j] = low<T>(q.at[j]);
        to[2 * j + 1] = high<T>(q.at[j]);
    }
}

#if MMA
// Tasks of 16 experts by 8 rows, with SPLIT = PARTS a part each, else all parts. A step is 32 elements of K.
__device__ __forceinline__ void multiply(Shared& s, int valid) {
    constexpr int STEPS = SLICE / 32, MINE = PARTS / SPLIT;
    int lane = lane_id(), tiles = (valid + 7) / 8 * (EXPERTS_UP / 16);
    for (int task = warp_id(); task < tiles * SPLIT; task += WARPS) {
        int part = task % SPLIT, e = task / SPLIT % (EXPERTS_UP / 16) * 16, r = task / SPLIT / (EXPERTS_UP / 16) * 8;
        float sum[MINE][4] = {};
        for (int base = part; base < STEPS; base += PARTS) {
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                int k = (base + i) * 32;
                if (base + i >= STEPS) break;
                u32 b[4], a[4];
                load_matrices(b, shared_address(&s.x[r + lane % 8][k + lane / 8 * 8]));
                load_matrices(a, shared_address(&s.gate[e + lane % 16][k + lane / 16 * 8]));
                mma<X>(sum[i], a, {b[0], b[1]});
                load_matrices(a, shared_address(&s.gate[e + lane % 16][k + 16 + lane / 16 * 8]));
                mma<X>(sum[i], a, {b[2], b[3]});
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float total = sum[0][j];
#pragma unroll
            for (int i = 1; i < MINE; i++) total += sum[i][j];
            s.partial[part][r + lane % 4 * 2 + j % 2][e + lane / 4 + j / 2 * 8] = total;
        }
    }
}
#else
// Tasks of TILE_E experts by TILE_R rows, far from each other so that adjacent threads have adjacent experts. A step is 8
// elements of K.
__device__ __forceinline__ void multiply(Shared& s, int valid) {
    constexpr int TILE_R = SPLIT == 1 ? 2 : 1, TILE_E = SPLIT == 1 ? 4 : 1;
    constexpr int ACROSS = EXPERTS_UP / TILE_E, DOWN = ROWS / TILE_R;
    for (int task = threadIdx.x; task < ACROSS * DOWN * SPLIT; task += THREADS) {
        int e = task % ACROSS, part = task / ACROSS % SPLIT, r = task / ACROSS / SPLIT;
        if (r >= valid) break;
        float total[TILE_R][TILE_E];
#pragma unroll 1
        for (int i = 0; i < PARTS / SPLIT; i++) {
            float sum[TILE_R][TILE_E] = {};
#pragma unroll 1
            for (int k = (part + i) * 8; k < SLICE; k += PARTS * 8) {
                float x[TILE_R][8];
#pragma unroll
                for (int m = 0; m < TILE_R; m++) load_8(x[m], &s.x[r + m * DOWN][k]);
#pragma unroll
                for (int n = 0; n < TILE_E; n++) {
                    float g[8];
                    load_8(g, &s.gate[e + n * ACROSS][k]);
#pragma unroll
                    for (int m = 0; m < TILE_R; m++) {
#pragma unroll
                        for (int v = 0; v < 8; v++) sum[m][n] = fmaf(x[m][v], g[v], sum[m][n]);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < TILE_R; m++) {
#pragma unroll
                for (int n = 0; n < TILE_E; n++) total[m][n] = i == 0 ? sum[m][n] : total[m][n] + sum[m][n];
            }
        }
#pragma unroll
        for (int m = 0; m < TILE_R; m++) {
#pragma unroll
            for (int n = 0; n < TILE_E; n++) s.partial[part][r + m * DOWN][e + n * ACROSS] = total[m][n];
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) router(PARAMS) {
    extern __shared__ Quad memory[];
    Shared& s = *(Shared*)memory;
    release_next();
    int warp = warp_id(), lane = lane_id();
    u32 rank = cluster_rank<CLUSTER>();
    int first = rank * SLICE;
    i64 row0 = (i64)(blockIdx.x / CLUSTER) * ROWS;
    int valid = rows - row0 < ROWS ? (int)(rows - row0) : ROWS;

    stage<G_VECTOR, G_STRIDE>(&s.gate[0][0], gate, EXPERTS_UP, EXPERTS, first);
#if NORM
    stage<W_VECTOR, SLICE>(s.norm, norm, 1, 1, first);
#endif
    copies_end_group();
    wait_for_previous();
    stage<X_VECTOR, X_STRIDE>(&s.x[0][0], x + row0 * K, ROWS, valid, first);
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) s.bias[e] = BIAS(e);
    copies_end_group();
    copies_wait<0>();
    __syncthreads();

#if NORM
    for (int row = warp; row < valid; row += WARPS) {
        float sum = 0;
        for (int k = lane * X_VECTOR; k < SLICE; k += WARP * X_VECTOR) {
            Pack<X, X_VECTOR> pack = *(const Pack<X, X_VECTOR>*)&s.x[row][k];
#pragma unroll
            for (int v = 0; v < X_VECTOR; v++) sum = fmaf(to_f32(pack.at[v]), to_f32(pack.at[v]), sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) s.squares[row] = sum;
    }
    cluster_sync_shared<CLUSTER>();
    for (int row = warp; row < valid; row += WARPS) {
        float sum = 0;
#pragma unroll
        for (u32 r = 0; r < CLUSTER; r++) sum += CLUSTER > 1 ? load_remote(&s.squares[row], r) : s.squares[row];
        float scale = 1.0f / sqrtf(sum / K + EPS);
        for (int k = lane * X_VECTOR; k < SLICE; k += WARP * X_VECTOR) {
            Pack<X, X_VECTOR> pack = *(const Pack<X, X_VECTOR>*)&s.x[row][k];
#pragma unroll
            for (int v = 0; v < X_VECTOR; v++) {
                float scaled = rounded<X>(__fmul_rn(to_f32(pack.at[v]), scale));
                pack.at[v] = from_f32<X>(__fmul_rn(scaled, to_f32(s.norm[k + v])));
            }
            *(Pack<X, X_VECTOR>*)&s.x[row][k] = pack;
#if NORM_OUT
            if (first + k < K) *(Pack<X, X_VECTOR>*)(normed + (row0 + row) * K + first + k) = pack;
#endif
        }
    }
    __syncthreads();
#endif

    multiply(s, valid);
    if constexpr (SPLIT > 1) {
        __syncthreads();
        for (int i = threadIdx.x; i < valid * EXPERTS; i += THREADS) {
            int row = i / EXPERTS, e = i % EXPERTS;
            float sum = s.partial[0][row][e];
#pragma unroll
            for (int part = 1; part < SPLIT; part++) sum += s.partial[part][row][e];
            s.partial[0][row][e] = sum;
        }
    }
    cluster_sync_shared<CLUSTER>();

    for (int row = warp * CLUSTER + rank; row < valid; row += WARPS * CLUSTER) {
        bool live = slot[row0 + row] >= 0;
        float logits[OF_LANE] = {}, biases[OF_LANE] = {};
#pragma unroll
        for (int i = 0; i < OF_LANE; i++) {
            int e = i * WARP + lane;
            if (e >= EXPERTS) continue;
            float part[CLUSTER];
#pragma unroll
            for (u32 r = 0; r < CLUSTER; r++) {
                part[r] = CLUSTER > 1 ? load_remote(&s.partial[0][row][e], r) : s.partial[0][row][e];
            }
            logits[i] = part[0];
#pragma unroll
            for (int r = 1; r < CLUSTER; r++) logits[i] += part[r];
            biases[i] = s.bias[e];
        }
        route(live, logits, biases, s.choices[warp], [&](int j, int expert, float weight) {
            i64 at = (row0 + row) * CHOSEN + j;
            weights[at] = weight;
#if EXPERTS_OUT
            experts[at] = expert;
#endif
#if GROUP
            if (CLUSTER > 1) {
                store_remote(&s.chosen[row * CHOSEN + j], 0, expert);
            } else {
                s.chosen[row * CHOSEN + j] = expert;
            }
#endif
        });
    }
    // The others have read this block's products, and the first has all choices.
#if !GROUP
    cluster_sync_shared<CLUSTER>();
#else
    cluster_sync<CLUSTER>();
    if (rank == 0) group_pairs<EXPERTS, WARPS, 1>(s.chosen, valid * CHOSEN, pairs, places, offsets, s.scratch);
#endif
}
