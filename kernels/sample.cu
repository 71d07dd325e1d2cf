// Each row's next token from its logits [R, V], as the slot's parameters say: temperature, top-k, top-p, min-p, seed. -1 where
// the row is padding. The CPU's `runtime::sampling::choose` is the meaning; here it goes without sorting.
//
// A cluster of CLUSTER blocks has a row of logits, each thread every (CLUSTER * THREADS)-th pack of it. The most likely token
// is found first. Unless that is the choice, tokens of positive weight have places in order: (distance from the most likely
// in fixed point, descending logit, ascending index), the first coarser than the second so that it is even over the bins. All
// that the parameters ask for is where the sum of counts or of weights, in that order, reaches a number. `Search` finds it by
// digits of the place, from the highest: the cluster counts up tokens and weights by digit (BINS of them), until so few
// are left of the digit in question that they can be listed. The first digit's sums serve every search.
//
// Counts and weights are integers, so that no sum depends on its order. Blocks read each other's sums; what they read is
// written again only after two barriers of the cluster, as there are two of each, in turn.
#include "cluster.cuh"
#include "select.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int BINS = 256, DIGIT_BITS = 8, LIST = 128;
constexpr float ONE = 1099511627776.0f;
// Tokens further away than this have no weight: exp(-28) * 2^40 < 1. As a fixed-point number it is 2^32.
constexpr float FARTHEST = 28.0f, FIXED = 4294967296.0f / FARTHEST;
constexpr int TEMPERATURE = 0, TOP_K = 1, TOP_P = 2, MIN_P = 3, SEED = 4, COLUMNS = 8;

// Sums of all tokens before each bin, and in [BINS] through the last.
struct Sums {
    u64 weight[BINS + 1];
    u32 count[BINS + 1];
};

struct Token {
    u64 weight;
    // ranked(key, index): larger is earlier.
    u64 rank;
};

struct Shared {
    u64 best[CLUSTER];
    u64 total[CLUSTER];
    u64 of_warps[WARPS];
    u32 counts_of_warps[WARPS];
    // A block's own sums by bin: of weights in two halves, with carry.
    u32 low[2][BINS], high[2][BINS], count[2][BINS];
    Sums first, later;
    // A block's own tokens, and the cluster's.
    u32 listed[2];
    Token list[2][LIST];
    Token all[LIST];
    int bin;
    Token found;
};
static_assert(THREADS >= BINS);

// What a search is for: the first token through which the sum of counts, or of weights, reaches a number.
struct Target {
    u32 count;
    u64 weight;
    double share;

    __device__ __forceinline__ bool reached(u64 weights, u32 counts) const {
        return count ? counts >= count : weight ? weights >= weight : (double)weights >= share;
    }
};

struct Search {
    Shared& s;
    const L* logits;
    u32 rank;
    float largest, scale, divisor, reciprocal;
    // Which of the two sums, and of the lists, is next.
    int turn, list_turn;

