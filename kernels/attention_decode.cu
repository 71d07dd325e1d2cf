// Attention of each row over the positions of its slot, the positions dealt out over the blocks of a cluster: cache
// [pages, 2, KV_HEADS, PAGE, D], block table [slots, PAGES_PER_SLOT], y [rows, HEADS * D]; zeros in rows without a slot.
//
// With FUSED, queries and keys are first normalised by heads and rotated, and key and value of the row's own position go to the
// cache. Then no two rows are of one slot: the own position is taken from shared memory and is the only one written, and no
// block reads it from the cache.
//
// A cluster takes SHARE query heads of one KV head of a row. Chunks of CHUNK positions go to its blocks in turn. In a block,
// groups of LANES lanes take positions of a chunk, STEP at a time, each lane VEC adjacent elements of a head; keys and values
// are loaded once for all SHARE heads, the next chunk's while this one's are worked on. Each group keeps a maximum, a sum and
// a sum of values; those of a block are combined in the order of groups, those of a cluster in the order of ranks, each output
// by one thread. The order depends on the row's position alone.

#include "attention.cuh"
#include "cluster.cuh"
#ifdef FUSED
#include "rope.cuh"
#endif

constexpr int TEAMS = THREADS / LANES, CHUNK = TEAMS * STEP, STRIDE = CHUNK * CLUSTER, SHARES = GROUP / SHARE;
constexpr int VECTORS = D / VEC, SPANS = (VECTORS + LANES - 1) / LANES, WIDTH = SPANS * VEC;
constexpr int LOOKUPS = PAGE % CHUNK == 0 ? 1 : STEP;
constexpr int WIDE = VEC < 4 ? VEC : 4;

extern __shared__ float shared[];

// Offsets in shared memory, what is loaded as vectors first: sums of values of each group [TEAMS, SHARE, D]; queries [SHARE, D]
// and key and value of the own position [D] in f32; the block's sums of values [SHARE, D]; maxima and sums of each group
// [TEAMS, SHARE] and of the block [SHARE].
constexpr int TEAM_VALUES = 0, QUERIES = TEAM_VALUES + TEAMS * SHARE * D, OWN_KEY = QUERIES + SHARE * D, OWN_VALUE = OWN_KEY + D;
constexpr int VALUES = OWN_VALUE + D, TEAM_MAX = VALUES + SHARE * D, TEAM_TOTAL = TEAM_MAX + TEAMS * SHARE;
constexpr int MAX = TEAM_TOTAL + TEAMS * SHARE, TOTAL = MAX + SHARE;

// This lane's elements of a head in f32, zeros beyond its end.
template <class T> __device__ __forceinline__ void load_head(float (&to)[WIDTH], const T* head, int lane) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += WIDE) {
        int vector = i / VEC * LANES + lane;
        Pack<T, WIDE> part{};
        if (vector < VECTORS) part = *(const Pack<T, WIDE>*)(head + vector * VEC + i % VEC);
#pragma unroll
        for (int e = 0; e < WIDE; e++) to[i + e] = to_f32(part.at[e]);
    }
}

__device__ __forceinline__ float product(const float (&query)[WIDTH], const float (&key)[WIDTH]) {
    float dot = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) dot += query[i] * key[i];
    return warp_sum<LANES>(dot);
}

__device__ __forceinline__ void widen(float (&to)[WIDTH], const Words<KV, VEC> (&from)[SPANS]) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) to[i] = element<KV, VEC>(from[i / VEC], i % VEC);
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_decode(PARAMS) {
    release_next();
    constexpr int UNITS = KV_HEADS * SHARES;
    int rank = blockIdx.x % CLUSTER, work = blockIdx.x / CLUSTER;
    int row = work / UNITS, unit = work % UNITS, kv_head = unit / SHARES, first_head = kv_head * GROUP + unit % SHARES * SHARE;
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
#ifdef FUSED
    typedef Halves<HALF, 32, E> Head;
    Head q_scale, k_scale;
    q_scale.load(q_weight, lane_id());
    k_scale.load(k_weight, lane_id());
    float frequencies[Head::SPANS * E];
#pragma unroll
    for (int i = 0; i < Head::SPANS * E; i++) {
        int at = Head::place(i / E, lane_id()) + i % E;
        frequencies[i] = at < HALF ? FREQUENCIES[at] : 0.0f;
    }
#endif
    // What lies in the cache is there before the step began, but for what a step before may have written.
    if (!early) wait_for_previous();
    int position = load_early(pos + row), sequence = load_early(slot + row);
    bool live = position >= 0 && sequence >= 0;
#ifdef FUSED
    int cached = live ? position : 0;
#else
    int cached = live ? position + 1 : 0;
#endif
    const int* pages = table + (i64)(live ? sequence : 0) * PAGES_PER_SLOT;

    int page[LOOKUPS];
    auto look_up = [&](int start) {
#pragma unroll
        for (int j = 0; j < LOOKUPS; j++) {
            int at = LOOKUPS == 1 ? start : start + j * TEAMS + team;
            page[j] = at < cached ? load_early(pages + at / PAGE) : 0;
        }
    };
    // Keys or values of this group's positions of a chunk whose pages have been looked up; zeros beyond the last position.
    auto load = [&](Words<KV, VEC> (&to)[STEP][SPANS], int start, i64 offset) {
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            int at = start + j * TEAMS + team;
            const KV* head = kv + offset + keys_of<KV_HEADS, PAGE, D>(page[LOOKUPS == 1 ? 0 : j], kv_head) + at % PAGE * D;
#pragma unroll
            for (int span = 0; span < SPANS; span++) {
                int vector = span * LANES + lane;
                to[j][span] = Words<KV, VEC>{};
                if (at < cached && vector < VECTORS) to[j][span] = *(const Words<KV, VEC>*)(head + vector * VEC);
            }
        }
    };
    constexpr i64 AFTER = values_after_keys<KV_HEADS, PAGE, D>();

