// Before a step: fills in the tokens that the host did not know when it started the step, and makes padding of the rows whose
// sequences have ended meanwhile. Each row is one thread's. See advance.cu.

extern "C" __global__ void __launch_bounds__(THREADS) feed(PARAMS) {
    wait_for_previous();
    constexpr int PENDING = -2;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
        if (tokens[i] != PENDING) continue;
        int s = slot[i], token = s < 0 ? -1 : last[s];
        tokens[i] = token;
        if (token < 0) {
            pos[i] = 0;
            slot[i] = -1;
        }
    }
}
