// Experts of one neuron, gathered from tables of many rows: products with chosen rows, weighted sums of chosen rows, the gradient of both,
// and the search among product keys. Nothing of the size tokens x chosen x width is stored. Tables are float32 or, where `half` is set,
// bfloat16; all else is float32, and sums are too.

#include <cstdint>

namespace {

struct RowSizes {
    int64_t chosen, width;
};

constexpr int64_t tokens_together = 4, rows_together = 64, searches_together = 16;

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

#define FORMWRIGHT_ARITHMETIC "peer_lanes.h"
#include "instruction_sets.h"

namespace {

// Runs work(first, last, scratch) on blocks of a range.
template <class Work>
int share_range(int64_t count, int64_t size, int64_t floats, int64_t threads, Work work) {
    return share_out(blocks(count, size), floats, threads, [&](int64_t block, float *scratch) {
        const int64_t first = block * size;
        work(first, first + size < count ? first + size : count, scratch);
    });
}

}  // namespace

// x (tokens, width), table (rows, width), index (tokens, chosen) -> out (tokens, chosen). 0 = done, 1 = out of memory.
FORMWRIGHT_EXPORT int64_t formwright_row_dots(
    const float *x, const void *table, const int64_t *index, float *out, int64_t tokens, int64_t chosen, int64_t width, int64_t half,
    int64_t threads
) {
    const RowSizes z{chosen, width};
    const auto whole = FORMWRIGHT_BEST(row_dots<float>);
    const auto halved = FORMWRIGHT_BEST(row_dots<uint16_t>);
    return share_range(tokens, tokens_together, 1, threads, [&](int64_t first, int64_t last, float *) {
        if (half) halved(z, x, static_cast<const uint16_t *>(table), index, out, first, last);
        else whole(z, x, static_cast<const float *>(table), index, out, first, last);
    });
}

// w (tokens, chosen), table (rows, width), index (tokens, chosen) -> out (tokens, width)
FORMWRIGHT_EXPORT int64_t formwright_row_sums(
    const float *w, const void *table, const int64_t *index, float *out, int64_t tokens, int64_t chosen, int64_t width, int64_t half,
    int64_t threads
) {
    const RowSizes z{chosen, width};
    const auto whole = FORMWRIGHT_BEST(row_sums<float>);
    const auto halved = FORMWRIGHT_BEST(row_sums<uint16_t>);
    return share_range(tokens, tokens_together, 1, threads, [&](int64_t first, int64_t last, float *) {
        if (half) halved(z, w, static_cast<const uint16_t *>(table), index, out, first, last);
        else whole(z, w, static_cast<const float *>(table), index, out, first, last);
    });
}

// w (tokens, chosen), x (tokens, width), index (tokens, chosen) -> out (rows, width): of every row the sum of w x where it was chosen. The
// pairs are sorted by row first, so that a row is written once and by one thread.
FORMWRIGHT_EXPORT int64_t formwright_row_scatter(
    const float *w, const float *x, const int64_t *index, float *out, int64_t tokens, int64_t chosen, int64_t rows, int64_t width,
    int64_t threads
) {
    const RowSizes z{chosen, width};
    const int64_t pairs = tokens * chosen;
    Scratch memory(2 * (rows + 2 + pairs));
    if (memory.data == nullptr) return 1;
    int64_t *borders = reinterpret_cast<int64_t *>(memory.data), *sorted = borders + rows + 2;
    std::memset(borders, 0, sizeof(int64_t) * (rows + 2));
    for (int64_t p = 0; p < pairs; ++p) ++borders[index[p] + 2];
    for (int64_t row = 2; row < rows + 2; ++row) borders[row] += borders[row - 1];
    for (int64_t p = 0; p < pairs; ++p) sorted[borders[index[p] + 1]++] = p;
    const auto run = FORMWRIGHT_BEST(row_scatter);
    return share_range(rows, rows_together, 1, threads, [&](int64_t first, int64_t last, float *) {
        run(z, w, x, sorted, borders, out, first, last);
    });
}

// a and b (rows, n) -> out (rows, k), the pairs i n + j with the highest a_i + b_j, falling
FORMWRIGHT_EXPORT int64_t formwright_top_pairs(
    const float *a, const float *b, int64_t *out, int64_t rows, int64_t n, int64_t k, int64_t threads
) {
    const auto run = FORMWRIGHT_BEST(top_pairs);
    return share_range(rows, searches_together, 6 * k, threads, [&](int64_t first, int64_t last, float *scratch) {
        run(a, b, out, n, k, first, last, scratch);
    });
}
