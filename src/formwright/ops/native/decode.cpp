// One decoding step of a pre-norm block with softmax attention and a two-matrix feed-forward layer, float32, as a single call.
//
//     x <- x + W_o attention(norm(x), cache) + b_o        x <- x + W_2 act(W_1 norm(x) + b_1) + b_2
//
// A step reads every weight and every cached key and value once and computes little with them: it is bound by memory. As a sequence of
// tensor operations it is bound by their calls instead. The new key and value are appended to the cache in place. The threads share out
// rows of the matrices and heads; they meet five times a block.

#include <cstdint>

namespace {

enum Activation : int64_t { relu, gelu, gelu_tanh };

struct Sizes {
    int64_t batch, dim, heads, groups, width, hidden, past, capacity, activation;
    int64_t rows() const { return (heads + 2 * groups) * width; }
};

struct Block {
    const float *gain_1, *shift_1, *in, *in_bias, *out, *out_bias, *gain_2, *shift_2, *up, *up_bias, *down, *down_bias;
    float eps_1, eps_2, scaling;
};

}  // namespace

#define FORMWRIGHT_ARITHMETIC "decode_lanes.h"
#include "instruction_sets.h"

// keys and values (batch, groups, capacity, width) hold `past` tokens; seen (batch, past + 1) is 0 where a key is hidden, or null.
// constants: eps of the first norm, eps of the second, factor on the scores. 0 = done, 1 = out of memory.
FORMWRIGHT_EXPORT int64_t formwright_block_step(
    const float *x, float *y, float *keys, float *values, const uint8_t *seen, const float *gain_1, const float *shift_1, const float *in,
    const float *in_bias, const float *out, const float *out_bias, const float *gain_2, const float *shift_2, const float *up,
    const float *up_bias, const float *down, const float *down_bias, const float *constants, int64_t batch, int64_t dim, int64_t heads,
    int64_t groups, int64_t width, int64_t hidden, int64_t past, int64_t capacity, int64_t activation, int64_t threads
) {
    const Sizes z{batch, dim, heads, groups, width, hidden, past, capacity, activation};
    const Block block{gain_1,  shift_1, in,      in_bias, out,          out_bias,     gain_2,      shift_2,
                      up,      up_bias, down,    down_bias, constants[0], constants[1], constants[2]};
    const auto normalise = FORMWRIGHT_BEST(normalise);
    const auto product = FORMWRIGHT_BEST(product);
    const auto attend = FORMWRIGHT_BEST(attend);
    const auto activate = FORMWRIGHT_BEST(activate);
    const int64_t rows = z.rows(), mixed = heads * width, piece = 16;
    // normalised (b, dim), projected (b, rows), attended (b, heads width), inner (b, hidden); then a score buffer for every head
    const int64_t score = FORMWRIGHT_BEST(score_room)(z);
    Scratch scratch(batch * (dim + rows + mixed + hidden) + batch * heads * score);
    if (scratch.data == nullptr) return 1;
    float *normal = scratch.data, *projected = normal + batch * dim, *attended = projected + batch * rows,
          *inner = attended + batch * mixed, *scores = inner + batch * hidden;
    for (int64_t b = 0; b < batch; ++b) normalise(x + b * dim, block.gain_1, block.shift_1, block.eps_1, normal + b * dim, dim);
    if (threads < 1) threads = 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
#endif
    {
        FlushDenormals flush;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t row = 0; row < rows; row += piece)
            product(block.in, block.in_bias, normal, nullptr, projected, batch, rows, dim, row, row + piece < rows ? row + piece : rows);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t item = 0; item < batch * heads; ++item)
            attend(z, block.scaling, projected, keys, values, seen, attended, item / heads, item % heads, scores + item * score);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t row = 0; row < dim; row += piece)
            product(block.out, block.out_bias, attended, x, y, batch, dim, mixed, row, row + piece < dim ? row + piece : dim);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t b = 0; b < batch; ++b) normalise(y + b * dim, block.gain_2, block.shift_2, block.eps_2, normal + b * dim, dim);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t row = 0; row < hidden; row += piece) {
            const int64_t end = row + piece < hidden ? row + piece : hidden;
            product(block.up, block.up_bias, normal, nullptr, inner, batch, hidden, dim, row, end);
            for (int64_t b = 0; b < batch; ++b) activate(z.activation, inner + b * hidden + row, end - row);
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t row = 0; row < dim; row += piece)
            product(block.down, block.down_bias, inner, y, y, batch, dim, hidden, row, row + piece < dim ? row + piece : dim);
    }
    return 0;
}
