// Exchanges parts of memory with the other ranks, each on a GPU of its own, in one launch: each rank writes what it has for another
// into that one's memory, over the link between the two GPUs, and takes from its own memory what the others wrote there. Nothing is
// read over the link. An area is laid out as src/plan/exchange.rs says.
//
// Generated: RANKS, PARTS, HEADER_BYTES, STOP, PACKET_BYTES, DATA_BYTES; PEERS, the areas of the other ranks, from the one after this
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
// Why a word is not written again before it was read. All ranks run the same exchanges in the same order, each as one launch, and of
// two launches of a rank the second begins when the first is done (`wait_for_previous`). In every exchange each rank receives at least
// one word from every other (parts are never empty). Exchange n uses half n % 2 of the areas. Let rank A run n + 2, and write to a word
// of B's that n used. A's launch n + 1 is done, so A has read words that B wrote in its launch n + 1. So that had begun, so B's launch
// n was done, in which B read all that A wrote in n. By the same argument B reads no word of n + 2 in place of one of n: it looks for
// the epoch n, finds it or what was there before, and the latter is of another epoch: epochs of a half differ by 2 or more.
//
// What blocks do is independent of each other and of how many there are; a thread waits only for threads of other ranks which write
// before they wait. So all that is needed is that each rank's blocks run at once: the runtime launches no more than fit.
//
// Epochs are counted in the area, because a captured launch is always the same: the last block to have read the number counts it up.
// It goes from 2^32 - 1 to 2, as memory that was never written holds 0, and because halves take turns. A word would be mistaken that no
// exchange has written for exactly 2^32 - 2 exchanges; others of the same half would have to leave it out all the time.

struct Part {
    i64 from, to, bytes;
};

// The bytes [at, at + DATA_BYTES) of a part's block, as far as it has them.
struct Piece {
    i64 from, to, bytes, at;
};

__device__ __forceinline__ i64 packets(const Part& part) { return (part.bytes + DATA_BYTES - 1) / DATA_BYTES; }

// Where packet n of all parts, one after the other, has its data.
__device__ __forceinline__ Piece piece(const Part (&parts)[PARTS], i64 n) {
    Piece found = {};
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        i64 count = packets(parts[j]);
        if (n >= 0 && n < count) found = {parts[j].from, parts[j].to, parts[j].bytes, n * DATA_BYTES};
        n -= count;
    }
    return found;
}

// Data of a part's block at this address, of which `left` bytes, an even number, are the block's. Elements are of two bytes or more.
__device__ __forceinline__ u64 take(i64 from, i64 left) {
    u64 data = 0;
    if (left >= DATA_BYTES && from % DATA_BYTES == 0) {
        asm volatile("ld.global.u64 %0, [%1];" : "=l"(data) : "l"(from) : "memory");
        return data;
    }
#pragma unroll
    for (int i = 0; i < DATA_BYTES / 2; i++) {
        if (i * 2 >= left) break;
        u16 some;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(some) : "l"(from + i * 2) : "memory");
        data |= (u64)some << i * 16;
    }
    return data;
}

__device__ __forceinline__ void put(i64 to, i64 left, u64 data) {
    if (left >= DATA_BYTES && to % DATA_BYTES == 0) {
        asm volatile("st.global.u64 [%0], %1;" ::"l"(to), "l"(data) : "memory");
        return;
    }
#pragma unroll
    for (int i = 0; i < DATA_BYTES / 2; i++) {
        if (i * 2 >= left) break;
        asm volatile("st.global.u16 [%0], %1;" ::"l"(to + i * 2), "h"((u16)(data >> i * 16)) : "memory");
    }
}

__device__ __forceinline__ void send(i64 to, u64 data, u32 epoch) {
    u64 tag = (u64)epoch << 32;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(tag | (u32)data), "l"(tag | data >> 32)
                 : "memory");
}

__device__ __forceinline__ u32 load_now(i64 from) {
    u32 x;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// Waits for a packet; false if that was given up, as the host tells where another rank is no more.
__device__ __forceinline__ bool receive(i64 from, u32 epoch, i64 stop, u64& data) {
    constexpr u32 LOOKS = 1 << 12;
    for (u32 looks = 1;; looks++) {
        u64 low, high;
        asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from) : "memory");
        if ((u32)(low >> 32) == epoch && (u32)(high >> 32) == epoch) {
            data = (u32)low | high << 32;
            return true;
        }
        if (looks % LOOKS == 0 && load_now(stop) != 0) return false;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) exchange(PARAMS) {
    __shared__ u32 number;
    wait_for_previous();
    // All blocks run by the time all have said so. What comes next waits for this kernel's end by itself.
    release_next();
    constexpr int OTHERS = RANKS - 1;
    const i64 peers[OTHERS] = PEERS;
    const Part parts[PARTS] = LISTED;
    i64 total = 0;
#pragma unroll
    for (int j = 0; j < PARTS; j++) total += packets(parts[j]);
    i64 first = (i64)blockIdx.x * THREADS + threadIdx.x, stride = (i64)gridDim.x * THREADS;

    // What this rank has for the others, in the order of PEERS, and for itself. Where all get the same, it is loaded once.
    u64 data[RANKS];
    auto load = [&](i64 n) {
        Piece at = piece(parts, n);
        i64 left = at.bytes - at.at;
        data[OTHERS] = take(at.from + at.at + (blocks ? rank * at.bytes : 0), left);
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            int peer = (rank + 1 + i) % RANKS;
            data[i] = blocks ? take(at.from + at.at + peer * at.bytes, left) : data[OTHERS];
        }
    };
    if (threadIdx.x == 0) {
        u32 last = load_now(own);
        number = last == 0xffffffff ? 2 : last + 1;
    }
    if (first < total) load(first);
    __syncthreads();
    u32 epoch = number;
    i64 half = HEADER_BYTES + (epoch & 1) * OTHERS * slot;
    for (i64 n = first; n < total;) {
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            // Of the ranks after the peer, this one is number RANKS - 1 - (1 + i), counted from 0.
            send(peers[i] + half + (OTHERS - 1 - i) * slot + n * PACKET_BYTES, data[i], epoch);
        }
        Piece at = piece(parts, n);
        put(at.to + at.at + rank * at.bytes, at.bytes - at.at, data[OTHERS]);
        n += stride;
        if (n < total) load(n);
    }
    if (threadIdx.x == 0) {
        u32 before;
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(own + 4), "r"(gridDim.x - 1) : "memory");
        if (before == gridDim.x - 1)
            asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(own), "r"(epoch) : "memory");
    }
    for (i64 n = first; n < total; n += stride) {
        Piece at = piece(parts, n);
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            u64 received;
            if (!receive(own + half + i * slot + n * PACKET_BYTES, epoch, own + STOP, received)) return;
            int peer = (rank + 1 + i) % RANKS;
            put(at.to + at.at + peer * at.bytes, at.bytes - at.at, received);
        }
    }
}
