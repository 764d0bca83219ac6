// Selective scan on CPUs, forward and backward, float32, with a plain C interface.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t        y_t = C_t . h_t + D x_t
//
// The (length, channels, states) array of hidden states is never stored: the forward keeps the state at the borders of chunks, the
// backward recomputes a chunk from it in a buffer that fits the cache. Work is shared out over sequences and blocks of channels.

#include <cstdint>

namespace {

struct Sizes {
    int64_t batch, length, channels, states, chunk;
    int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

struct Inputs {
    const float *x, *delta, *A, *B, *C, *D, *state, *borders;
};

struct Outputs {
    float *y, *final_state, *borders;  // borders (batch, chunks + 1, states, channels): before each chunk and after the last
};

struct Gradients {
    const float *y, *final_state;
    float *dx, *ddelta, *dA, *dB, *dC, *dD, *dstate;  // dA and dD a sequence each, dB and dC a group of channels each
};

}  // namespace

#define FORMWRIGHT_ARITHMETIC "selective_scan_lanes.h"
#include "instruction_sets.h"

FORMWRIGHT_EXPORT const char *formwright_instruction_set() {
    const char *names[] = {"portable", "AVX2", "AVX-512"};
    return names[static_cast<int>(instruction_set())];
}

FORMWRIGHT_EXPORT int64_t formwright_scan_groups(int64_t batch, int64_t channels, int64_t threads) {
    const int64_t lanes = FORMWRIGHT_BEST(lanes);
    return parts(batch, (channels + lanes - 1) / lanes, threads);
}

FORMWRIGHT_EXPORT int formwright_scan_forward(
    const float *x, const float *delta, const float *A, const float *B, const float *C, const float *D, const float *state, float *y,
    float *final_state, float *borders, int64_t batch, int64_t length, int64_t channels, int64_t states, int64_t chunk, int64_t threads
) {
    const Sizes sizes{batch, length, channels, states, chunk};
    const Inputs in{x, delta, A, B, C, D, state, nullptr};
    const Outputs out{y, final_state, borders};
    const int64_t lanes = FORMWRIGHT_BEST(lanes), blocks = (channels + lanes - 1) / lanes;
    const auto forward = FORMWRIGHT_BEST(scan_forward);
    return share_out(batch * blocks, FORMWRIGHT_BEST(scan_forward_scratch)(sizes), threads, [&](int64_t item, float *scratch) {
        forward(sizes, in, out, item / blocks, item % blocks * lanes, scratch);
    });
}

FORMWRIGHT_EXPORT int formwright_scan_backward(
    const float *x, const float *delta, const float *A, const float *B, const float *C, const float *D, const float *borders,
    const float *grad_y, const float *grad_final, float *dx, float *ddelta, float *dA, float *dB, float *dC, float *dD, float *dstate,
    int64_t batch, int64_t length, int64_t channels, int64_t states, int64_t chunk, int64_t groups, int64_t threads
) {
    const Sizes sizes{batch, length, channels, states, chunk};
    const Inputs in{x, delta, A, B, C, D, nullptr, borders};
    const Gradients grad{grad_y, grad_final, dx, ddelta, dA, dB, dC, dD, dstate};
    const int64_t lanes = FORMWRIGHT_BEST(lanes), blocks = ((channels + lanes - 1) / lanes + groups - 1) / groups;
    const auto backward = FORMWRIGHT_BEST(scan_backward);
    return share_out(batch * groups, FORMWRIGHT_BEST(scan_backward_scratch)(sizes, blocks), threads, [&](int64_t item, float *scratch) {
        backward(sizes, in, grad, item / groups, item % groups, groups, scratch);
    });
}
