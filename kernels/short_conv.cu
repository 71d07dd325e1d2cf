// A causal convolution of each channel over the rows of its sequence, whose earlier columns are in a ring for each slot:
//
//     y[t] = sum over taps of weight[tap] * u[t - (TAPS - 1 - tap)]      in the order of taps, in f32
//
// With GATED, x holds three parts of a row, u = first * second, and the result is gate * y; with BIASED, a bias is added to y
// before. Without, u is x and the result y. Each value is rounded to the type under which the step stores it. A column comes
// from the batch if the row so many before is of the same slot and of the right position, else from the ring, and is left out
// before position 0; of a row of no sequence all are. At the end the ring holds u of the batch's rows, of those that share a
// column the last one's.
//
// A thread has VECTOR adjacent channels and, along y, a strip of rows, which it goes through with the last u in registers.
//
// Races: rows of a slot are adjacent; call them a run. Only a run's rows read or write its slot's columns of the ring. The
// strip with a run's first row does, for its channels, all of the run's reading and then all of its writing, in one thread;
// rows of other strips that need the ring are left to it. All others read but x. In a run without gaps in its positions only
// the first TAPS - 1 rows may read the ring and only the last COLUMNS write it; in any other, every row is looked at.
// Each row of the result is written by the strip that it is in, or, if it needs the ring, by its run's.
//
// SINGLE: each sequence has one row, a strip is one row, and nothing has to be searched.

struct Floats {
    float at[VECTOR];
};

// What a row needs: bit b, from 1 on, says that the column b positions earlier is in the batch, b rows earlier.
constexpr u32 PADDING = 1;
// It needs the ring.
constexpr u32 CARRIED = 1u << 30;
// Its slot is not that of the row before.
constexpr u32 START = 1u << 31;

template <class T> __device__ __forceinline__ Floats floats(const Pack<T, VECTOR>& pack) {
    Floats x;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) x.at[j] = to_f32(pack.at[j]);
    return x;
}

template <class T> __device__ __forceinline__ Floats load(const T* from) {
    return floats(*(const Pack<T, VECTOR>*)from);
}

template <class T> __device__ __forceinline__ void store(T* to, const Floats& x) {
    Pack<T, VECTOR> pack;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) pack.at[j] = from_f32<T>(x.at[j]);
    *(Pack<T, VECTOR>*)to = pack;
}

__device__ __forceinline__ u32 describe(const int* pos, const int* slot, i64 row) {
    int s = slot[row], p = pos[row];
    u32 found = row == 0 || slot[row - 1] != s ? START : 0;
    if (s < 0 || p < 0) return found | PADDING;
#pragma unroll
    for (int back = 1; back < TAPS; back++) {
        bool here = back <= row && slot[row - back] == s && pos[row - back] == p - back;
        found |= here ? 1u << back : p >= back ? CARRIED : 0;
    }
    return found;
}

// What a row of x says about a thread's channels, as it is in memory.
struct Row {
#if GATED
    Pack<X, VECTOR> first, second, gate;

    __device__ __forceinline__ Floats u() const {
        Floats u, a = floats(first), b = floats(second);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) u.at[j] = rounded<U>(__fmul_rn(a.at[j], b.at[j]));
        return u;
    }
#else
    Pack<X, VECTOR> column;

    __device__ __forceinline__ Floats u() const { return floats(column); }
#endif
};

// What a thread works with: its channels and their weights.
struct Lane {
    const X* x;
    R* ring;
    Y* y;
    Floats weight[TAPS];
#if BIASED
    Floats bias;
#endif

    __device__ __forceinline__ Row row(i64 index) const {
        const X* from = x + index * X_COLUMNS;
        typedef const Pack<X, VECTOR>* Some;
#if GATED
        return Row{*(Some)(from + FIRST_AT), *(Some)(from + SECOND_AT), *(Some)(from + GATE_AT)};
#else
        return Row{*(Some)from};
#endif
    }

    __device__ __forceinline__ void add(Floats& sum, int tap, const Floats& u) const {
#pragma unroll
        for (int j = 0; j < VECTOR; j++) sum.at[j] = __fadd_rn(sum.at[j], __fmul_rn(weight[tap].at[j], u.at[j]));
    }

