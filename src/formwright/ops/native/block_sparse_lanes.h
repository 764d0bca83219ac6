// The pieces of a block-sparse product for one instruction set (see instruction_sets.h and block_sparse.cpp).

typedef int32_t Whole __attribute__((vector_size(FORMWRIGHT_LANES * 4)));

static inline Whole load_whole(const int32_t *from) {
    Whole v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// x / scale to the nearest whole number, halves to even, plus the zero point, held within 0 to 255.
static inline Bits quantised(Vector x, float inverse, float zero) {
    const Vector round = Vector{} + 12582912.0f, low = Vector{} - zero, high = Vector{} + (255.0f - zero);
    Vector v = x * inverse;
    v = v > low ? v : low;
    v = v < high ? v : high;
    return ((Bits)(v + round) & 0x7fffffu) - 0x400000u + (uint32_t)zero;
}

// Four tokens' bytes of a feature lie together; these are the bytes of `words`, one feature a lane.
static inline void store_words(uint8_t *to, Bits words, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t word = words[i];
        std::memcpy(to + i * tile, &word, 4);
    }
}

// A tile of rows (tokens, width), from its first token on, to a panel of bytes and, unless null, one of floats (width, tile).
static void to_panel(const float *x, int64_t tokens, int64_t width, const Scale &scale, uint8_t *panel, float *kept) {
    constexpr int64_t together = 256;  // features: rows are read on, and the panel's part stays in the nearest cache
    for (int64_t start = 0; start < width; start += together) {
        const int64_t end = start + together < width ? start + together : width;
        for (int64_t four = 0; four < tile / 4; ++four)
            for (int64_t k = start; k < end; k += lanes) {
                const int64_t count = width - k < lanes ? width - k : lanes;
                Bits words = Bits{};
                for (int64_t i = 0; i < 4; ++i) {
                    const int64_t token = 4 * four + i;
                    const Vector v = token < tokens ? load(x + token * width + k, width - k) : Vector{};
                    words |= quantised(v, scale.inverse, scale.zero) << (uint32_t)(8 * i);
                    if (kept != nullptr)
                        for (int64_t j = 0; j < count; ++j) kept[(k + j) * tile + token] = v[j];
                }
                store_words(panel + k * tile + place(four), words, count);
            }
    }
}

// Back to rows, those of real tokens.
static void from_panel(const float *panel, int64_t tokens, int64_t width, float *rows) {
    for (int64_t k = 0; k < width; k += 16)
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t j = k; j < k + 16 && j < width; ++j) rows[token * width + j] = panel[j * tile + token];
}

// sums (4, tile) = the four rows of a group times the panel; only columns that hold a block are read.
static void accumulate(const Sparse &w, const uint8_t *panel, int64_t group, int32_t *sums) {
    const int64_t from = w.starts[group], to = w.starts[group + 1], whole = from + (to - from) / 4 * 4;
    typedef uint8_t Bytes __attribute__((vector_size(FORMWRIGHT_LANES)));
    for (int64_t at = 0; at < tile; at += lanes) {
        Whole s0 = Whole{}, s1 = Whole{}, s2 = Whole{}, s3 = Whole{};
        for (int64_t block = from; block < to; ++block) {
            Bytes bytes;
            std::memcpy(&bytes, panel + w.columns[block] * tile + at, sizeof bytes);
            const Whole x = __builtin_convertvector(bytes, Whole);
            // of every four blocks the values lie row by row
            const int64_t first = block < whole ? from + (block - from) / 4 * 4 : whole, run = block < whole ? 4 : to - whole;
            const int8_t *value = w.values + 4 * first + (block - first);
            s0 += x * (int32_t)value[0];
            s1 += x * (int32_t)value[run];
            s2 += x * (int32_t)value[2 * run];
            s3 += x * (int32_t)value[3 * run];
        }
        const Whole s[4] = {s0, s1, s2, s3};
        for (int64_t row = 0; row < 4; ++row)  // bytes of four tokens each go back to the tokens' own order
            for (int64_t i = 0; i < lanes; i += 4) {
                const int64_t four = token_of((at + i) / 4);
                for (int64_t j = 0; j < 4; ++j) sums[row * tile + 4 * four + j] = s[row][i + j];
            }
    }
}

// erf by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7.
static inline Vector error_function(Vector z) {
    const Vector zero = Vector{}, a = z < zero ? -z : z, t = 1.0f / (1.0f + 0.3275911f * a);
    Vector p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vector y = 1.0f - p * t * exp2(a * a * -log2_e);
    return z < zero ? -y : y;
}

static inline Vector activated(int64_t kind, Vector v) {
    const Vector zero = Vector{};
    if (kind == relu) return v > zero ? v : zero;
    if (kind == gelu) return v * 0.5f * (1.0f + error_function(v * 0.70710678f));
    if (kind == gelu_tanh) return v * sigmoid(1.59576912f * (v + 0.044715f * v * v * v));  // tanh(u) = 2 sigmoid(2 u) - 1
    return v;
}

static inline Vector real(const Sparse &w, int64_t row, const int32_t *sums) {
    return __builtin_convertvector(load_whole(sums) - w.offsets[row], Vector) * w.factors[row] + w.bias[row];
}