    // Calls f(logit, index) for each of this thread's logits, of AHEAD packs loaded at a time.
    template <int AHEAD, class F> __device__ __forceinline__ void each(F f) const {
#pragma unroll AHEAD
        for (int i = rank * THREADS + threadIdx.x; i < V / VECTOR; i += CLUSTER * THREADS) {
            Pack<L, VECTOR> pack = *(const Pack<L, VECTOR>*)(logits + (i64)i * VECTOR);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) f(to_f32(pack.at[v]), (u32)(i * VECTOR + v));
        }
    }

    // (x - largest) / temperature, correctly rounded; NaN if it is very far below zero. The quotient is corrected twice by its
    // remainder: all threads share the divisor, so that its reciprocal is known.
    __device__ __forceinline__ float distance(float x) const {
        float a = (number(x) - largest) * scale;
        float q = a * reciprocal;
        q = fmaf(fmaf(-q, divisor, a), reciprocal, q);
        return fmaf(fmaf(-q, divisor, a), reciprocal, q);
    }
    __device__ __forceinline__ void divide_by(float temperature) {
        // Moved by a power of two to where the reciprocal is an ordinary number.
        scale = temperature < 0x1p-64f ? 0x1p64f : temperature > 0x1p64f ? 0x1p-64f : 1.0f;
        divisor = fminf(temperature, 0x1p127f) * scale;
        reciprocal = 1.0f / divisor;
    }
    __device__ __forceinline__ u64 weight(float distance) const {
        float w = expf(distance) * ONE;
        return w >= 1.0f ? (u64)w : 0;
    }

    // Calls f(weight, key, index, digit) for each of this thread's tokens that have weight and whose place begins with the
    // first `depth` digits of `place`; `digit` is the next.
    template <class F> __device__ __forceinline__ void each_in(const u32 (&place)[3], int depth, F f) const {
        u32 mask[3];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            int bits = min(max(depth * DIGIT_BITS - 32 * i, 0), 32);
            mask[i] = bits == 0 ? 0 : ~0u << (32 - bits);
        }
        int word = depth / 4, shift = 32 - DIGIT_BITS - depth % 4 * DIGIT_BITS;
        each<1>([&](float x, u32 index) {
            float d = distance(x);
            if (!(d > -FARTHEST)) return;
            u32 fixed = (u32)(-d * FIXED), key = ordered(x);
            if ((fixed ^ place[0]) & mask[0]) return;
            if (((~key ^ place[1]) & mask[1]) | ((index ^ place[2]) & mask[2])) return;
            u64 w = weight(d);
            if (w == 0) return;
            f(w, key, index, ((word == 0 ? fixed : word == 1 ? ~key : index) >> shift) % BINS);
        });
    }

    // Sums by the digit after the first `depth` of `place`, on top of what comes before.
    __device__ __forceinline__ void sum_up(Sums& to, const u32 (&place)[3], int depth, u64 weight_before, u32 count_before) {
        u32 *low = s.low[turn], *high = s.high[turn], *count = s.count[turn];
        int bin = threadIdx.x;
        if (bin < BINS) low[bin] = high[bin] = count[bin] = 0;
        __syncthreads();
        each_in(place, depth, [&](u64 w, u32, u32, u32 digit) {
            u32 lower = (u32)w, before = atomicAdd(&low[digit], lower);
            u32 upper = (u32)(w >> 32) + (before + lower < before);
            if (upper) atomicAdd(&high[digit], upper);
            atomicAdd(&count[digit], 1u);
        });
        cluster_sync<CLUSTER>();
        u64 weights = 0, own = 0;
        u32 counts = 0, own_count = 0;
        if (bin < BINS) {
#pragma unroll
            for (u32 r = 0; r < CLUSTER; r++) {
                bool far = CLUSTER > 1;
                u32 l = far ? load_remote(low + bin, r) : low[bin], h = far ? load_remote(high + bin, r) : high[bin];
                own += ((u64)h << 32) + l;
                own_count += far ? load_remote(count + bin, r) : count[bin];
            }
            weights = own;
            counts = own_count;
#pragma unroll
            for (int step = 1; step < (int)WARP; step *= 2) {
                u64 w = __shfl_up_sync(ALL_LANES, weights, step);
                u32 c = __shfl_up_sync(ALL_LANES, counts, step);
                if ((int)lane_id() >= step) weights += w, counts += c;
            }
            if (lane_id() == WARP - 1) s.of_warps[warp_id()] = weights, s.counts_of_warps[warp_id()] = counts;
        }
        __syncthreads();
        if (bin < BINS) {
            weights += weight_before;
            counts += count_before;
            for (u32 w = 0; w < warp_id(); w++) weights += s.of_warps[w], counts += s.counts_of_warps[w];
            to.weight[bin + 1] = weights;
            to.count[bin + 1] = counts;
            if (bin == 0) to.weight[0] = weight_before, to.count[0] = count_before;
        }
        __syncthreads();
        turn ^= 1;
    }

    // The bin in which the sums reach the target; they do in one.
    __device__ __forceinline__ int locate(const Sums& sums, const Target& target) {
        int bin = threadIdx.x;
        if (bin < BINS && target.reached(sums.weight[bin + 1], sums.count[bin + 1]) &&
            !target.reached(sums.weight[bin], sums.count[bin])) {
            s.bin = bin;
        }
        __syncthreads();
        return s.bin;
    }

    // The token with which the target is reached, and the sum of weights through it. s.first must be there.
    __device__ __forceinline__ Token find(Target target) {
        u32 place[3] = {};
        int bin = locate(s.first, target), depth = 1;
        const Sums* sums = &s.first;
        place[0] = (u32)bin << (32 - DIGIT_BITS);
        while (sums->count[bin + 1] - sums->count[bin] > LIST) {
            u64 weight_before = sums->weight[bin];
            u32 count_before = sums->count[bin];
            sum_up(s.later, place, depth, weight_before, count_before);
            sums = &s.later;
            bin = locate(s.later, target);
#pragma unroll
            for (int i = 0; i < 3; i++) {
                if (i == depth / 4) place[i] |= (u32)bin << (32 - DIGIT_BITS - depth % 4 * DIGIT_BITS);
            }
            depth++;
        }
        return find_listed(target, place, depth, sums->weight[bin], sums->count[bin]);
    }

    // The same among the tokens whose place begins with `depth` digits, no more than LIST.
    __device__ __forceinline__ Token find_listed(
        const Target& target, const u32 (&place)[3], int depth, u64 weight_before, u32 count_before
    ) {
        Token* list = s.list[list_turn];
        u32* listed = &s.listed[list_turn];
        if (threadIdx.x == 0) *listed = 0;
        __syncthreads();
        each_in(place, depth, [&](u64 w, u32 key, u32 index, u32) {
            list[atomicAdd(listed, 1u)] = Token{w, ranked(key, index)};
        });
        cluster_sync<CLUSTER>();
        u32 count = 0;
#pragma unroll
        for (u32 r = 0; r < CLUSTER; r++) {
            u32 n = CLUSTER > 1 ? load_remote(listed, r) : *listed;
            if (threadIdx.x < n) {
                Token* from = list + threadIdx.x;
                s.all[count + threadIdx.x] =
                    CLUSTER > 1 ? Token{load_remote(&from->weight, r), load_remote(&from->rank, r)} : *from;
            }
            count += n;
        }
        __syncthreads();
        if (threadIdx.x < count) {
            Token own = s.all[threadIdx.x];
            u64 weights = weight_before;
            u32 counts = count_before;
            for (u32 i = 0; i < count; i++) {
                Token other = s.all[i];
                if (other.rank > own.rank) weights += other.weight, counts++;
            }
            if (target.reached(weights + own.weight, counts + 1) && !target.reached(weights, counts)) {
                s.found = Token{weights + own.weight, own.rank};
            }
        }
        __syncthreads();
        list_turn ^= 1;
        return s.found;
    }

    // The sum over the cluster.
    __device__ __forceinline__ u64 cluster_total(u64 x) {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
        if (lane_id() == 0) s.of_warps[warp_id()] = x;
        __syncthreads();
        x = 0;
        for (int w = 0; w < WARPS; w++) x += s.of_warps[w];
        if constexpr (CLUSTER == 1) return x;
        if (threadIdx.x < CLUSTER) store_remote(&s.total[rank], threadIdx.x, x);
        cluster_sync<CLUSTER>();
        x = 0;
        for (int r = 0; r < CLUSTER; r++) x += s.total[r];
        return x;
    }

    // The choice, by a temperature above zero; `best` is the most likely.
    __device__ __forceinline__ u32 draw(const int* params, u32 best, u64 position) {
        u32 start[3] = {};
        sum_up(s.first, start, 0, 0, 0);
        u32 k = (u32)params[TOP_K];
        float top_p = __int_as_float(params[TOP_P]), min_p = __int_as_float(params[MIN_P]);
        u64 z = (u64)(u32)params[SEED] | (u64)(u32)params[SEED + 1] << 32;
        // What is left: all through this one, and their sum.
        Token kept = {s.first.weight[BINS], 0};
#pragma unroll 1
        for (int filter = TOP_K;; filter++) {
            Target target = {};
            if (filter == TOP_K) {
                if (k == 0 || k >= s.first.count[BINS]) continue;
                target.count = k;
            } else if (filter == TOP_P) {
                if (!(top_p < 1.0f)) continue;
                // The first token stays in any case.
                double share = (double)top_p * (double)kept.weight;
                target.share = share > 1.0 ? share : 1.0;
            } else {
                if (min_p > 0.0f) kept.weight = at_least((double)min_p * (double)ONE, best, kept.rank);
                target.weight = share_of(kept.weight, z, position) + 1;
            }
            kept = find(target);
            if (filter == MIN_P) return position_of(kept.rank);
        }
    }

    // The sum of the weights from `least` on, and of the best token, through the token of rank `last`.
    __device__ __forceinline__ u64 at_least(double least, u32 best, u64 last) {
        u64 sum = 0;
        each<1>([&](float x, u32 index) {
            float d = distance(x);
            if (!(d > -FARTHEST) || ranked(ordered(x), index) < last) return;
            u64 w = weight(d);
            if (index == best || (double)w >= least) sum += w;
        });
        return cluster_total(sum);
    }

    // A share of `total` by a uniform number of 24 bits: the finaliser of splitmix64, at that position of the seed's stream.
    __device__ __forceinline__ static u64 share_of(u64 total, u64 seed, u64 position) {
        u64 z = seed + (position + 1) * 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        z = (z ^ z >> 31) >> 40;
        return __umul64hi(z, total) << 40 | (z * total) >> 24;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(PARAMS) {
    __shared__ Shared s;
    release_next();
    cluster_arrive<CLUSTER>();
    wait_for_previous();
    u32 rank = cluster_rank<CLUSTER>();
    i64 at = blockIdx.x / CLUSTER;
    int row = rows[at], in_slot = row < 0 ? -1 : slot[row], position = row < 0 ? -1 : pos[row];
    if (in_slot < 0 || position < 0) {
        cluster_wait<CLUSTER>();
        if (rank == 0 && threadIdx.x == 0) next[at] = -1;
        return;
    }
    const int* params = sampling + (i64)in_slot * COLUMNS;
    float temperature = __int_as_float(params[TEMPERATURE]);
    Search search{s, logits + at * V, rank, 0, 0, 0, 0, 0, 0};
    u64 best = 0;
    search.each<2048 / THREADS>([&](float x, u32 index) {
        u64 own = ranked(ordered(x), index);
        best = own > best ? own : best;
    });
    best = warp_largest(best);
    if (lane_id() == 0) s.of_warps[warp_id()] = best;
    __syncthreads();
    best = warp_largest(lane_id() < WARPS ? s.of_warps[lane_id()] : 0);
    cluster_wait<CLUSTER>();
    if constexpr (CLUSTER > 1) {
        if (threadIdx.x < CLUSTER) store_remote(&s.best[rank], threadIdx.x, best);
        cluster_sync<CLUSTER>();
        best = warp_largest(lane_id() < CLUSTER ? s.best[lane_id()] : 0);
    }
    u32 token = position_of(best), key = (u32)(best >> 32);
    // The largest logit, back from its key.
    search.largest = __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
    bool finite = fabsf(search.largest) < INFINITE;
    if (temperature > 0 && finite) {
        search.divide_by(temperature);
        token = search.draw(params, token, position);
        // No block leaves before the others have read from it.
        cluster_sync<CLUSTER>();
    }
    if (rank == 0 && threadIdx.x == 0) next[at] = (int)token;
}
