// The pieces of a decoding step for one instruction set (see instruction_sets.h).

// y = gain (x - mean) / sqrt(variance + eps) + shift over one token's features.
static void normalise(const float *x, const float *gain, const float *shift, float eps, float *y, int64_t dim) {
    Vector total = Vector{};
    for (int64_t i = 0; i < dim; i += lanes) total += load(x + i, dim - i);
    const float mean = sum(total) / dim;
    Vector squares = Vector{};
    for (int64_t i = 0; i < dim; i += lanes) {
        Vector d = load(x + i, dim - i) - mean;
        for (int64_t j = dim - i; j < lanes; ++j) d[j] = 0.0f;
        squares += d * d;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / dim + eps);
    for (int64_t i = 0; i < dim; i += lanes)
        store(y + i, (load(x + i, dim - i) - mean) * factor * load(gain + i, dim - i) + load(shift + i, dim - i), dim - i);
}

static inline float dot(const float *a, const float *b, int64_t n) {
    Vector u = Vector{}, v = Vector{};
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
        u += load(a + i) * load(b + i);
        v += load(a + i + lanes) * load(b + i + lanes);
    }
    for (; i < n; i += lanes) u += load(a + i, n - i) * load(b + i, n - i);
    return sum(u + v);
}

// y = W x + bias (+ added) for rows [from, to) of W (rows, columns) and every token of the batch; added may be y itself, or null.
static void product(
    const float *weight, const float *bias, const float *x, const float *added, float *y, int64_t batch, int64_t rows, int64_t columns,
    int64_t from, int64_t to
) {
    for (int64_t b = 0; b < batch; ++b) {
        const float *token = x + b * columns;
        int64_t row = from;
        for (; row + 4 <= to; row += 4) {  // four rows share the loads of the token
            const float *w = weight + row * columns;
            Vector s0 = Vector{}, s1 = Vector{}, s2 = Vector{}, s3 = Vector{};
            int64_t i = 0;
            for (; i + lanes <= columns; i += lanes) {
                const Vector t = load(token + i);
                s0 += load(w + i) * t;
                s1 += load(w + columns + i) * t;
                s2 += load(w + 2 * columns + i) * t;
                s3 += load(w + 3 * columns + i) * t;
            }
            float sums[4] = {sum(s0), sum(s1), sum(s2), sum(s3)};
            for (; i < columns; ++i)
                for (int64_t r = 0; r < 4; ++r) sums[r] += w[r * columns + i] * token[i];
            for (int64_t r = 0; r < 4; ++r) {
                const int64_t at = b * rows + row + r;
                y[at] = sums[r] + (bias == nullptr ? 0.0f : bias[row + r]) + (added == nullptr ? 0.0f : added[at]);
            }
        }
        for (; row < to; ++row) {
            const int64_t at = b * rows + row;
            y[at] = dot(weight + row * columns, token, columns) + (bias == nullptr ? 0.0f : bias[row]) +
                    (added == nullptr ? 0.0f : added[at]);
        }
    }
}

constexpr int64_t together = 256;  // keys whose scores are held at once

static int64_t score_room(const Sizes &z) { return together + (z.width + lanes) / lanes * lanes; }

