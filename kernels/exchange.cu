// Exchanges parts of memory with the other ranks, each on a GPU of its own, in one launch: each rank writes what it has for another
// into that one's memory, over the link between the two GPUs, and takes from its own memory what the others wrote there. Nothing is
// read over the link. An area is laid out as src/plan/exchange.rs says.
//
// Generated: RANKS, PARTS, HEADER_BYTES, STOP, PACKET_BYTES, MOST_BLOCKS; PEERS, the areas of the other ranks, from the one after this
// on; LISTED, a Part for each part.
//
//     epoch = the number of the exchange, which is the same on all ranks
//     for each packet of mine:  write its data, with the epoch beside it, to the slots that the others have for me; copy my own
//     for each packet of theirs: look at it in my area until it has the epoch; copy its data to where it belongs
//
// A packet is two words of 64 bits: data in the lower half of each, the epoch in the upper. A word is written and read in one piece,
// so who sees the epoch has the data, and nothing else orders the two: no fence, no flag, no barrier. That doubles the bytes, and
// takes one way over the link and no more.
//
// Exchanges of many bytes are `wide`: packets are all data. A block writes its packets, and then the epoch as a flag, which a fence
// keeps behind them; the block of the same number on the other side waits for that flag. That takes a second way over the link. Both
// sides have the same number of blocks then. The two kinds have slots of their own, since data may look like an epoch.
//
// Why a word is not written again before it was read. All ranks run the same exchanges in the same order, each as one launch, and of
// two launches of a rank the second begins when the first is done (`wait_for_previous`). In every exchange each rank receives at least
// one word from every other (parts are never empty). Exchange n uses half n % 2 of the areas. Let rank A run n + 2, and write to a word
// of B's that n used. A's launch n + 1 is done, so A has read words that B wrote in its launch n + 1. So that had begun, so B's launch
// n was done, in which B read all that A wrote in n. By the same argument B reads no word of n + 2 in place of one of n: it looks for
// the epoch n, finds it or what was there before, and the latter is of another epoch: epochs of a half differ by 2 or more.
//
// Blocks of a rank do not wait for each other, and wait only for threads of other ranks which write before they wait. So all that is
// needed is that a rank's blocks run at once: the runtime launches no more than fit.
//
// Epochs are counted in the area, because a captured launch is always the same: the last block to have read the number counts it up.
// It goes from 2^32 - 1 to 2, as memory that was never written holds 0, and because halves take turns. A word would be mistaken that no
// exchange has written for exactly 2^32 - 2 exchanges; others of the same half would have to leave it out all the time.

struct Part {
    i64 from, to, bytes;
};

// What a packet has of a part's block: bytes from `at` on, as far as the block goes.
struct Piece {
    i64 from, to, bytes, at;

    __device__ __forceinline__ i64 left() const { return bytes - at; }
};

template <int DATA> __device__ __forceinline__ i64 packets(const Part& part) { return (part.bytes + DATA - 1) / DATA; }

template <int DATA> __device__ __forceinline__ i64 packets(const Part (&parts)[PARTS]) {
    i64 sum = 0;
#pragma unroll
    for (int j = 0; j < PARTS; j++) sum += packets<DATA>(parts[j]);
    return sum;
}

// Packet n of all parts, one after the other, where a packet has so many bytes of data.
template <int DATA> __device__ __forceinline__ Piece piece(const Part (&parts)[PARTS], i64 n) {
    Piece found = {};
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        i64 count = packets<DATA>(parts[j]);
        if (n >= 0 && n < count) found = {parts[j].from, parts[j].to, parts[j].bytes, n * DATA};
        n -= count;
    }
    return found;
}

// Eight bytes in the kind of packet that has eight, sixteen in the other.
template <int DATA> struct Data {
    u64 words[DATA / 8];
};

