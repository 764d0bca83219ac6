// Mamba's causal convolution, and a whole decoding step of its inner part, for one instruction set (see instruction_sets.h).

// Weights (channels, taps) and biases as [taps + 1][row], the biases last; row is a multiple of lanes.
static inline void arrange(float *to, const Convolution &z, int64_t row) {
    std::memset(to, 0, sizeof(float) * (z.taps + 1) * row);
    for (int64_t i = 0; i < z.channels; ++i) {
        for (int64_t k = 0; k < z.taps; ++k) to[k * row + i] = z.weight[i * z.taps + k];
        to[z.taps * row + i] = z.bias[i];
    }
}

// The convolution at token t of one sequence, for the channels from i on; what lies before the first token is zero.
static inline Vector convolve(const Convolution &z, const float *x, const float *weight, int64_t row, int64_t t, int64_t i) {
    Vector v = load(weight + z.taps * row + i);
    for (int64_t k = t < z.taps - 1 ? z.taps - 1 - t : 0; k < z.taps; ++k)
        v += load(weight + k * row + i) * load(x + (t - z.taps + 1 + k) * z.token_stride + i, z.channels - i);
    return v;
}

static int64_t ring_size(const Convolution &z) {  // a power of two, which saves a division
    int64_t rows = 1;
    while (rows < z.taps) rows *= 2;
    return rows;
}

static int64_t conv_scratch(const Convolution &z) {
    return (2 * z.taps + 2 + ring_size(z)) * ((z.channels + lanes - 1) / lanes * lanes);
}

// Tokens [from, to) of sequence b: y = SiLU(conv(x)).
static void conv_forward(const Convolution &z, float *y, int64_t b, int64_t from, int64_t to, float *scratch) {
    const int64_t row = (z.channels + lanes - 1) / lanes * lanes;
    arrange(scratch, z, row);
    const float *x = z.x + b * z.batch_stride;
    for (int64_t t = from; t < to; ++t)
        for (int64_t i = 0; i < z.channels; i += lanes) {
            const Vector v = convolve(z, x, scratch, row, t, i);
            store(y + (b * z.length + t) * z.channels + i, v * sigmoid(v), z.channels - i);
        }
}

// Gradients at tokens [from, to) of sequence b, from the last to the first. A ring of `taps` rows or more holds the gradients of what enters SiLU,
// beginning taps - 1 tokens later. dweight (taps + 1, channels), the biases' last, sums over these tokens.
static void conv_backward(
    const Convolution &z, const float *dy, float *dx, float *dweight, int64_t b, int64_t from, int64_t to, float *scratch
) {
    const int64_t row = (z.channels + lanes - 1) / lanes * lanes, mask = ring_size(z) - 1;
    float *weight = scratch, *sums = weight + (z.taps + 1) * row, *ring = sums + (z.taps + 1) * row;
    arrange(weight, z, row);
    std::memset(sums, 0, sizeof(float) * (z.taps + 1) * row);
    const float *x = z.x + b * z.batch_stride;
    const int64_t last = to + z.taps - 1 < z.length ? to + z.taps - 1 : z.length;
    for (int64_t t = last - 1; t >= from; --t)
        for (int64_t i = 0; i < z.channels; i += lanes) {
            const int64_t count = z.channels - i;
            const Vector v = convolve(z, x, weight, row, t, i), s = sigmoid(v);
            const Vector g = load(dy + (b * z.length + t) * z.channels + i, count) * s * (1.0f + v * (1.0f - s));
            store(ring + (t & mask) * row + i, g);
            if (t >= to) continue;
            Vector total = Vector{};
            for (int64_t k = 0; k < z.taps; ++k) {
                const int64_t later = t + z.taps - 1 - k, earlier = t - z.taps + 1 + k;
                if (later < z.length) total += load(weight + k * row + i) * load(ring + (later & mask) * row + i);
                if (earlier >= 0) store(sums + k * row + i, load(sums + k * row + i) + g * load(x + earlier * z.token_stride + i, count));
            }
            store(sums + z.taps * row + i, load(sums + z.taps * row + i) + g);
            store(dx + (b * z.length + t) * z.channels + i, total, count);
        }
    for (int64_t k = 0; k <= z.taps; ++k) std::memcpy(dweight + k * z.channels, sums + k * row, sizeof(float) * z.channels);
}

static inline float dot(const float *a, const float *b, int64_t n) {
    Vector total = Vector{};
    for (int64_t i = 0; i < n; i += lanes) total += load(a + i, n - i) * load(b + i, n - i);
    return sum(total);
}

static int64_t step_scratch(const Step &z) { return 3 * (z.channels + lanes) + z.rank + 2 * z.states; }

// One token of sequence b between the two projections: convolution, maps, scan and gate.
static void step(const Step &z, int64_t b, float *scratch) {
    const int64_t c = z.channels, n = z.states, kept = z.taps - 1;
    float *u = scratch, *delta = u + c + lanes, *y = delta + c + lanes, *maps = y + c + lanes;
    const float *x = z.xz + b * 2 * c, *gate = x + c, *before = z.window + b * kept * c;
    float *after = z.next_window + b * kept * c;
    for (int64_t i = 0; i < c; ++i) {
        const float *w = z.conv_weight + i * z.taps;
        float v = z.conv_bias[i] + w[kept] * x[i];
        for (int64_t k = 0; k < kept; ++k) v += w[k] * before[k * c + i];
        u[i] = v;
    }
    for (int64_t i = 0; i < c; i += lanes) {
        const Vector v = load(u + i, c - i);
        store(u + i, v * sigmoid(v), c - i);
    }
    if (z.real != nullptr && z.real[b] == 0) std::memset(u, 0, sizeof(float) * c);
    if (kept > 0) {
        std::memcpy(after, before + c, sizeof(float) * (kept - 1) * c);
        std::memcpy(after + (kept - 1) * c, x, sizeof(float) * c);
    }
    for (int64_t j = 0; j < z.rank + 2 * n; ++j) maps[j] = dot(z.x_weight + j * c, u, c);
    for (int64_t i = 0; i < c; ++i) delta[i] = z.dt_bias[i] + dot(z.dt_weight + i * z.rank, maps, z.rank);
    for (int64_t i = 0; i < c; i += lanes) store(delta + i, softplus(load(delta + i, c - i)), c - i);
    const float *B = maps + z.rank, *C = B + n;
    for (int64_t i = 0; i < c; ++i) {
        const float *h = z.state + (b * c + i) * n, *A_log = z.A_log + i * n;
        float *next = z.next_state + (b * c + i) * n;
        Vector total = Vector{};
        for (int64_t s = 0; s < n; s += lanes) {
            const int64_t count = n - s;
            const Vector rate = exp2(load(A_log + s, count) * log2_e) * -log2_e;
            const Vector v = exp2(rate * delta[i]) * load(h + s, count) + load(B + s, count) * (delta[i] * u[i]);
            store(next + s, v, count);
            total += v * load(C + s, count);
        }
        y[i] = sum(total) + z.D[i] * u[i];
    }
    for (int64_t i = 0; i < c; i += lanes) {
        const Vector v = load(gate + i, c - i);
        store(z.y + b * c + i, load(y + i, c - i) * v * sigmoid(v), c - i);
    }
}
