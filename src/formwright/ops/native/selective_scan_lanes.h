// The arithmetic of the selective scan for one instruction set (see instruction_sets.h). One vector holds neighbouring channels; the state
// axis is a loop. Layouts, innermost axis last: scratch rows [steps][lanes], states and A [states][lanes], B and C [steps][states].

// Rows of `count` channels out of a (rows, channels) array into scratch rows of a full vector, the rest zero; and back.
static inline void gather(float *scratch, const float *from, int64_t rows, int64_t channels, int64_t count) {
    for (int64_t t = 0; t < rows; ++t, from += channels, scratch += lanes) {
        store(scratch, load(from, count));
    }
}

static inline void scatter(float *to, const float *scratch, int64_t rows, int64_t channels, int64_t count) {
    for (int64_t t = 0; t < rows; ++t, to += channels, scratch += lanes) {
        store(to, load(scratch), count);
    }
}

// A (channels, states) of one block as [states][lanes], times `scale`.
static inline void transpose(float *to, const float *from, int64_t states, int64_t count, float scale) {
    for (int64_t s = 0; s < states; ++s)
        for (int64_t i = 0; i < lanes; ++i) to[s * lanes + i] = i < count ? from[i * states + s] * scale : 0.0f;
}

static inline void transpose_back(float *to, const float *from, int64_t states, int64_t count) {
    for (int64_t s = 0; s < states; ++s)
        for (int64_t i = 0; i < count; ++i) to[i * states + s] = from[s * lanes + i];
}

static int64_t scan_forward_scratch(const Sizes &z) { return lanes * (2 * z.states + 3 * z.chunk); }

// Channels [first, first + lanes) of one sequence from beginning to end.
static void scan_forward(const Sizes &z, const Inputs &in, const Outputs &out, int64_t b, int64_t first, float *scratch) {
    const int64_t n = z.states, count = z.channels - first < lanes ? z.channels - first : lanes;
    float *decay = scratch, *h = decay + n * lanes, *x = h + n * lanes, *delta = x + z.chunk * lanes, *y = delta + z.chunk * lanes;
    transpose(decay, in.A + first * n, n, count, log2_e);
    transpose(h, in.state + (b * z.channels + first) * n, n, count, 1.0f);
    alignas(64) float skip[lanes];
    gather(skip, in.D + first, 1, 0, count);
    for (int64_t start = 0, k = 0; start < z.length; start += z.chunk, ++k) {
        const int64_t steps = z.length - start < z.chunk ? z.length - start : z.chunk;
        const int64_t at = (b * z.length + start) * z.channels + first;
        const float *B = in.B + (b * z.length + start) * n, *C = in.C + (b * z.length + start) * n;
        scatter(out.borders + (b * (z.chunks() + 1) + k) * n * z.channels + first, h, n, z.channels, count);
        gather(x, in.x + at, steps, z.channels, count);
        gather(delta, in.delta + at, steps, z.channels, count);
        for (int64_t t = 0; t < steps; ++t, B += n, C += n) {
            const Vector d = load(delta + t * lanes), dx = d * load(x + t * lanes);
            Vector y_t = load(skip) * load(x + t * lanes);
            for (int64_t s = 0; s < n; ++s) {
                const Vector next = exp2(d * load(decay + s * lanes)) * load(h + s * lanes) + dx * B[s];
                store(h + s * lanes, next);
                y_t += next * C[s];
            }
            store(y + t * lanes, y_t);
        }
        scatter(out.y + at, y, steps, z.channels, count);
    }
    scatter(out.borders + (b * (z.chunks() + 1) + z.chunks()) * n * z.channels + first, h, n, z.channels, count);
    transpose_back(out.final_state + (b * z.channels + first) * n, h, n, count);
}

// Per block of channels: A, A log2(e), dA, g and skip, dskip; once: a, h, dB, dC of a chunk and x, delta, dy, dx, ddelta rows.
static int64_t scan_backward_scratch(const Sizes &z, int64_t blocks) {
    return lanes * (blocks * (4 * z.states + 2) + 4 * z.chunk * z.states + z.states + 5 * z.chunk);
}