// One head of one sequence: append its key and value (the group's first head does), then attend to all that is kept.
static void attend(
    const Sizes &z, float scaling, const float *projected, float *keys, float *values, const uint8_t *seen, float *attended, int64_t b,
    int64_t head, float *scores
) {
    const int64_t group = head / (z.heads / z.groups), count = z.past + 1;
    const float *row = projected + b * z.rows(), *q = row + head * z.width;
    const float *new_key = row + (z.heads + group) * z.width, *new_value = row + (z.heads + z.groups + group) * z.width;
    float *k = keys + (b * z.groups + group) * z.capacity * z.width, *v = values + (b * z.groups + group) * z.capacity * z.width;
    if (head % (z.heads / z.groups) == 0) {
        std::memcpy(k + z.past * z.width, new_key, sizeof(float) * z.width);
        std::memcpy(v + z.past * z.width, new_value, sizeof(float) * z.width);
    }
    const uint8_t *visible = seen == nullptr ? nullptr : seen + b * count;
    float *mixed = scores + together, *to = attended + (b * z.heads + head) * z.width;
    float top = -__builtin_inff(), total = 0.0f;
    std::memset(mixed, 0, sizeof(float) * z.width);
    for (int64_t start = 0; start < count; start += together) {
        const int64_t n = start + together < count ? together : count - start;
        float highest = -__builtin_inff();
        for (int64_t t = 0; t < n; ++t) {
            // other heads of the group may be appending the new key in this moment: it is read from where it was made
            const float *key = start + t == z.past ? new_key : k + (start + t) * z.width;
            const bool hidden = visible != nullptr && visible[start + t] == 0;
            scores[t] = hidden ? -__builtin_inff() : dot(q, key, z.width) * scaling;
            if (scores[t] > highest) highest = scores[t];
        }
        if (highest == -__builtin_inff()) continue;
        const float higher = highest > top ? highest : top;
        const float shrink = exp2((Vector{} + (top - higher)) * log2_e)[0];
        if (top != -__builtin_inff() && higher > top) {
            total *= shrink;
            for (int64_t i = 0; i < z.width; ++i) mixed[i] *= shrink;
        }
        top = higher;
        for (int64_t t = 0; t < n; t += lanes) {
            const Vector s = load(scores + t, n - t);
            Vector p = exp2((s - top) * log2_e);
            for (int64_t j = 0; j < lanes; ++j)
                if (t + j >= n || s[j] == -__builtin_inff()) p[j] = 0.0f;
            total += sum(p);
            store(scores + t, p, n - t);
        }
        for (int64_t i = 0; i < z.width; i += 4 * lanes) {  // four vectors of the output stay in registers
            const int64_t left = z.width - i;
            Vector m0 = load(mixed + i, left), m1 = Vector{}, m2 = Vector{}, m3 = Vector{};
            if (left > lanes) m1 = load(mixed + i + lanes, left - lanes);
            if (left > 2 * lanes) m2 = load(mixed + i + 2 * lanes, left - 2 * lanes);
            if (left > 3 * lanes) m3 = load(mixed + i + 3 * lanes, left - 3 * lanes);
            for (int64_t t = 0; t < n; ++t) {
                const float *value = (start + t == z.past ? new_value : v + (start + t) * z.width) + i;
                const float p = scores[t];
                if (left >= 4 * lanes) {
                    m0 += p * load(value);
                    m1 += p * load(value + lanes);
                    m2 += p * load(value + 2 * lanes);
                    m3 += p * load(value + 3 * lanes);
                } else {
                    m0 += p * load(value, left);
                    if (left > lanes) m1 += p * load(value + lanes, left - lanes);
                    if (left > 2 * lanes) m2 += p * load(value + 2 * lanes, left - 2 * lanes);
                    if (left > 3 * lanes) m3 += p * load(value + 3 * lanes, left - 3 * lanes);
                }
            }
            store(mixed + i, m0, left);
            if (left > lanes) store(mixed + i + lanes, m1, left - lanes);
            if (left > 2 * lanes) store(mixed + i + 2 * lanes, m2, left - 2 * lanes);
            if (left > 3 * lanes) store(mixed + i + 3 * lanes, m3, left - 3 * lanes);
        }
    }
    const float share = total > 0.0f ? 1.0f / total : 0.0f;  // a token that may see nothing gets 0
    for (int64_t i = 0; i < z.width; ++i) to[i] = mixed[i] * share;
}

// erf by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7.
static inline Vector erf(Vector z) {
    const Vector zero = Vector{}, a = z < zero ? -z : z, t = 1.0f / (1.0f + 0.3275911f * a);
    Vector p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vector y = 1.0f - p * t * exp2(a * a * -log2_e);
    return z < zero ? -y : y;
}

static void activate(int64_t kind, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes) {
        const Vector v = load(x + i, n - i), zero = Vector{};
        if (kind == relu)
            store(x + i, v > zero ? v : zero, n - i);
        else if (kind == gelu)
            store(x + i, v * 0.5f * (1.0f + erf(v * 0.70710678f)), n - i);
        else  // tanh(u) = 2 sigmoid(2 u) - 1
            store(x + i, v * sigmoid(1.59576912f * (v + 0.044715f * v * v * v)), n - i);
    }
}