#ifdef FUSED
    int own_page = live && rank == 0 ? load_early(pages + position / PAGE) : 0;
#endif
    int start = rank * CHUNK;
    Words<KV, VEC> keys[STEP][SPANS], values[STEP][SPANS];
    look_up(start);
    load(keys, start, 0);
    load(values, start, AFTER);
    look_up(start + STRIDE);

    wait_for_previous();
#ifdef FUSED
    // Warps take the query heads, then key and value, which the first block of the cluster alone needs.
    constexpr int WARPS = THREADS / 32, TURNS = (SHARE + 2 + WARPS - 1) / WARPS;
    int needed = rank == 0 ? SHARE + 2 : SHARE;
    Head raw[TURNS];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int head = turn * WARPS + warp_id();
        if (head < SHARE) {
            raw[turn].load(q_in + (i64)row * Q_STRIDE + Q_AT + (first_head + head) * D, lane_id());
        } else if (head == SHARE && head < needed) {
            raw[turn].load(k_in + (i64)row * K_STRIDE + K_AT + kv_head * D, lane_id());
        } else if (head < needed) {
            raw[turn].load(v_in + (i64)row * V_STRIDE + V_AT + kv_head * D, lane_id());
        } else {
            raw[turn] = Head{};
        }
    }
#endif

    float query[SHARE][WIDTH], most[SHARE], total[SHARE], sums[SHARE][WIDTH];
#ifdef FUSED
    Head angles;
#pragma unroll
    for (int i = 0; i < Head::SPANS * E; i++) sincosf((float)position * frequencies[i], &angles.y[i], &angles.x[i]);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int head = turn * WARPS + warp_id();
        if (head >= needed) continue;
        float squares = raw[turn].squares();
        if (head < SHARE) {
            raw[turn].normalise<XQ, NQ>(squares, Q_EPS, q_scale);
            raw[turn].rotate<RQ>(angles);
            raw[turn].store(shared + QUERIES + head * D, lane_id());
            continue;
        }
        if (head == SHARE) {
            raw[turn].normalise<XK, NK>(squares, K_EPS, k_scale);
            raw[turn].rotate<RK>(angles);
        }
        // As the cache holds them.
#pragma unroll
        for (int i = 0; i < Head::SPANS * E; i++) {
            raw[turn].x[i] = rounded<KV>(raw[turn].x[i]);
            raw[turn].y[i] = rounded<KV>(raw[turn].y[i]);
        }
        raw[turn].store(shared + (head == SHARE ? OWN_KEY : OWN_VALUE), lane_id());
        if (live && unit % SHARES == 0) {
            i64 to = keys_of<KV_HEADS, PAGE, D>(own_page, kv_head) + (i64)(position % PAGE) * D;
            raw[turn].store(kv + to + (head == SHARE ? 0 : AFTER), lane_id());
        }
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < SHARE; g++) load_head(query[g], shared + QUERIES + g * D, lane);
    // The own position is the first that the first group of the first block has seen.
    float own_key[WIDTH] = {}, own_value[WIDTH] = {};
    if (rank == 0) {
        load_head(own_key, shared + OWN_KEY, lane);
        load_head(own_value, shared + OWN_VALUE, lane);
    }
    bool own = rank == 0 && team == 0 && live;