    __device__ __forceinline__ void finish(i64 index, Floats sum, const Row& now) const {
#if GATED
        Floats gate = floats(now.gate);
#endif
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            float value = rounded<V>(sum.at[j]);
#if BIASED
            value = rounded<B>(__fadd_rn(value, bias.at[j]));
#endif
#if GATED
            value = __fmul_rn(gate.at[j], value);
#endif
            sum.at[j] = value;
        }
        store(y + index * CHANNELS, sum);
    }

    __device__ __forceinline__ R* column(int slot, int position) const {
        return ring + ((i64)slot * COLUMNS + position % COLUMNS) * CHANNELS;
    }

    // A row that needs the ring; `found` describes it.
    __device__ __forceinline__ void carried(i64 index, u32 found, int slot, int position, const Row& now) const {
        Floats sum = {};
#pragma unroll
        for (int tap = 0; tap < TAPS - 1; tap++) {
            int back = TAPS - 1 - tap;
            if (found >> back & 1) {
                add(sum, tap, row(index - back).u());
            } else if (position >= back) {
                add(sum, tap, load(column(slot, position - back)));
            }
        }
        add(sum, TAPS - 1, now.u());
        finish(index, sum, now);
    }

    // What of a run first..end needs the ring, and then the update of the ring.
    __device__ void run(const int* pos, const int* slot, i64 first, i64 end) const {
        bool dense = (i64)pos[end - 1] - pos[first] == end - 1 - first;
        i64 readers = dense && end - first > TAPS - 1 ? first + TAPS - 1 : end;
        for (i64 i = first; i < readers; i++) {
            u32 found = describe(pos, slot, i);
            if (found & CARRIED) carried(i, found, slot[i], pos[i], row(i));
        }
        i64 writer = dense && end - first > COLUMNS ? end - COLUMNS : first;
        for (i64 i = writer; i < end; i++) {
            if (pos[i] >= 0) store(column(slot[i], pos[i]), row(i).u());
        }
    }
};

// The first row from `low` on whose slot is another, by a warp: 32 rows are looked at at a time, far apart and then closer.
__device__ __forceinline__ i64 end_of_run(const int* slot, int wanted, i64 low, i64 high) {
    while (low < high) {
        i64 step = (high - low + WARP - 1) / WARP, row = low + lane_id() * step;
        u32 same = __ballot_sync(ALL_LANES, row < high && slot[row] == wanted);
        // The lanes whose rows are of the run come first.
        int count = __popc(same);
        if (count == 0) return low;
        i64 next = low + count * step;
        low = next - step + 1;
        if (next < high) high = next;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(THREADS) short_conv(PARAMS) {
    release_next();
    int channel = (blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    bool active = channel < CHANNELS;
    if (active) prefetch(weight + (i64)channel * TAPS);
    wait_for_previous();

    Lane lane;
    lane.x = x + channel;
    lane.ring = ring + channel;
    lane.y = y + channel;
    if (active) {
#pragma unroll
        for (int pack = 0; pack < TAPS; pack++) {
            Floats some = load(weight + (i64)channel * TAPS + pack * VECTOR);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                constexpr int taps = TAPS;
                lane.weight[(pack * VECTOR + j) % taps].at[(pack * VECTOR + j) / taps] = some.at[j];
            }
        }
#if BIASED
        lane.bias = load(bias + channel);
#endif
    }

#if SINGLE
    i64 index = blockIdx.y;
    if (!active) return;
    int s = slot[index], p = pos[index];
    Row now = lane.row(index);
    if (s < 0 || p < 0) {
        lane.finish(index, Floats{}, now);
        return;
    }
    lane.carried(index, 0, s, p, now);
    store(lane.column(s, p), now.u());
#else
    // A strip has no more rows.
    __shared__ u32 states[32];
    __shared__ i64 tail;
    i64 first = (i64)blockIdx.y * strip;
    int count = rows - first < strip ? (int)(rows - first) : strip;
    // window[b - 1] is u of the row b before.
    Floats window[TAPS > 1 ? TAPS - 1 : 1] = {};
    Row now;
    if (active) {
        now = lane.row(first);
#pragma unroll
        for (int b = 1; b < TAPS; b++) {
            if (first >= b) window[b - 1] = lane.row(first - b).u();
        }
    }
    if (threadIdx.x < count) states[threadIdx.x] = describe(pos, slot, first + threadIdx.x);
    __syncthreads();
    // Where the last run of the strip ends, if it begins here.
    if (warp_id() == 0) {
        bool starts = lane_id() < count && states[lane_id()] & START;
        i64 end = first + count;
        int last = slot[end - 1];
        if (__any_sync(ALL_LANES, starts) && last >= 0) end = end_of_run(slot, last, end, rows);
        if (lane_id() == 0) tail = end;
    }
    __syncthreads();
    if (!active) return;

    for (int i = 0; i < count; i++) {
        // Asked for now, needed in the next turn.
        Row next = now;
        if (i + 1 < count) next = lane.row(first + i + 1);
        u32 found = states[i];
        Floats u = now.u();
        if (!(found & CARRIED)) {
            Floats sum = {};
#pragma unroll
            for (int tap = 0; tap < TAPS - 1; tap++) {
                if (found >> (TAPS - 1 - tap) & 1) lane.add(sum, tap, window[TAPS - 2 - tap]);
            }
            if (!(found & PADDING)) lane.add(sum, TAPS - 1, u);
            lane.finish(first + i, sum, now);
        }
#pragma unroll
        for (int b = TAPS - 2; b > 0; b--) window[b] = window[b - 1];
        window[0] = u;
        now = next;
    }
    for (int i = 0, end; i < count; i = end) {
        for (end = i + 1; end < count && !(states[end] & START);) end++;
        if (states[i] & START && slot[first + i] >= 0) lane.run(pos, slot, first + i, end < count ? first + end : tail);
    }
#endif
}
