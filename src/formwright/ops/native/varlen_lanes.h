// Attention of one head in one text, and residual sum + norm, for one instruction set (see instruction_sets.h).

static inline float value(const float *from) { return *from; }

static inline float value(const uint16_t *from) {
    const uint32_t bits = (uint32_t)*from << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// Queries at a time, and vectors of keys or of the output: their sums stay in registers.
constexpr int64_t rows_together = FORMWRIGHT_LANES == 16 ? 8 : 4;
constexpr int wide_tile = 2;

// Row j of one head, turned by its position where there is a rotation: x cos + (-upper half, lower half) sin.
template <class Number>
static inline void stage(float *to, const Number *from, int64_t j, const AttentionSizes &z, const AttentionInputs<Number> &in) {
    const int64_t c = z.width;
    for (int64_t i = 0; i < c; i += lanes) store(to + i, load(from + i, c - i), c - i);
    if (in.cosine == nullptr) return;
    const float *cosine = in.cosine + j * c, *sine = in.sine + j * c;
    const int64_t half = c / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = to[i], up = to[half + i];
        to[i] = low * cosine[i] - up * sine[i];
        to[half + i] = up * cosine[half + i] + low * sine[half + i];
    }
}

// Scores in place to exp(score - highest), and their sums. Columns from n on, and beyond the window, count as good as nothing: 2^-125.
template <class Number, class Write>
static inline void soften(
    float *scores, int64_t room, int64_t first, int64_t from, int64_t to, int64_t head, int64_t n, const AttentionSizes &z,
    const AttentionInputs<Number> &in, float *sums, Write write
) {
    Bits column;
    for (int64_t i = 0; i < lanes; ++i) column[i] = (uint32_t)i;
    const Vector nothing = Vector{} - __builtin_inff();
    for (int64_t r = 0; r < rows_together; ++r) {
        float *row = scores + r * room;
        const int64_t query = first + r < n ? first + r : n - 1;
        const int64_t least = z.window < 0 || query < z.window ? 0 : query - z.window;
        const int64_t most = z.window < 0 || query + z.window >= n ? n - 1 : query + z.window;
        float factor = in.scaling;
        if (in.bias != nullptr) {
            const float *bias = in.bias + (head * z.side + query) * z.side;
            for (int64_t j = from; j < to; j += lanes) store(row + j, load(row + j) * in.scaling + load(bias + j, n - j));
            factor = 1.0f;
        }
        for (int64_t j = from; j < to; j += lanes) {
            if (j >= least && j + lanes <= most + 1) continue;
            const Bits at = column + (uint32_t)j;
            store(row + j, (at >= (uint32_t)least) & (at <= (uint32_t)most) ? load(row + j) : nothing);
        }
        Vector top = nothing;
        for (int64_t j = from; j < to; j += lanes) {
            const Vector s = load(row + j);
            top = s > top ? s : top;
        }
        const float scale = factor * log2_e, shift = highest(top) * scale;
        Vector all = Vector{};
        for (int64_t j = from; j < to; j += lanes) {
            const Vector p = exp2(load(row + j) * scale - shift);
            all += p;
            write(row, j, p);
        }
        sums[r] = total(all);
    }
}

template <class Number>
static inline void receive(
    const float *scores, int64_t room, int64_t rows, int64_t from, int64_t to, const float *sums, float *received, int64_t n
) {
    for (int64_t r = 0; r < rows; ++r) {
        const float share = 1.0f / sums[r];
        for (int64_t j = from; j < to && j < n; j += lanes)
            store(received + j, load(received + j, n - j) + load(scores + r * room + j) * share, n - j);
    }
}