// Data at this address, of which `left` bytes, an even number, are the block's. Elements are of two bytes or more.
template <int DATA> __device__ __forceinline__ Data<DATA> take(i64 from, i64 left) {
    Data<DATA> data = {};
    if (left >= DATA && from % DATA == 0) {
        if constexpr (DATA == 8) asm volatile("ld.global.u64 %0, [%1];" : "=l"(data.words[0]) : "l"(from) : "memory");
        else
            asm volatile("ld.global.v2.u64 {%0, %1}, [%2];" : "=l"(data.words[0]), "=l"(data.words[DATA / 8 - 1]) : "l"(from) : "memory");
        return data;
    }
#pragma unroll
    for (int i = 0; i < DATA / 2; i++) {
        if (i * 2 >= left) break;
        u16 some;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(some) : "l"(from + i * 2) : "memory");
        data.words[i / 4] |= (u64)some << i % 4 * 16;
    }
    return data;
}

template <int DATA> __device__ __forceinline__ void put(i64 to, i64 left, const Data<DATA>& data) {
    if (left >= DATA && to % DATA == 0) {
        if constexpr (DATA == 8) asm volatile("st.global.u64 [%0], %1;" ::"l"(to), "l"(data.words[0]) : "memory");
        else
            asm volatile("st.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(data.words[0]), "l"(data.words[DATA / 8 - 1]) : "memory");
        return;
    }
#pragma unroll
    for (int i = 0; i < DATA / 2; i++) {
        if (i * 2 >= left) break;
        asm volatile("st.global.u16 [%0], %1;" ::"l"(to + i * 2), "h"((u16)(data.words[i / 4] >> i % 4 * 16)) : "memory");
    }
}

__device__ __forceinline__ u32 load_now(i64 from) {
    u32 x;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// Waits are given up where the host says that another rank is no more.
__device__ __forceinline__ bool given_up(u32 looks, i64 stop) {
    constexpr u32 LOOKS = 1 << 12;
    return looks % LOOKS == 0 && load_now(stop) != 0;
}

// Packets that have the epoch in them.
struct Tagged {
    static constexpr int DATA = PACKET_BYTES / 2;

    __device__ __forceinline__ static void send(i64 to, const Data<DATA>& data, u32 epoch) {
        u64 tag = (u64)epoch << 32, low = tag | (u32)data.words[0], high = tag | data.words[0] >> 32;
        asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high) : "memory");
    }

    // Waits for a packet; false if that was given up.
    __device__ __forceinline__ static bool receive(i64 from, u32 epoch, i64 stop, Data<DATA>& data) {
        for (u32 looks = 1;; looks++) {
            u64 low, high;
            asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from) : "memory");
            if ((u32)(low >> 32) == epoch && (u32)(high >> 32) == epoch) {
                data.words[0] = (u32)low | high << 32;
                return true;
            }
            if (given_up(looks, stop)) return false;
        }
    }
};

// Packets behind a flag.
struct Wide {
    static constexpr int DATA = PACKET_BYTES;

    __device__ __forceinline__ static void send(i64 to, const Data<DATA>& data, u32) {
        asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(data.words[0]), "l"(data.words[1]) : "memory");
    }

    // What a flag says is there.
    __device__ __forceinline__ static bool receive(i64 from, u32, i64, Data<DATA>& data) {
        asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(data.words[0]), "=l"(data.words[1]) : "l"(from) : "memory");
        return true;
    }
};

// This block's flag of a slot.
__device__ __forceinline__ i64 flag(i64 area, u32 epoch, int slot) {
    return area + HEADER_BYTES + (((epoch & 1) * (RANKS - 1) + slot) * (i64)MOST_BLOCKS + blockIdx.x) * 4;
}

// All threads of a block have written their packets: tells the others.
__device__ __forceinline__ void raise_flags(const i64 (&peers)[RANKS - 1], u32 epoch) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("fence.acq_rel.sys;" ::: "memory");
#pragma unroll
        for (int i = 0; i < RANKS - 1; i++)
            asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag(peers[i], epoch, RANKS - 2 - i)), "r"(epoch) : "memory");
    }
}

