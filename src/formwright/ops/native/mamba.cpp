// Around Mamba's scan on CPUs, float32, with a plain C interface: the causal convolution with SiLU, forward and backward, which reads its
// input where the projection left it; and one decoding step between the two projections as a single call.

#include <cstdint>

namespace {

struct Convolution {
    const float *x, *weight, *bias;  // x: token t of sequence b at b batch_stride + t token_stride
    int64_t batch, length, channels, taps, batch_stride, token_stride;
};

struct Step {
    const float *xz, *window, *conv_weight, *conv_bias, *x_weight, *dt_weight, *dt_bias, *A_log, *D, *state;
    const uint8_t *real;  // 0 = the sequence's token is padding; none = all are real
    float *y, *next_window, *next_state;
    int64_t channels, states, rank, taps;
};

}  // namespace

#define FORMWRIGHT_ARITHMETIC "mamba_lanes.h"
#include "instruction_sets.h"

FORMWRIGHT_EXPORT int64_t formwright_conv_parts(int64_t batch, int64_t length, int64_t threads) { return parts(batch, length, threads); }

FORMWRIGHT_EXPORT int formwright_conv_forward(
    const float *x, const float *weight, const float *bias, float *y, int64_t batch, int64_t length, int64_t channels, int64_t taps,
    int64_t batch_stride, int64_t token_stride, int64_t parts, int64_t threads
) {
    const Convolution conv{x, weight, bias, batch, length, channels, taps, batch_stride, token_stride};
    const auto forward = FORMWRIGHT_BEST(conv_forward);
    return share_out(batch * parts, FORMWRIGHT_BEST(conv_scratch)(conv), threads, [&](int64_t item, float *scratch) {
        const int64_t part = item % parts;
        forward(conv, y, item / parts, length * part / parts, length * (part + 1) / parts, scratch);
    });
}

FORMWRIGHT_EXPORT int formwright_conv_backward(
    const float *x, const float *weight, const float *bias, const float *dy, float *dx, float *dweight, int64_t batch, int64_t length,
    int64_t channels, int64_t taps, int64_t batch_stride, int64_t token_stride, int64_t parts, int64_t threads
) {
    const Convolution conv{x, weight, bias, batch, length, channels, taps, batch_stride, token_stride};
    const auto backward = FORMWRIGHT_BEST(conv_backward);
    return share_out(batch * parts, FORMWRIGHT_BEST(conv_scratch)(conv), threads, [&](int64_t item, float *scratch) {
        const int64_t part = item % parts;
        float *sums = dweight + item * (taps + 1) * channels;
        backward(conv, dy, dx, sums, item / parts, length * part / parts, length * (part + 1) / parts, scratch);
    });
}

FORMWRIGHT_EXPORT int formwright_mamba_step(
    const float *xz, const float *window, const float *conv_weight, const float *conv_bias, const float *x_weight, const float *dt_weight,
    const float *dt_bias, const float *A_log, const float *D, const float *state, const uint8_t *real, float *y, float *next_window, float *next_state,
    int64_t batch, int64_t channels, int64_t states, int64_t rank, int64_t taps, int64_t threads
) {
    const Step step{
        xz, window, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, state, real, y, next_window, next_state, channels,
        states, rank, taps
    };
    const auto run = FORMWRIGHT_BEST(step);
    return share_out(batch, FORMWRIGHT_BEST(step_scratch)(step), threads, [&](int64_t b, float *scratch) { run(step, b, scratch); });
}
