// Attention of one head in one text on products of pairs of bfloat16 (AVX-512 BF16): sixteen sums of two products an instruction.

static inline __m512 load_pairs(const uint32_t *from) { return _mm512_loadu_ps(from); }

static inline __m512 add_products(__m512 sums, uint32_t one, __m512 many) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32((int)one), (__m512bh)many);
}

static inline void store_halves(uint16_t *to, __m512 v) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(v)); }

// Sixteen rows of sixteen pairs, transposed.
static inline void transpose_pairs(const uint32_t *from, int64_t step, uint32_t *to, int64_t room) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * step);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // r[i + 4 g] holds, in its 128-bit quarter a, column 4 a + i of rows 4 g to 4 g + 3
        const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), up = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), up_odd = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        _mm512_storeu_si512(to + i * room, _mm512_shuffle_i32x4(low, up, 0x88));
        _mm512_storeu_si512(to + (8 + i) * room, _mm512_shuffle_i32x4(low, up, 0xdd));
        _mm512_storeu_si512(to + (4 + i) * room, _mm512_shuffle_i32x4(low_odd, up_odd, 0x88));
        _mm512_storeu_si512(to + (12 + i) * room, _mm512_shuffle_i32x4(low_odd, up_odd, 0xdd));
    }
}

template <int V>
static inline void score_pairs(const uint32_t *queries, const uint32_t *keys, float *scores, int64_t pairs, int64_t step, int64_t room) {
    __m512 sums[rows_together][V];
#pragma GCC unroll 8
    for (int r = 0; r < rows_together; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; ++i) {
        __m512 k[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) k[v] = load_pairs(keys + i * room + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows_together; ++r) {
            const uint32_t q = queries[r * step + i];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] = add_products(sums[r][v], q, k[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows_together; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(scores + r * room + v * lanes, sums[r][v]);
}

// `scores` holds pairs of neighbouring keys, `values` pairs of neighbouring rows.
template <int V>
static inline void mix_pairs(
    const uint32_t *scores, const uint32_t *values, int64_t from, int64_t to, int64_t step, int64_t room, const float *share, int64_t rows,
    uint16_t *out, int64_t stride, int64_t left
) {
    __m512 sums[rows_together][V];
#pragma GCC unroll 8
    for (int r = 0; r < rows_together; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int64_t j = from; j < to; ++j) {
        __m512 x[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) x[v] = load_pairs(values + j * step + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows_together; ++r) {
            const uint32_t p = scores[r * room + j];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] = add_products(sums[r][v], p, x[v]);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 factor = _mm512_set1_ps(share[r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            if (left >= (v + 1) * lanes) store_halves(out + r * stride + v * lanes, _mm512_mul_ps(sums[r][v], factor));
            else if (left > v * lanes) store(out + r * stride + v * lanes, (Vector)_mm512_mul_ps(sums[r][v], factor), left - v * lanes);
        }
    }
}

// A row as bfloat16, turned where there is a rotation, zeros up to a whole vector of pairs.
static inline void stage_pairs(
    uint16_t *to, const uint16_t *from, int64_t j, int64_t step, const AttentionSizes &z, const AttentionInputs<uint16_t> &in, float *row
) {
    const int64_t c = z.width;
    if (in.cosine == nullptr) {
        std::memcpy(to, from, sizeof(uint16_t) * c);
    } else {
        stage(row, from, j, z, in);
        for (int64_t i = 0; i < c; i += lanes) store(to + i, load(row + i, c - i), c - i);
    }
    if (2 * step > c) std::memset(to + c, 0, sizeof(uint16_t) * (2 * step - c));
}

static void attend_pairs(const AttentionSizes &z, const AttentionInputs<uint16_t> &in, int64_t head, int64_t text, float *scratch) {
    const int64_t start = in.border[text], n = in.border[text + 1] - start, c = z.width;
    if (n == 0) return;
    const int64_t room = up_to_lanes(n), step = up_to_lanes((c + 1) / 2), wide = up_to_lanes(c);
    uint32_t *staged = (uint32_t *)scratch, *keys = staged + room * step, *values = keys + room * step;
    uint32_t *queries = values + room / 2 * wide;
    float *row = (float *)(queries + rows_together * step), *scores = row + wide;
    const int64_t at = start * z.stride + head * c;
    for (int64_t j = 0; j < n; ++j) stage_pairs((uint16_t *)(staged + j * step), in.k + at + j * z.stride, j, step, z, in, row);
    std::memset(staged + n * step, 0, sizeof(uint32_t) * (room - n) * step);
    for (int64_t j = 0; j < room; j += lanes)
        for (int64_t i = 0; i < step; i += lanes) transpose_pairs(staged + j * step + i, step, keys + i * room + j, room);
    const __m512i even = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0
    );
    for (int64_t j = 0; j < n; j += 2) {
        const uint16_t *one = in.v + at + j * z.stride, *two = one + z.stride;
        for (int64_t i = 0; i < wide; i += lanes) {  // sixteen columns of two rows, interleaved
            const int64_t left = c - i;
            const __mmask16 seen = left >= lanes ? 0xffff : (__mmask16)((1u << left) - 1u);
            const __m256i a = _mm256_maskz_loadu_epi16(seen, one + i);
            const __m256i b = j + 1 < n ? _mm256_maskz_loadu_epi16(seen, two + i) : _mm256_setzero_si256();
            _mm512_storeu_si512(
                values + j / 2 * wide + i, _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), even, _mm512_castsi256_si512(b))
            );
        }
    }
    float *received = in.received == nullptr ? nullptr : in.received + head * z.positions + start;
    for (int64_t first = 0; first < n; first += rows_together) {
        const int64_t rows = n - first < rows_together ? n - first : rows_together;
        int64_t from, to;
        visible(z, first, n, from, to);
        for (int64_t r = 0; r < rows_together; ++r) {
            const int64_t query = first + (r < rows ? r : rows - 1);
            stage_pairs((uint16_t *)(queries + r * step), in.q + at + query * z.stride, query, step, z, in, row);
        }
        const int64_t pairs = (c + 1) / 2;
        int64_t j = from;
        for (; j + 2 * lanes <= to; j += 2 * lanes) score_pairs<2>(queries, keys + j, scores + j, pairs, step, room);
        if (j < to) score_pairs<1>(queries, keys + j, scores + j, pairs, step, room);
        float sums[rows_together], share[rows_together];
        if (received == nullptr) {
            // in place: a bfloat16 is written where a float was read before
            soften(scores, room, first, from, to, head, n, z, in, sums, [](float *row, int64_t j, Vector p) {
                store_halves((uint16_t *)row + j, (__m512)p);
            });
        } else {
            soften(scores, room, first, from, to, head, n, z, in, sums, [](float *row, int64_t j, Vector p) { store(row + j, p); });
            receive<uint16_t>(scores, room, rows, from, to, sums, received, n);
            for (int64_t r = 0; r < rows_together; ++r)
                for (int64_t k = from; k < to; k += lanes)
                    store_halves((uint16_t *)(scores + r * room) + k, _mm512_loadu_ps(scores + r * room + k));
        }
        for (int64_t r = 0; r < rows_together; ++r) share[r] = 1.0f / sums[r];
        uint16_t *out = in.to + (start + first) * z.to_stride + head * c;
        const uint32_t *shares = (const uint32_t *)scores;
        const int64_t end = ((to < n ? to : n) + 1) / 2;
        int64_t i = 0;
        for (; i + 2 * lanes <= wide; i += 2 * lanes)
            mix_pairs<2>(shares, values + i, from / 2, end, wide, room, share, rows, out + i, z.to_stride, c - i);
        if (i < wide) mix_pairs<1>(shares, values + i, from / 2, end, wide, room, share, rows, out + i, z.to_stride, c - i);
    }
}