// Waits for the flags of this block's slots; false if that was given up. `answer` is of the block.
__device__ __forceinline__ bool wait_for_flags(i64 own, u32 epoch, u32* answer) {
    if (threadIdx.x == 0) {
        bool there = true;
#pragma unroll
        for (int i = 0; i < RANKS - 1; i++) {
            for (u32 looks = 1; there && load_now(flag(own, epoch, i)) != epoch; looks++) there = !given_up(looks, own + STOP);
        }
        asm volatile("fence.acq_rel.sys;" ::: "memory");
        *answer = there;
    }
    __syncthreads();
    return *answer != 0;
}

// The last block to have read the number of exchanges counts it up.
__device__ __forceinline__ void count_up(i64 own, u32 epoch) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(own + 4), "r"(gridDim.x - 1) : "memory");
    if (before == gridDim.x - 1) asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(own), "r"(epoch) : "memory");
}

// The whole exchange. `slots` is where the slots of this kind of packet begin in an area.
template <class Packet>
__device__ __forceinline__ void run(i64 own, const i64 (&peers)[RANKS - 1], const Part (&parts)[PARTS], i64 slots, i64 slot, int rank, bool blocks) {
    constexpr int OTHERS = RANKS - 1, DATA = Packet::DATA;
    constexpr bool FLAGS = SAME<Packet, Wide>;
    __shared__ u32 word;
    i64 total = packets<DATA>(parts), first = (i64)blockIdx.x * THREADS + threadIdx.x, stride = (i64)gridDim.x * THREADS;

    // What this rank has for the others, in the order of PEERS, and for itself. Where all get the same, it is loaded once.
    Data<DATA> data[RANKS];
    auto load = [&](i64 n) {
        Piece at = piece<DATA>(parts, n);
        data[OTHERS] = take<DATA>(at.from + at.at + (blocks ? rank * at.bytes : 0), at.left());
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            int peer = (rank + 1 + i) % RANKS;
            data[i] = blocks ? take<DATA>(at.from + at.at + peer * at.bytes, at.left()) : data[OTHERS];
        }
    };
    // Both loads are on their way before either is looked at.
    u32 last = threadIdx.x == 0 ? load_now(own) : 0;
    if (first < total) load(first);
    if (threadIdx.x == 0) word = last == 0xffffffff ? 2 : last + 1;
    __syncthreads();
    u32 epoch = word;
    i64 half = slots + (epoch & 1) * OTHERS * slot;
    for (i64 n = first; n < total;) {
        // Slot k of an area is for the rank k + 1 after its owner, around: this rank is the one RANKS - 1 - i after peer i.
#pragma unroll
        for (int i = 0; i < OTHERS; i++)
            Packet::send(peers[i] + half + (OTHERS - 1 - i) * slot + n * PACKET_BYTES, data[i], epoch);
        Piece at = piece<DATA>(parts, n);
        put<DATA>(at.to + at.at + rank * at.bytes, at.left(), data[OTHERS]);
        n += stride;
        if (n < total) load(n);
    }
    if constexpr (FLAGS) raise_flags(peers, epoch);
    if (threadIdx.x == 0) count_up(own, epoch);
    // All threads have read the epoch before the first flags were raised.
    if (FLAGS && !wait_for_flags(own, epoch, &word)) return;
    for (i64 n = first; n < total; n += stride) {
        Piece at = piece<DATA>(parts, n);
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            Data<DATA> received;
            if (!Packet::receive(own + half + i * slot + n * PACKET_BYTES, epoch, own + STOP, received)) return;
            int peer = (rank + 1 + i) % RANKS;
            put<DATA>(at.to + at.at + peer * at.bytes, at.left(), received);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) exchange(PARAMS) {
    wait_for_previous();
    // All blocks run by the time all have said so. What comes next waits for this kernel's end by itself.
    release_next();
    const i64 peers[RANKS - 1] = PEERS;
    const Part parts[PARTS] = LISTED;
    if (wide) run<Wide>(own, peers, parts, slots, slot, rank, blocks != 0);
    else run<Tagged>(own, peers, parts, slots, slot, rank, blocks != 0);
}
