// After a step has chosen tokens: tells the host, remembers each sequence's last token, ends sequences, and, if asked to, turns
// the inputs of a decode step into those of the next. One block. The other half is feed.cu, before a step.
//
// What the two share, so that steps can follow each other without the host having seen a token:
//
// - `last[slot]` is the token that the slot's sequence chose last, or -1 once the sequence has ended here. A slot that is
//   used anew keeps what its former sequence left; nobody looks at it until its new sequence has chosen a token, and then
//   it is that one. Nothing has to be cleared.
// - `stops[slot]`, written by the host, in the stream, before the first step in which a sequence chooses: columns 0 to 6 are
//   tokens that end it, -1 where there are fewer, and column 7 is the last position that it may run. A sequence ends when it chooses one of these tokens, or when
//   its next row would be past that position. The choice that ends it still counts: it is what the host is told.
// - A row of an ended sequence becomes padding: token -1, position 0, slot -1. Then it writes no state, and chooses -1.
//   `rows` may go on naming it.
// - The host gives a row of a sequence whose last token it does not know the token PENDING, -2. `feed` puts `last` in, or
//   makes it padding if the sequence has ended meanwhile. Rows whose tokens the host knows are left as they are, so the
//   prompt of a slot's new sequence is safe from its former one's -1.
// - With `moves`, the row's token and position become the next step's; `feed` then finds nothing to do. Without, inputs stay.
//
// What the host is told: steps are numbered from 1 by `number`, which counts up here. The step's entry of `ring`, number %
// depth, gets for each of the `count` chosen tokens the word number << 32 | token, in one store; the token is -1 for padding.
// The host knows which step is which, waits for a word's upper half to become the low half of the number, and lets no more
// than `depth` steps run ahead of what it has read. The host stopping a sequence by itself needs no word: steps under way
// still choose tokens for it, which the host drops, and everything that it starts later comes later in the stream.
//
// Race-free: rows of a step that choose are of different slots, each handled by one thread; `number` is written when all
// have read it.

extern "C" __global__ void __launch_bounds__(THREADS) advance(PARAMS) {
    wait_for_previous();
    u64 step = *(u64*)number + 1;
    __syncthreads();
    if (threadIdx.x == 0) *(u64*)number = step;
    u64* entry = (u64*)ring + step % (u64)depth * (u64)width;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        int row = rows[i], token = -1;
        int s = row < 0 ? -1 : slot[row];
        if (s >= 0) {
            token = next[i];
            const int* stop = stops + (i64)s * 8;
            int position = pos[row] + 1;
            bool ended = token < 0 || position > stop[7];
#pragma unroll
            for (int j = 0; j < 7; j++) ended |= token == stop[j];
            last[s] = ended ? -1 : token;
            if (moves) {
                tokens[row] = ended ? -1 : token;
                pos[row] = ended ? 0 : position;
                if (ended) slot[row] = -1;
            }
        }
        asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(entry + i), "l"(step << 32 | (u32)token) : "memory");
    }
}
