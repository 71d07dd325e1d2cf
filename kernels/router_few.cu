// The router of a mixture of experts for few rows: x [rows, K] -> (normalised x,) gate product, scores, the CHOSEN experts of each
// row and their weights (, and with GROUP the sort of all pairs by expert). Its time is that of a chain of dependent work, not of
// bytes, and this kernel makes the chain short.
//
// A cluster of CLUSTER blocks has ROWS rows. Each block has them whole and a share of the experts, OWN of them, so that nothing
// passes between blocks but logits. A thread has the same elements of every row and of every gate, which it keeps in
// registers: gates and norm weights from before the wait on.
// - With NORM, sums of squares are added up over lanes, then over warps, and the thread normalises what it has.
// - Products are added up in the same way, in a fixed order, so that a row's bits depend on the row alone.
// - Each logit is sent to the cluster's first block, where a warp takes a row and selects (route.cuh); with GROUP that block sorts.
//
// Sending is an asynchronous store that counts its bytes on a barrier of the block that receives it, so nobody else waits. The
// receiver makes the barrier and says how many bytes will come; then there is the one barrier of the whole cluster, before the kernel
// waits for the one before it. A sender may end at once: what it sends comes from its registers, and nobody touches its memory. The
// receiver cannot end before all bytes are there, because its choices wait for them.
//
// Generated: CLUSTER, ROWS, K, EXPERTS, CHOSEN, SHARED; X, G and W, the types of x, gate and norm weight; NORM, GROUP, NORM_OUT and
// EXPERTS_OUT, which say what there is; EPS, BIAS(e), SELECTION and WEIGHT.
#include "bulk.cuh"
#include "eight.cuh"
#include "group.cuh"
#include "route.cuh"

constexpr int WARPS = THREADS / WARP;
// Vectors of eight elements of a row, and those of a thread.
constexpr int VECTORS = K / 8, EACH = (VECTORS + THREADS - 1) / THREADS;
// Experts of a block; the last blocks may have fewer.
constexpr int OWN = (EXPERTS + CLUSTER - 1) / CLUSTER;
// Rows of a warp in the first block.
constexpr int TURNS = (ROWS + WARPS - 1) / WARPS;

constexpr int power_of_two(int least) {
    int n = 1;
    while (n < least) n *= 2;
    return n;
}
constexpr int SUMS = power_of_two(ROWS * OWN);

struct Shared {
    alignas(16) float sums[SUMS][WARPS];
    alignas(16) float squares[ROWS][WARPS];
    alignas(16) float logits[ROWS][EXPERTS];
    alignas(16) Choices choices[ROWS];
    alignas(16) u64 arrived;
#if GROUP
    alignas(16) int chosen[ROWS * CHOSEN];
    alignas(16) int scratch[group_scratch(EXPERTS, WARPS)];
#endif
};
static_assert(sizeof(Shared) <= SHARED);

// Adds up each of N numbers, a power of two, over the lanes of a warp, and puts the warp's sums into `to`. While there are several,
// a lane gives half of them to another, for the other half of that one's: half as many in each step.
template <int N> __device__ __forceinline__ void add_lanes(float (&x)[N], float (*to)[WARPS]) {
    const int lane = lane_id();
    int count = N;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        if (count == 1) {
            x[0] += __shfl_xor_sync(ALL_LANES, x[0], step);
            continue;
        }
        count /= 2;
        bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            if (i >= count) break;
            float kept = upper ? x[i + count] : x[i], given = upper ? x[i] : x[i + count];
            x[i] = kept + __shfl_xor_sync(ALL_LANES, given, step);
        }
    }
    constexpr int SAME_SUM = N < (int)WARP ? WARP / N : 1, HELD = N > (int)WARP ? N / WARP : 1;
    if (lane % SAME_SUM != 0) return;
#pragma unroll
    for (int i = 0; i < HELD; i++) to[lane / SAME_SUM * HELD + i][warp_id()] = x[i];
}

// The sum over the warps, whose number is a power of two.
__device__ __forceinline__ float add_warps(const float (&of_warps)[WARPS]) {
    float x[WARPS];
#pragma unroll
    for (int i = 0; i < WARPS; i++) x[i] = of_warps[i];
#pragma unroll
    for (int count = WARPS / 2; count > 0; count /= 2) {
#pragma unroll
        for (int i = 0; i < count; i++) x[i] += x[i + count];
    }
    return x[0];
}

// Whether there is a thread's vector of this position.
__device__ __forceinline__ bool is_vector(int vector) { return EACH * THREADS == VECTORS || vector < VECTORS; }

