// y = W x, where W (rows, columns) is int8 in blocks of 4 rows of one column, most of them zero and not stored, and x is unsigned bytes.
//
// Activations lie in panels: 64 tokens, feature by feature (features, 64), so that 16 tokens fill a register and a block's four values are
// broadcast. Of four non-zero columns the bytes are interleaved on the fly, and one vpdpbusd does 4 columns x 16 tokens. In a feature's 64
// bytes four tokens stay together and their fours are transposed (4j + i stands at 4i + j): the interleaving, done within 16 bytes, brings
// them back to their own order.
//
// What follows the sums is done while they are at hand: bias, activation and the next product's bytes; or the residual and LayerNorm.

#include <cstdint>

namespace {

enum Activation : int64_t { relu, gelu, gelu_tanh, none };

constexpr int64_t tile = 64;

struct Sparse {
    const int32_t *starts;     // of every group of 4 rows, its first block
    const uint16_t *columns;   // of every block
    const int8_t *values;      // of every four blocks of a group its 4 rows, 4 values each; what remains likewise
    const float *factors, *bias;  // of every row
    const int32_t *offsets;    // the zero point times the row's sum
    int64_t rows;
};

struct Scale {
    float inverse, zero;
};

// The bytes of four tokens, the `four`-th of the tile, begin here; and the other way round, in fours.
constexpr int64_t place(int64_t four) { return 16 * (four % 4) + 4 * (four / 4); }
constexpr int64_t token_of(int64_t at) { return 4 * (at % 4) + at / 4; }

}  // namespace

#define FORMWRIGHT_ARITHMETIC "block_sparse_lanes.h"
#include "instruction_sets.h"

#ifdef FORMWRIGHT_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vnni")
#endif
namespace {
namespace vnni {

struct Row {
    __m512i a, b, c, d;  // 4 x 16 tokens
};

struct Sums {
    Row r0, r1, r2, r3;
};

// In assembly: around the intrinsic GCC 12 copies every accumulator to and fro.
static inline __attribute__((always_inline)) void dot(__m512i &s, __m512i x, __m512i values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(x), "v"(values));
}

static inline __attribute__((always_inline)) Row add(Row s, __m512i a, __m512i b, __m512i c, __m512i d, int32_t values) {
    const __m512i v = _mm512_set1_epi32(values);
    dot(s.a, a, v);
    dot(s.b, b, v);
    dot(s.c, c, v);
    dot(s.d, d, v);
    return s;
}

// Adds four columns' blocks: the columns' bytes interleaved, and of each row four values.
static inline __attribute__((always_inline)) Sums add(
    Sums s, __m512i a, __m512i b, __m512i c, __m512i d, int32_t v0, int32_t v1, int32_t v2, int32_t v3
) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
    const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    const __m512i x0 = _mm512_unpacklo_epi16(ab, cd), x1 = _mm512_unpackhi_epi16(ab, cd);
    const __m512i x2 = _mm512_unpacklo_epi16(AB, CD), x3 = _mm512_unpackhi_epi16(AB, CD);
    return {
        add(s.r0, x0, x1, x2, x3, v0), add(s.r1, x0, x1, x2, x3, v1), add(s.r2, x0, x1, x2, x3, v2), add(s.r3, x0, x1, x2, x3, v3)
    };
}

static inline void store(int32_t *to, Row s) {
    _mm512_storeu_si512(to, s.a);
    _mm512_storeu_si512(to + 16, s.b);
    _mm512_storeu_si512(to + 32, s.c);
    _mm512_storeu_si512(to + 48, s.d);
}

static inline int32_t word(const int8_t *from) {
    int32_t v;
    std::memcpy(&v, from, 4);
    return v;
}

// As in block_sparse_lanes.h; the same integers.
static void accumulate(const Sparse &w, const uint8_t *panel, int64_t group, int32_t *sums) {
    const int64_t from = w.starts[group], count = w.starts[group + 1] - from;
    const uint16_t *column = w.columns + from;
    const int8_t *value = w.values + 4 * from;
    const __m512i zero = _mm512_setzero_si512();
    const Row none{zero, zero, zero, zero};
    Sums s{none, none, none, none};
    const auto read = [panel](int64_t k) { return _mm512_loadu_si512(panel + k * tile); };
    for (const uint16_t *end = column + count / 4 * 4; column < end; column += 4, value += 16)
        s = add(s, read(column[0]), read(column[1]), read(column[2]), read(column[3]), word(value), word(value + 4), word(value + 8),
            word(value + 12));
    const int64_t left = count % 4;
    if (left > 0) {
        int32_t values[4] = {0, 0, 0, 0};
        for (int64_t row = 0; row < 4; ++row) std::memcpy(values + row, value + row * left, left);
        s = add(s, read(column[0]), left > 1 ? read(column[1]) : zero, left > 2 ? read(column[2]) : zero, zero, values[0], values[1],
            values[2], values[3]);
    }
    store(sums, s.r0);
    store(sums + tile, s.r1);
    store(sums + 2 * tile, s.r2);
    store(sums + 3 * tile, s.r3);
}

}  // namespace vnni
}  // namespace
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