#pragma unroll
    for (int g = 0; g < SHARE; g++) {
        float score = product(query[g], own_key) * SCALE;
        most[g] = own ? score : -INFINITE;
        total[g] = own ? 1.0f : 0.0f;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums[g][i] = own ? own_value[i] : 0.0f;
    }
#else
#pragma unroll
    for (int g = 0; g < SHARE; g++) {
        load_head(query[g], q + (i64)row * (HEADS * D) + (first_head + g) * D, lane);
        most[g] = -INFINITE;
        total[g] = 0;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums[g][i] = 0;
    }
#endif

    for (; start < cached; start += STRIDE) {
        float score[STEP][SHARE], wide[WIDTH];
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            widen(wide, keys[j]);
            bool known = start + j * TEAMS + team < cached;
#pragma unroll
            for (int g = 0; g < SHARE; g++) {
                float dot = product(query[g], wide);
                score[j][g] = known ? dot * SCALE : -INFINITE;
            }
        }
        load(keys, start + STRIDE, 0);
#pragma unroll
        for (int g = 0; g < SHARE; g++) {
            float now = most[g];
#pragma unroll
            for (int j = 0; j < STEP; j++) now = fmaxf(now, score[j][g]);
            float base = base_of(now), factor = power_of_two(most[g] - base);
            most[g] = now;
            total[g] *= factor;
#pragma unroll
            for (int j = 0; j < STEP; j++) {
                score[j][g] = power_of_two(score[j][g] - base);
                total[g] += score[j][g];
            }
#pragma unroll
            for (int i = 0; i < WIDTH; i++) sums[g][i] *= factor;
        }
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            widen(wide, values[j]);
#pragma unroll
            for (int g = 0; g < SHARE; g++) {
#pragma unroll
                for (int i = 0; i < WIDTH; i++) sums[g][i] += score[j][g] * wide[i];
            }
        }
        load(values, start + STRIDE, AFTER);
        look_up(start + 2 * STRIDE);
    }

#pragma unroll
    for (int g = 0; g < SHARE; g++) {
        int at = team * SHARE + g;
        if (lane == 0) {
            shared[TEAM_MAX + at] = most[g];
            shared[TEAM_TOTAL + at] = total[g];
        }
#pragma unroll
        for (int i = 0; i < WIDTH; i += WIDE) {
            int vector = i / VEC * LANES + lane;
            Pack<float, WIDE> out;
#pragma unroll
            for (int e = 0; e < WIDE; e++) out.at[e] = sums[g][i + e];
            if (vector < VECTORS) *(Pack<float, WIDE>*)(shared + TEAM_VALUES + at * D + vector * VEC + i % VEC) = out;
        }
    }
    __syncthreads();
    i64 result = (i64)row * (HEADS * D) + first_head * D;
    for (int i = threadIdx.x; i < SHARE * D; i += THREADS) {
        int g = i / D;
        float largest = -INFINITE, all = 0, sum = 0;
#pragma unroll 8
        for (int t = 0; t < TEAMS; t++) largest = fmaxf(largest, shared[TEAM_MAX + t * SHARE + g]);
        float base = base_of(largest);
#pragma unroll 8
        for (int t = 0; t < TEAMS; t++) {
            float factor = power_of_two(shared[TEAM_MAX + t * SHARE + g] - base);
            all += factor * shared[TEAM_TOTAL + t * SHARE + g];
            sum += factor * shared[TEAM_VALUES + t * SHARE * D + i];
        }
        if constexpr (CLUSTER == 1) {
            y[result + i] = from_f32<Y>(live ? sum / all : 0.0f);
        } else {
            shared[VALUES + i] = sum;
            if (i % D == 0) {
                shared[MAX + g] = largest;
                shared[TOTAL + g] = all;
            }
        }
    }
    if constexpr (CLUSTER > 1) {
        cluster_barrier();
        for (int i = rank * THREADS + threadIdx.x; i < SHARE * D; i += CLUSTER * THREADS) {
            float maxima[CLUSTER], totals[CLUSTER], parts[CLUSTER], largest = -INFINITE, all = 0, sum = 0;
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                maxima[r] = load_remote(shared + MAX + i / D, r);
                totals[r] = load_remote(shared + TOTAL + i / D, r);
                parts[r] = load_remote(shared + VALUES + i, r);
            }
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) largest = fmaxf(largest, maxima[r]);
            float base = base_of(largest);
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                float factor = power_of_two(maxima[r] - base);
                all += factor * totals[r];
                sum += factor * parts[r];
            }
            y[result + i] = from_f32<Y>(live ? sum / all : 0.0f);
        }
        cluster_barrier();
    }
}