// One row of a panel of bytes from the same row in floats.
static inline void store_bytes(uint8_t *panel, const Vector *row, const Scale &scale) {
#if FORMWRIGHT_LANES == 16
    __m128i bytes[4];
    for (int64_t i = 0; i < 4; ++i)
        bytes[i] = _mm512_cvtepi32_epi8((__m512i)quantised(row[i], scale.inverse, scale.zero));
    const __m128i ab = _mm_unpacklo_epi32(bytes[0], bytes[1]), cd = _mm_unpacklo_epi32(bytes[2], bytes[3]);
    const __m128i AB = _mm_unpackhi_epi32(bytes[0], bytes[1]), CD = _mm_unpackhi_epi32(bytes[2], bytes[3]);
    __m128i *to = reinterpret_cast<__m128i *>(panel);
    _mm_storeu_si128(to, _mm_unpacklo_epi64(ab, cd));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi64(ab, cd));
    _mm_storeu_si128(to + 2, _mm_unpacklo_epi64(AB, CD));
    _mm_storeu_si128(to + 3, _mm_unpackhi_epi64(AB, CD));
#else
    for (int64_t at = 0; at < tile; at += lanes) {
        const Bits q = quantised(row[at / lanes], scale.inverse, scale.zero);
        for (int64_t i = 0; i < lanes; i += 4) {
            const uint32_t word = q[i] | q[i + 1] << 8 | q[i + 2] << 16 | q[i + 3] << 24;
            std::memcpy(panel + place((at + i) / 4), &word, 4);
        }
    }
#endif
}

// What becomes of the sums of a group's four rows; `first` is the first of them.

static void to_whole(const Sparse &w, const int32_t *sums, int64_t first, int64_t tokens, int32_t *out) {
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t row = 0; row < 4; ++row)
            out[token * w.rows + first + row] = sums[row * tile + token] - w.offsets[first + row];
}

// Through a buffer (tile, 16), so that what is written are whole lines: groups first to first + 16 of rows.
static void to_buffer(const Sparse &w, const int32_t *sums, int64_t first, int64_t activation, float *buffer) {
    for (int64_t at = 0; at < tile; at += lanes) {
        Vector v[4];
        for (int64_t row = 0; row < 4; ++row) v[row] = activated(activation, real(w, first + row, sums + row * tile + at));
        float *to = buffer + at * 16 + first % 16;
#if FORMWRIGHT_LANES == 16
        const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
        const __m512d ab = (__m512d)_mm512_unpacklo_ps(a, b), cd = (__m512d)_mm512_unpacklo_ps(c, d);
        const __m512d AB = (__m512d)_mm512_unpackhi_ps(a, b), CD = (__m512d)_mm512_unpackhi_ps(c, d);
        const __m512 fours[4] = {
            (__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd), (__m512)_mm512_unpacklo_pd(AB, CD),
            (__m512)_mm512_unpackhi_pd(AB, CD)
        };
        for (int64_t i = 0; i < 4; ++i) {
            _mm_storeu_ps(to + 16 * i, _mm512_castps512_ps128(fours[i]));
            _mm_storeu_ps(to + 16 * (4 + i), _mm512_extractf32x4_ps(fours[i], 1));
            _mm_storeu_ps(to + 16 * (8 + i), _mm512_extractf32x4_ps(fours[i], 2));
            _mm_storeu_ps(to + 16 * (12 + i), _mm512_extractf32x4_ps(fours[i], 3));
        }
#else
        for (int64_t i = 0; i < lanes; ++i)
            for (int64_t row = 0; row < 4; ++row) to[16 * i + row] = v[row][i];
#endif
    }
}

static void to_rows(const Sparse &w, const float *buffer, int64_t first, int64_t count, int64_t tokens, float *out) {
    for (int64_t token = 0; token < tokens; ++token)
        std::memcpy(out + token * w.rows + first, buffer + token * 16, sizeof(float) * count);
}

static void to_bytes(
    const Sparse &w, const int32_t *sums, int64_t first, int64_t activation, const Scale &scale, uint8_t *panel
) {
    for (int64_t row = 0; row < 4; ++row) {
        Vector v[tile / lanes];
        for (int64_t at = 0; at < tile; at += lanes)
            v[at / lanes] = activated(activation, real(w, first + row, sums + row * tile + at));
        store_bytes(panel + (first + row) * tile, v, scale);
    }
}

// Adds to the residual panel, and brings mean and summed squares of every token up to date (Welford); moments (2, tile).
static void to_residual(const Sparse &w, const int32_t *sums, int64_t first, float *residual, float *moments) {
    for (int64_t row = 0; row < 4; ++row) {
        const float share = 1.0f / static_cast<float>(first + row + 1);
        for (int64_t at = 0; at < tile; at += lanes) {
            float *kept = residual + (first + row) * tile + at;
            const Vector v = load(kept) + real(w, first + row, sums + row * tile + at);
            const Vector mean = load(moments + at), step = v - mean, after = mean + step * share;
            store(kept, v);
            store(moments + at, after);
            store(moments + tile + at, load(moments + tile + at) + step * (v - after));
        }
    }
}

// LayerNorm of every token, in columns: floats in place, and bytes for the next product.
static void normalise_panel(
    float *residual, const float *moments, const float *gain, const float *shift, float eps, int64_t width, const Scale &scale,
    uint8_t *panel
) {
    Vector factor[tile / lanes], mean[tile / lanes];
    for (int64_t at = 0; at < tile; at += lanes) {
        mean[at / lanes] = load(moments + at);
        const Vector variance = load(moments + tile + at) / static_cast<float>(width) + eps;
        for (int64_t i = 0; i < lanes; ++i) factor[at / lanes][i] = 1.0f / __builtin_sqrtf(variance[i]);
    }
    for (int64_t k = 0; k < width; ++k) {
        Vector v[tile / lanes];
        for (int64_t at = 0; at < tile; at += lanes) {
            const int64_t i = at / lanes;
            v[i] = (load(residual + k * tile + at) - mean[i]) * factor[i] * gain[k] + shift[k];
            store(residual + k * tile + at, v[i]);
        }
        if (panel != nullptr) store_bytes(panel + k * tile, v, scale);
    }
}
