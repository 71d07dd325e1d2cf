// What follows the logits of a row in the router of a mixture of experts: scores, the choice, weights.
//
// Generated: EXPERTS, CHOSEN, SELECTION(score, bias), WEIGHT(score, sum).
#pragma once

#include "select.cuh"

// A lane has experts lane, lane + 32, ...
constexpr int OF_LANE = (EXPERTS + (int)WARP - 1) / (int)WARP;

// A row's choices in their order.
struct Choices {
    float scores[CHOSEN];
    int experts[CHOSEN];
};

// Chooses CHOSEN experts of a row, if it is `live`, by the sum of score and bias, larger first, lower expert among equals: a warp,
// whose lanes give the logits and biases of their experts. Calls put(j, expert, weight) in lane j for choice j; where a row has
// none, the expert is -1. `choices` is the warp's own.
//
// A round finds the largest number left and takes all experts that have it, so that a round waits for nothing but the largest of the
// round before. Their places follow from the number of those taken earlier and from the order of positions.
template <class Put>
__device__ __forceinline__ void
route(bool live, const float (&logits)[OF_LANE], const float (&biases)[OF_LANE], Choices& choices, Put put) {
    const int lane = lane_id();
    const u32 below = (1u << lane) - 1;
    float score[OF_LANE];
    // 0 is no expert, or one that was taken.
    u32 left[OF_LANE];
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) {
        score[i] = 1.0f / (1.0f + expf(-logits[i]));
        left[i] = i * (int)WARP + lane < EXPERTS ? ordered(SELECTION(score[i], biases[i])) : 0;
    }
    int taken = 0;
#pragma unroll CHOSEN <= 8 ? CHOSEN : 1
    for (int round = 0; round < CHOSEN; round++) {
        u32 largest = left[0];
#pragma unroll
        for (int i = 1; i < OF_LANE; i++) largest = max(largest, left[i]);
        largest = warp_largest(largest);
#pragma unroll
        for (int i = 0; i < OF_LANE; i++) {
            bool is = left[i] == largest;
            if (is) left[i] = 0;
            is = is && largest != 0;
            u32 all = __ballot_sync(ALL_LANES, is);
            int place = taken + __popc(all & below);
            if (is && place < CHOSEN) {
                choices.scores[place] = score[i];
                choices.experts[place] = i * (int)WARP + lane;
            }
            taken += __popc(all);
        }
    }
    __syncwarp();
    float sum = 0;
#pragma unroll
    for (int j = 0; j < CHOSEN; j++) sum = __fadd_rn(sum, live ? choices.scores[j] : 0.0f);
    if (lane < CHOSEN) put(lane, live ? choices.experts[lane] : -1, WEIGHT(live ? choices.scores[lane] : 0.0f, sum));
    __syncwarp();
}
