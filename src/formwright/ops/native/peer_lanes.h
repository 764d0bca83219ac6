// Rows of a table in float32 or bfloat16, taken four at a time so that what they share is loaded once.

template <class Number>
static inline void prefetch(const Number *row, int64_t width) {
    const char *from = (const char *)row;
    for (int64_t i = 0; i < width * (int64_t)sizeof(Number); i += 64) __builtin_prefetch(from + i);
}

// The rows of four indices; those behind the last are the last once more.
template <class Number>
static inline void four_rows(const Number *table, const int64_t *index, int64_t j, int64_t chosen, int64_t width, const Number *rows[4]) {
    for (int64_t u = 0; u < 4; ++u) rows[u] = table + index[j + u < chosen ? j + u : chosen - 1] * width;
}

// y += the sum over u of w[u] rows[u]
template <class Number>
static inline void add_four(float *y, const float *w, const Number *const rows[4], int64_t width) {
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        const Vector low = load(rows[0] + i) * w[0] + load(rows[1] + i) * w[1];
        const Vector high = load(rows[2] + i) * w[2] + load(rows[3] + i) * w[3];
        store(y + i, load(y + i) + low + high);
    }
    if (i < width) {
        const int64_t rest = width - i;
        Vector sums = load(y + i, rest);
        for (int64_t u = 0; u < 4; ++u) sums += load(rows[u] + i, rest) * w[u];
        store(y + i, sums, rest);
    }
}

template <class Number>
static void row_dots(
    const RowSizes &z, const float *x, const Number *table, const int64_t *index, float *out, int64_t first, int64_t last
) {
    const Number *rows[4], *next[4];
    for (int64_t t = first; t < last; ++t) {
        const float *token = x + t * z.width;
        const int64_t *chosen = index + t * z.chosen;
        for (int64_t j = 0; j < z.chosen; j += 4) {
            four_rows(table, chosen, j, z.chosen, z.width, rows);
            four_rows(table, chosen, j + 4, z.chosen, z.width, next);
            for (int64_t u = 0; u < 4; ++u) prefetch(next[u], z.width);
            Vector sums[4] = {};
            int64_t i = 0;
            for (; i + lanes <= z.width; i += lanes) {
                const Vector v = load(token + i);
                for (int64_t u = 0; u < 4; ++u) sums[u] += load(rows[u] + i) * v;
            }
            if (i < z.width)
                for (int64_t u = 0; u < 4; ++u) sums[u] += load(rows[u] + i, z.width - i) * load(token + i, z.width - i);
            for (int64_t u = 0; u < 4 && j + u < z.chosen; ++u) out[t * z.chosen + j + u] = total(sums[u]);
        }
    }
}

template <class Number>
static void row_sums(
    const RowSizes &z, const float *w, const Number *table, const int64_t *index, float *out, int64_t first, int64_t last
) {
    const Number *rows[4], *next[4];
    for (int64_t t = first; t < last; ++t) {
        float *y = out + t * z.width;
        const int64_t *chosen = index + t * z.chosen;
        std::memset(y, 0, sizeof(float) * z.width);
        for (int64_t j = 0; j < z.chosen; j += 4) {
            four_rows(table, chosen, j, z.chosen, z.width, rows);
            four_rows(table, chosen, j + 4, z.chosen, z.width, next);
            for (int64_t u = 0; u < 4; ++u) prefetch(next[u], z.width);
            float weights[4] = {};
            for (int64_t u = 0; u < 4 && j + u < z.chosen; ++u) weights[u] = w[t * z.chosen + j + u];
            add_four(y, weights, rows, z.width);
        }
    }
}

// The rows `first` to `last` of out; `pairs` holds, from borders[row] on, where in index the row stands.
static void row_scatter(
    const RowSizes &z, const float *w, const float *x, const int64_t *pairs, const int64_t *borders, float *out, int64_t first,
    int64_t last
) {
    for (int64_t row = first; row < last; ++row) {
        float *y = out + row * z.width;
        std::memset(y, 0, sizeof(float) * z.width);
        for (int64_t p = borders[row]; p < borders[row + 1]; p += 4) {
            float weights[4] = {};
            const float *tokens[4];
            for (int64_t u = 0; u < 4; ++u) {
                const bool there = p + u < borders[row + 1];
                const int64_t pair = pairs[there ? p + u : p];
                if (there) weights[u] = w[pair];
                tokens[u] = x + pair / z.chosen * z.width;
            }
            add_four(y, weights, tokens, z.width);
        }
    }
}

// The highest scores met, falling, and where they were met.
struct Highest {
    float *scores;
    int32_t *places;
    int64_t wanted;
    float least() const { return scores[wanted - 1]; }
};

static inline void begin(Highest &h) {
    for (int64_t i = 0; i < h.wanted; ++i) h.scores[i] = -__builtin_huge_valf(), h.places[i] = (int32_t)i;
}

static inline void insert(Highest &h, float score, int32_t place) {
    int64_t i = h.wanted - 1;
    for (; i > 0 && h.scores[i - 1] < score; --i) h.scores[i] = h.scores[i - 1], h.places[i] = h.places[i - 1];
    h.scores[i] = score, h.places[i] = place;
}

static void highest_of(const float *scores, int64_t n, Highest &h) {
    begin(h);
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        if (!(highest(load(scores + i)) > h.least())) continue;
        for (int64_t l = i; l < i + lanes; ++l)
            if (scores[l] > h.least()) insert(h, scores[l], (int32_t)l);
    }
    for (; i < n; ++i)
        if (scores[i] > h.least()) insert(h, scores[i], (int32_t)i);
}

// Of the n^2 sums a_i + b_j the highest k, as i n + j. With both lists falling, a sum has at least (i + 1)(j + 1) - 1 before it.
static void top_pairs(
    const float *a, const float *b, int64_t *out, int64_t n, int64_t k, int64_t first, int64_t last, float *scratch
) {
    const int64_t each = k < n ? k : n;
    int32_t *places = (int32_t *)(scratch + 3 * k);
    Highest left{scratch, places, each}, right{scratch + k, places + k, each}, best{scratch + 2 * k, places + 2 * k, k};
    for (int64_t row = first; row < last; ++row) {
        highest_of(a + row * n, n, left);
        highest_of(b + row * n, n, right);
        begin(best);
        for (int64_t i = 0; i < each; ++i)
            for (int64_t j = 0; j < each && (i + 1) * (j + 1) <= k; ++j) {
                const float score = left.scores[i] + right.scores[j];
                if (!(score > best.least())) break;
                insert(best, score, (int32_t)(left.places[i] * n + right.places[j]));
            }
        for (int64_t i = 0; i < k; ++i) out[row * k + i] = best.places[i];
    }
}