extern "C" __global__ void __launch_bounds__(THREADS) router_few(PARAMS) {
    extern __shared__ Quad memory[];
    Shared& s = *(Shared*)memory;
    release_next();
    const int warp = warp_id(), lane = lane_id(), rank = cluster_rank<CLUSTER>(), first = rank * OWN;
    const i64 row0 = (i64)(blockIdx.x / CLUSTER) * ROWS;
    const int valid = ROWS > 1 && rows - row0 < ROWS ? (int)(rows - row0) : ROWS;
    if (rank == 0 && threadIdx.x == 0) {
        barrier_make(&s.arrived, 1);
        barriers_made();
        barrier_expect(&s.arrived, valid * EXPERTS * sizeof(float));
    }
    cluster_arrive_relaxed<CLUSTER>();

    Eight<G> gates[OWN][EACH] = {};
#if NORM
    Eight<W> norms[EACH] = {};
#endif
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int vector = i * THREADS + threadIdx.x;
        if (!is_vector(vector)) break;
#pragma unroll
        for (int own = 0; own < OWN; own++)
            if (EXPERTS % CLUSTER == 0 || first + own < EXPERTS)
                gates[own][i] = fresh(gate + (i64)(first + own) * K + vector * 8);
#if NORM
        norms[i] = fresh(norm + vector * 8);
#endif
    }
    cluster_wait<CLUSTER>();
    wait_for_previous();
    Eight<X> of_x[ROWS][EACH] = {};
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int vector = i * THREADS + threadIdx.x;
            // There is a first row.
            if ((row == 0 || row < valid) && is_vector(vector)) of_x[row][i] = fresh(x + (row0 + row) * K + vector * 8);
        }
    }
    int slots[TURNS] = {};
    float biases[OF_LANE] = {};
    if (rank == 0) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int row = turn * WARPS + warp;
            if (row < valid) slots[turn] = slot[row0 + row];
        }
#pragma unroll
        for (int i = 0; i < OF_LANE; i++)
            if (i * (int)WARP + lane < EXPERTS) biases[i] = BIAS(i * WARP + lane);
    }

#if NORM
    float squares[ROWS] = {};
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
#pragma unroll
        for (int e = 0; e < EACH * 8; e++) {
            float element = of_x[row][e / 8].at(e % 8);
            squares[row] = fmaf(element, element, squares[row]);
        }
    }
    add_lanes(squares, s.squares);
    __syncthreads();
    // A lane has the root of one row.
    float scale_of_lane = 1.0f / sqrtf(add_warps(s.squares[lane % ROWS]) / K + EPS);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float scale = ROWS > 1 ? __shfl_sync(ALL_LANES, scale_of_lane, row) : scale_of_lane;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float values[8];
#pragma unroll
            for (int e = 0; e < 8; e++) values[e] = __fmul_rn(of_x[row][i].at(e), scale);
            of_x[row][i].set(values);
#pragma unroll
            for (int e = 0; e < 8; e++) values[e] = __fmul_rn(of_x[row][i].at(e), norms[i].at(e));
            of_x[row][i].set(values);
        }
    }
#endif

    float sums[SUMS] = {};
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            float& sum = sums[row * OWN + own];
#pragma unroll
            for (int e = 0; e < EACH * 8; e++) sum = fmaf(of_x[row][e / 8].at(e % 8), gates[own][e / 8].at(e % 8), sum);
        }
    }
    add_lanes(sums, s.sums);
    // What is to be known for sending is, before the barrier.
    constexpr int EACH_SENDS = (ROWS * OWN + THREADS - 1) / THREADS;
    u32 to[EACH_SENDS], barrier = remote_address(&s.arrived, 0);
    bool sends[EACH_SENDS];
#pragma unroll
    for (int i = 0; i < EACH_SENDS; i++) {
        u32 sum = i * THREADS + threadIdx.x;
        int row = sum / OWN, expert = first + sum % OWN;
        sends[i] = row < valid && expert < EXPERTS;
        to[i] = remote_address(&s.logits[row][expert], 0);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH_SENDS; i++)
        if (sends[i]) send(to[i], add_warps(s.sums[i * THREADS + threadIdx.x]), barrier);

#if NORM && NORM_OUT
    // Each block writes its share of what all have.
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        u32 vector = i * THREADS + threadIdx.x;
        if (vector >= VECTORS || vector * CLUSTER / VECTORS != (u32)rank) continue;
#pragma unroll
        for (int row = 0; row < ROWS; row++)
            if (row < valid) *(Eight<X>*)(normed + (row0 + row) * K + vector * 8) = of_x[row][i];
    }
#endif
    if (rank != 0) return;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int row = turn * WARPS + warp;
        if (row >= valid) break;
        barrier_wait_for_cluster(&s.arrived, 0);
        float logits[OF_LANE] = {};
#pragma unroll
        for (int i = 0; i < OF_LANE; i++)
            if (i * (int)WARP + lane < EXPERTS) logits[i] = s.logits[row][i * WARP + lane];
        route(slots[turn] >= 0, logits, biases, s.choices[row], [&](int j, int expert, float weight) {
            i64 at = (row0 + row) * CHOSEN + j;
            weights[at] = weight;
#if EXPERTS_OUT
            experts[at] = expert;
#endif
#if GROUP
            s.chosen[row * CHOSEN + j] = expert;
#endif
        });
    }
#if GROUP
    __syncthreads();
    if constexpr (ROWS * CHOSEN > (int)WARP) {
        group_pairs<EXPERTS, WARPS, 1>(s.chosen, valid * CHOSEN, pairs, places, offsets, s.scratch);
    } else if (warp == 0) {
        group_few_pairs<EXPERTS, ROWS * CHOSEN>(s.chosen, valid * CHOSEN, pairs, places, offsets);
    }
#endif
}