// V vectors of keys against the queries.
template <int V>
static inline void score(const float *queries, const float *keys, float *scores, int64_t width, int64_t step, int64_t room) {
    Vector sums[rows_together][V] = {};
    for (int64_t i = 0; i < width; ++i) {
        Vector k[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) k[v] = load(keys + i * room + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows_together; ++r) {
            const float q = queries[r * step + i];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] += k[v] * q;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows_together; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(scores + r * room + v * lanes, sums[r][v]);
}

// V vectors of the output of the queries: sums over keys [from, to).
template <int V, class Number>
static inline void mix(
    const float *scores, const float *values, int64_t from, int64_t to, int64_t step, int64_t room, const float *share, int64_t rows,
    Number *out, int64_t stride, int64_t left
) {
    Vector sums[rows_together][V] = {};
    for (int64_t j = from; j < to; ++j) {
        Vector x[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) x[v] = load(values + j * step + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows_together; ++r) {
            const float p = scores[r * room + j];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] += x[v] * p;
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < V; ++v)
            if (left > v * lanes) store(out + r * stride + v * lanes, sums[r][v] * share[r], left - v * lanes);
}

// Columns of keys that any of the queries from `first` on may see, whole vectors.
static inline void visible(const AttentionSizes &z, int64_t first, int64_t n, int64_t &from, int64_t &to) {
    from = z.window < 0 || first < z.window ? 0 : (first - z.window) / lanes * lanes;
    const int64_t end = z.window < 0 || first + rows_together + z.window > n ? n : first + rows_together + z.window;
    to = up_to_lanes(end);
}

template <class Number>
static void attend(const AttentionSizes &z, const AttentionInputs<Number> &in, int64_t head, int64_t text, float *scratch) {
    constexpr int V = wide_tile;
    const int64_t start = in.border[text], n = in.border[text + 1] - start, c = z.width;
    const int64_t room = up_to_lanes(n), step = up_to_lanes(c);
    if (n == 0) return;
    float *staged = scratch, *keys = staged + n * step, *values = keys + room * step;
    float *queries = values + n * step, *scores = queries + rows_together * step;
    const int64_t at = start * z.stride + head * c;
    for (int64_t j = 0; j < n; ++j) stage(staged + j * step, in.k + at + j * z.stride, j, z, in);
    for (int64_t i = 0; i < c; ++i) {
        for (int64_t j = 0; j < n; ++j) keys[i * room + j] = staged[j * step + i];
        for (int64_t j = n; j < room; ++j) keys[i * room + j] = 0.0f;
    }
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < c; i += lanes) store(values + j * step + i, load(in.v + at + j * z.stride + i, c - i));
    float *received = in.received == nullptr ? nullptr : in.received + head * z.positions + start;
    for (int64_t first = 0; first < n; first += rows_together) {
        const int64_t rows = n - first < rows_together ? n - first : rows_together;
        int64_t from, to;
        visible(z, first, n, from, to);
        for (int64_t r = 0; r < rows_together; ++r) {
            const int64_t row = first + (r < rows ? r : rows - 1);
            stage(queries + r * step, in.q + at + row * z.stride, row, z, in);
        }
        int64_t j = from;
        for (; j + V * lanes <= to; j += V * lanes) score<V>(queries, keys + j, scores + j, c, step, room);
        for (; j < to; j += lanes) score<1>(queries, keys + j, scores + j, c, step, room);
        float sums[rows_together], share[rows_together];
        soften(scores, room, first, from, to, head, n, z, in, sums, [](float *row, int64_t j, Vector p) { store(row + j, p); });
        for (int64_t r = 0; r < rows_together; ++r) share[r] = 1.0f / sums[r];
        if (received != nullptr) receive<Number>(scores, room, rows, from, to, sums, received, n);
        Number *out = in.to + (start + first) * z.to_stride + head * c;
        const int64_t end = to < n ? to : n;
        int64_t i = 0;
        for (; i + V * lanes <= step; i += V * lanes)
            mix<V>(scores, values + i, from, end, step, room, share, rows, out + i, z.to_stride, c - i);
        for (; i < step; i += lanes)
            mix<1>(scores, values + i, from, end, step, room, share, rows, out + i, z.to_stride, c - i);
    }
}

static void attend_floats(const AttentionSizes &z, const AttentionInputs<float> &in, int64_t head, int64_t text, float *scratch) {
    attend(z, in, head, text, scratch);
}

[[maybe_unused]] static void attend_halves(
    const AttentionSizes &z, const AttentionInputs<uint16_t> &in, int64_t head, int64_t text, float *scratch
) {
    attend(z, in, head, text, scratch);
}

template <class Number>
static inline void normalise(const NormInputs<Number> &in, int64_t from, int64_t to, float *row) {
    const int64_t d = in.width;
    for (int64_t t = from; t < to; ++t) {
        const Number *x = in.x + t * d, *added = in.added == nullptr ? nullptr : in.added + t * d;
        Vector sums = Vector{}, squares = Vector{};
        for (int64_t i = 0; i < d; i += lanes) {
            Vector v = load(x + i, d - i);
            if (added != nullptr) v += load(added + i, d - i);
            if (in.total != nullptr) {
                store(in.total + t * d + i, v, d - i);
                v = load(in.total + t * d + i, d - i);  // the norm is of what is stored
            }
            sums += v;
            store(row + i, v);
        }
        const float mean = in.centred ? total(sums) / d : 0.0f;
        for (int64_t i = 0; i < d; i += lanes) {
            Vector v = load(row + i) - mean;
            for (int64_t j = d - i; j < lanes; ++j) v[j] = 0.0f;
            squares += v * v;
        }
        const float factor = 1.0f / __builtin_sqrtf(total(squares) / d + in.eps);
        for (int64_t i = 0; i < d; i += lanes) {
            Vector v = (load(row + i) - mean) * factor * load(in.gain + i, d - i);
            if (in.shift != nullptr) v += load(in.shift + i, d - i);
            store(in.to + t * d + i, v, d - i);
        }
    }
}

static void normalise_floats(const NormInputs<float> &in, int64_t from, int64_t to, float *row) { normalise(in, from, to, row); }

static void normalise_halves(const NormInputs<uint16_t> &in, int64_t from, int64_t to, float *row) { normalise(in, from, to, row); }