// Every `groups`-th block of channels, from `group` on, of one sequence: from the last chunk to the first, each recomputed from the
// state at its start. The blocks of a chunk follow one another, so that dB and dC are summed over channels in one small buffer.
static void scan_backward(
    const Sizes &z, const Inputs &in, const Gradients &grad, int64_t b, int64_t group, int64_t groups, float *scratch
) {
    const int64_t n = z.states, row = n * lanes, all = (z.channels + lanes - 1) / lanes;
    const int64_t blocks = (all - group + groups - 1) / groups;
    float *A = scratch, *decay = A + blocks * row, *dA = decay + blocks * row, *g = dA + blocks * row;
    float *skip = g + blocks * row, *dskip = skip + blocks * lanes;
    float *a = dskip + blocks * lanes, *h = a + z.chunk * row, *dB = h + (z.chunk + 1) * row, *dC = dB + z.chunk * row;
    float *x = dC + z.chunk * row, *delta = x + z.chunk * lanes, *dy = delta + z.chunk * lanes;
    float *dx = dy + z.chunk * lanes, *ddelta = dx + z.chunk * lanes;
    for (int64_t j = 0; j < blocks; ++j) {
        const int64_t first = (group + j * groups) * lanes, count = z.channels - first < lanes ? z.channels - first : lanes;
        transpose(A + j * row, in.A + first * n, n, count, 1.0f);
        transpose(decay + j * row, in.A + first * n, n, count, log2_e);
        transpose(g + j * row, grad.final_state + (b * z.channels + first) * n, n, count, 1.0f);
        gather(skip + j * lanes, in.D + first, 1, 0, count);
    }
    std::memset(dA, 0, sizeof(float) * blocks * row);
    std::memset(dskip, 0, sizeof(float) * blocks * lanes);
    for (int64_t k = z.chunks() - 1; k >= 0; --k) {
        const int64_t start = k * z.chunk, steps = z.length - start < z.chunk ? z.length - start : z.chunk;
        const float *B = in.B + (b * z.length + start) * n, *C = in.C + (b * z.length + start) * n;
        std::memset(dB, 0, sizeof(float) * steps * row);
        std::memset(dC, 0, sizeof(float) * steps * row);
        for (int64_t j = 0; j < blocks; ++j) {
            const int64_t first = (group + j * groups) * lanes, count = z.channels - first < lanes ? z.channels - first : lanes;
            const int64_t at = (b * z.length + start) * z.channels + first;
            gather(x, in.x + at, steps, z.channels, count);
            gather(delta, in.delta + at, steps, z.channels, count);
            gather(dy, grad.y + at, steps, z.channels, count);
            gather(h, in.borders + (b * (z.chunks() + 1) + k) * n * z.channels + first, n, z.channels, count);
            const float *block_decay = decay + j * row, *block_A = A + j * row;
            for (int64_t t = 0; t < steps; ++t) {
                const Vector d = load(delta + t * lanes), dx_t = d * load(x + t * lanes);
                for (int64_t s = 0; s < n; ++s) {
                    const Vector a_t = exp2(d * load(block_decay + s * lanes));
                    store(a + t * row + s * lanes, a_t);
                    store(h + (t + 1) * row + s * lanes, a_t * load(h + t * row + s * lanes) + dx_t * B[t * n + s]);
                }
            }
            float *block_g = g + j * row, *block_dA = dA + j * row;
            Vector skip_sum = load(dskip + j * lanes);
            for (int64_t t = steps - 1; t >= 0; --t) {
                const Vector d = load(delta + t * lanes), x_t = load(x + t * lanes), dy_t = load(dy + t * lanes), dx_t = d * x_t;
                const float *before = h + t * row, *after = before + row, *a_t = a + t * row;
                float *dB_t = dB + t * row, *dC_t = dC + t * row;
                Vector through_A = Vector{}, through_B = Vector{};
                for (int64_t s = 0; s < n; ++s) {
                    const int64_t i = s * lanes;
                    Vector g_s = load(block_g + i) + dy_t * C[t * n + s];
                    store(dC_t + i, load(dC_t + i) + dy_t * load(after + i));
                    store(dB_t + i, load(dB_t + i) + g_s * dx_t);
                    through_B += g_s * B[t * n + s];
                    g_s *= load(a_t + i);
                    store(block_g + i, g_s);
                    const Vector exponent = g_s * load(before + i);
                    through_A += exponent * load(block_A + i);
                    store(block_dA + i, load(block_dA + i) + exponent * d);
                }
                skip_sum += dy_t * x_t;
                store(dx + t * lanes, through_B * d + dy_t * load(skip + j * lanes));
                store(ddelta + t * lanes, through_A + through_B * x_t);
            }
            store(dskip + j * lanes, skip_sum);
            scatter(grad.dx + at, dx, steps, z.channels, count);
            scatter(grad.ddelta + at, ddelta, steps, z.channels, count);
        }
        float *to_B = grad.dB + ((b * groups + group) * z.length + start) * n;
        float *to_C = grad.dC + ((b * groups + group) * z.length + start) * n;
        for (int64_t i = 0; i < steps * n; ++i) {
            to_B[i] = sum(load(dB + i * lanes));
            to_C[i] = sum(load(dC + i * lanes));
        }
    }
    for (int64_t j = 0; j < blocks; ++j) {
        const int64_t first = (group + j * groups) * lanes, count = z.channels - first < lanes ? z.channels - first : lanes;
        transpose_back(grad.dA + (b * z.channels + first) * n, dA + j * row, n, count);
        transpose_back(grad.dstate + (b * z.channels + first) * n, g + j * row, n, count);
        scatter(grad.dD + b * z.channels + first, dskip + j * lanes, 1, 0, count);
    }
}
