// Attention inside each text of a packed batch, and residual sum + norm, on CPUs: float32 or bfloat16, with a plain C interface.
//
// The texts lie one after the other in rows; text s has rows border[s] to border[s + 1]. Scores of four queries at a time stay in the
// cache, no text pays for another's length, and sums are float32 in both precisions. Where the processor multiplies pairs of bfloat16
// (AVX-512 BF16), bfloat16 runs on those; elsewhere it is widened to float32 first. Work is shared out over heads and texts.

#include <cstdint>

namespace {

struct AttentionSizes {
    int64_t texts, longest, heads, width, stride, to_stride, side, window, positions;
    int64_t padded_keys() const { return (longest + 63) / 64 * 64; }
    int64_t padded_width() const { return (width + 63) / 64 * 64; }
    // floats: staged rows, packed keys, packed values; queries and scores of up to eight rows, and one row more
    int64_t scratch() const { return 3 * padded_keys() * padded_width() + 9 * padded_width() + 8 * padded_keys(); }
};

template <class Number>
struct AttentionInputs {
    const Number *q, *k, *v;
    Number *to;
    const float *bias, *cosine, *sine;  // bias (heads, side, side); cosine and sine (positions, width); each may be null
    float *received;                    // (heads, tokens) attention that a token got, summed over the queries; may be null
    const int64_t *border;
    float scaling;
};

template <class Number>
struct NormInputs {
    const Number *x, *added;  // added may be null
    const float *gain, *shift;  // shift may be null
    Number *total, *to;       // the residual sum, where it is asked for, and its norm
    float eps;
    int64_t width, centred;
};

}  // namespace

#define FORMWRIGHT_ARITHMETIC "varlen_lanes.h"
#include "instruction_sets.h"

#if defined(FORMWRIGHT_X86) && !defined(__clang__) && __GNUC__ >= 10
#define FORMWRIGHT_BF16 1
namespace {
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace avx512bf16 {
#define FORMWRIGHT_LANES 16
#include "lanes.h"
#include "varlen_lanes.h"
#include "varlen_pairs.h"
#undef FORMWRIGHT_LANES
}  // namespace avx512bf16
#pragma GCC pop_options
}  // namespace
#endif

namespace {

bool multiplies_pairs() {
#ifdef FORMWRIGHT_BF16
    static const bool found = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return found;
#else
    return false;
#endif
}

template <class Number>
int attention(
    const void *q, const void *k, const void *v, void *to, const float *bias, const float *cosine, const float *sine, float *received,
    const int64_t *border, const float *scaling, const AttentionSizes &sizes, int64_t threads,
    void (*attend)(const AttentionSizes &, const AttentionInputs<Number> &, int64_t, int64_t, float *)
) {
    const AttentionInputs<Number> in{
        static_cast<const Number *>(q), static_cast<const Number *>(k), static_cast<const Number *>(v), static_cast<Number *>(to),
        bias, cosine, sine, received, border, *scaling
    };
    return share_out(sizes.heads * sizes.texts, sizes.scratch(), threads, [&](int64_t item, float *scratch) {
        attend(sizes, in, item / sizes.texts, item % sizes.texts, scratch);
    });
}

template <class Number>
int norm(
    const void *x, const void *added, const float *gain, const float *shift, void *total, void *to, const float *eps, int64_t rows,
    int64_t width, int64_t centred, int64_t threads, void (*normalise)(const NormInputs<Number> &, int64_t, int64_t, float *)
) {
    const NormInputs<Number> in{
        static_cast<const Number *>(x), static_cast<const Number *>(added), gain, shift, static_cast<Number *>(total),
        static_cast<Number *>(to), *eps, width, centred
    };
    const int64_t block = 32;
    return share_out((rows + block - 1) / block, (width + 15) / 16 * 16, threads, [&](int64_t item, float *scratch) {
        normalise(in, item * block, (item + 1) * block < rows ? (item + 1) * block : rows, scratch);
    });
}

}  // namespace

// Whether bfloat16 attention runs on products of bfloat16.
FORMWRIGHT_EXPORT int64_t formwright_multiplies_pairs() { return multiplies_pairs(); }

FORMWRIGHT_EXPORT int64_t formwright_varlen_attention(
    const void *q, const void *k, const void *v, void *to, const float *bias, const float *cosine, const float *sine, float *received,
    const int64_t *border, const float *scaling, int64_t bfloat16, int64_t texts, int64_t longest, int64_t heads, int64_t width,
    int64_t stride, int64_t to_stride, int64_t side, int64_t window, int64_t threads
) {
    const AttentionSizes sizes{texts, longest, heads, width, stride, to_stride, side, window, border[texts]};
    if (!bfloat16) {
        return attention<float>(
            q, k, v, to, bias, cosine, sine, received, border, scaling, sizes, threads, FORMWRIGHT_BEST(attend_floats)
        );
    }
    auto attend = FORMWRIGHT_BEST(attend_halves);
#ifdef FORMWRIGHT_BF16
    if (multiplies_pairs()) attend = avx512bf16::attend_pairs;
#endif
    return attention<uint16_t>(q, k, v, to, bias, cosine, sine, received, border, scaling, sizes, threads, attend);
}

// to = norm(x + added), and where asked total = x + added. `centred`: layer norm, otherwise root mean square.
FORMWRIGHT_EXPORT int64_t formwright_add_norm(
    const void *x, const void *added, const float *gain, const float *shift, void *total, void *to, const float *eps, int64_t bfloat16,
    int64_t rows, int64_t width, int64_t centred, int64_t threads
) {
    if (bfloat16) {
        auto normalise = FORMWRIGHT_BEST(normalise_halves);
#ifdef FORMWRIGHT_BF16
        if (multiplies_pairs()) normalise = avx512bf16::normalise_halves;
#endif
        return norm<uint16_t>(x, added, gain, shift, total, to, eps, rows, width, centred, threads, normalise);
    }
    return norm<float>(x, added, gain, shift, total, to, eps, rows, width, centred, threads, FORMWRIGHT_BEST(normalise_floats));
}