bool has_vnni() {
#ifdef FORMWRIGHT_X86
    static const bool found = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
    return found && instruction_set() == InstructionSet::avx512;
#else
    return false;
#endif
}

void (*accumulator())(const Sparse &, const uint8_t *, int64_t, int32_t *) {
#ifdef FORMWRIGHT_X86
    if (has_vnni()) return vnni::accumulate;
#endif
    return FORMWRIGHT_BEST(accumulate);
}

constexpr int64_t tiles(int64_t tokens) { return (tokens + tile - 1) / tile; }

}  // namespace

// 1 where the products run on the processor's byte dot products.
FORMWRIGHT_EXPORT int64_t formwright_has_vnni() { return has_vnni() ? 1 : 0; }

// Rows (tokens, width) to panels of bytes (tiles, width, 64) and, unless null, of floats. scale: 1 / scale, zero point.
FORMWRIGHT_EXPORT int64_t formwright_to_panels(
    const float *x, const float *scale, uint8_t *panels, float *kept, int64_t tokens, int64_t width, int64_t threads
) {
    const auto convert = FORMWRIGHT_BEST(to_panel);
    const Scale to{scale[0], scale[1]};
    return share_out(tiles(tokens), 1, threads, [=](int64_t i, float *) {
        const int64_t from = i * tile, at = from * width;
        convert(x + at, tokens - from, width, to, panels + at, kept == nullptr ? nullptr : kept + at);
    });
}

FORMWRIGHT_EXPORT int64_t formwright_from_panels(const float *panels, float *rows, int64_t tokens, int64_t width, int64_t threads) {
    const auto convert = FORMWRIGHT_BEST(from_panel);
    return share_out(tiles(tokens), 1, threads, [=](int64_t i, float *) {
        const int64_t from = i * tile;
        convert(panels + from * width, tokens - from < tile ? tokens - from : tile, width, rows + from * width);
    });
}

// The product, then one of these, told by what is not null:
//   whole      its integers (tokens, rows)
//   out        floats (tokens, rows), bias added and activated
//   bytes      the same in panels of bytes, quantised by `scale`
//   residual   panels of floats, to which the product is added and which are then normalised; `bytes` unless null
// scale: 1 / scale, zero point, eps of the norm. 0 = done, 1 = out of memory.
FORMWRIGHT_EXPORT int64_t formwright_block_sparse(
    const uint8_t *panels, const int32_t *starts, const int16_t *columns, const int8_t *values, const float *factors, const int32_t *offsets,
    const float *bias, int32_t *whole, float *out, uint8_t *bytes, float *residual, const float *gain, const float *shift,
    const float *scale, int64_t tokens, int64_t rows, int64_t width, int64_t activation, int64_t threads
) {
    const Sparse w{starts, reinterpret_cast<const uint16_t *>(columns), values, factors, bias, offsets, rows};
    const auto multiply = accumulator();
    const auto keep_whole = FORMWRIGHT_BEST(to_whole);
    const auto buffered = FORMWRIGHT_BEST(to_buffer);
    const auto keep_rows = FORMWRIGHT_BEST(to_rows);
    const auto keep_bytes = FORMWRIGHT_BEST(to_bytes);
    const auto add = FORMWRIGHT_BEST(to_residual);
    const auto normalise = FORMWRIGHT_BEST(normalise_panel);
    const Scale to = scale == nullptr ? Scale{1.0f, 0.0f} : Scale{scale[0], scale[1]};
    const float eps = scale == nullptr ? 0.0f : scale[2];
    const int64_t count = tiles(tokens), pieces = (rows + 15) / 16;
    const int64_t split = residual == nullptr ? parts(count, pieces, threads) : 1;  // a norm needs all rows of its tokens
    return share_out(count * split, 4 * tile + 16 * tile + 2 * tile, threads, [=](int64_t item, float *scratch) {
        const int64_t i = item / split, part = item % split, left = tokens - i * tile, real = left < tile ? left : tile;
        int32_t *sums = reinterpret_cast<int32_t *>(scratch);
        float *buffer = scratch + 4 * tile, *moments = buffer + 16 * tile;
        const uint8_t *panel = panels + i * tile * width;
        if (residual != nullptr) std::memset(moments, 0, sizeof(float) * 2 * tile);
        for (int64_t piece = pieces * part / split; piece < pieces * (part + 1) / split; ++piece) {
            const int64_t end = 16 * (piece + 1) < rows ? 16 * (piece + 1) : rows;
            for (int64_t first = 16 * piece; first < end; first += 4) {
                multiply(w, panel, first / 4, sums);
                if (whole != nullptr)
                    keep_whole(w, sums, first, real, whole + i * tile * rows);
                else if (out != nullptr)
                    buffered(w, sums, first, activation, buffer);
                else if (residual != nullptr)
                    add(w, sums, first, residual + i * tile * rows, moments);
                else
                    keep_bytes(w, sums, first, activation, to, bytes + i * tile * rows);
            }
            if (out != nullptr) keep_rows(w, buffer, 16 * piece, end - 16 * piece, real, out + i * tile * rows);
        }
        if (residual != nullptr)
            normalise(
                residual + i * tile * rows, moments, gain, shift, eps, rows, to, bytes == nullptr ? nullptr : bytes + i * tile * rows
            );
    });
}
