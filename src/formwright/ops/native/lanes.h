// Vector arithmetic for one instruction set. No include guard: instruction_sets.h includes it once for each set, in a namespace of its
// own, with FORMWRIGHT_LANES floats to a vector. Nothing in such a namespace may instantiate a library template: the linker would share
// its code between instruction sets.

constexpr int64_t lanes = FORMWRIGHT_LANES;
typedef float Vector __attribute__((vector_size(FORMWRIGHT_LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(FORMWRIGHT_LANES * 4)));

static inline int64_t up_to_lanes(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

static inline Vector load(const float *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float *to, Vector v) { std::memcpy(to, &v, sizeof v); }

// The first `count` lanes, the others zero; a whole vector when count is `lanes` or more.
static inline Vector load(const float *from, int64_t count) {
    if (count >= lanes) return load(from);
    Vector v = Vector{};
    for (int64_t i = 0; i < count; ++i) v[i] = from[i];
    return v;
}

static inline void store(float *to, Vector v, int64_t count) {
    if (count >= lanes) return store(to, v);
    for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

static inline float sum(Vector v) {
    float total = 0.0f;
    for (int64_t i = 0; i < lanes; ++i) total += v[i];
    return total;
}

static inline float total(Vector v) {
#if defined(__AVX512F__) && FORMWRIGHT_LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    return sum(v);
#endif
}

static inline float highest(Vector v) {
#if defined(__AVX512F__) && FORMWRIGHT_LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int64_t i = 1; i < lanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// 2^z to 1 ulp. Rounding z to an integer by adding 1.5 * 2^23 leaves that integer in the low bits, where it is shifted into the exponent;
// the rest, in [-1/2, 1/2], goes through a polynomial of degree 6. Below 2^-125 and above 2^127 it saturates.
static inline Vector exp2(Vector z) {
    const Vector low = Vector{} - 125.0f, high = Vector{} + 127.0f, round = Vector{} + 12582912.0f;
    z = z < low ? low : z;
    z = z > high ? high : z;
    const Vector shifted = z + round;
    const Vector f = z - (shifted - round);
    Vector p = f * 1.5461445e-4f + 1.3400428e-3f;
    p = p * f + 9.6180567e-3f;
    p = p * f + 5.5503272e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314721e-1f;
    p = p * f + 1.0f;
    return (Vector)((Bits)p + ((Bits)shifted << 23));
}

static inline Vector sigmoid(Vector z) { return 1.0f / (1.0f + exp2(z * -log2_e)); }

// log(1 + e^z) = max(z, 0) + log(1 + e^-|z|); the logarithm is 2 artanh of s in (0, 1/3], by its series.
static inline Vector softplus(Vector z) {
    const Vector zero = Vector{};
    const Vector e = exp2((z < zero ? z : -z) * log2_e), s = e / (2.0f + e), q = s * s;
    Vector p = q * (1.0f / 13) + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return (z > zero ? z : zero) + 2.0f * s * p;
}

typedef uint16_t Halves __attribute__((vector_size(FORMWRIGHT_LANES * 2)));

// A bfloat16 is the upper half of a float; back, to the nearest and of two equally near to the even one.
static inline Vector load(const uint16_t *from) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return (Vector)(__builtin_convertvector(h, Bits) << 16);
}

static inline void store(uint16_t *to, Vector v) {
    const Bits bits = (Bits)v;
    const Halves h = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
    std::memcpy(to, &h, sizeof h);
}

static inline Vector load(const uint16_t *from, int64_t count) {
    if (count >= lanes) return load(from);
    uint16_t whole[lanes] = {};
    for (int64_t i = 0; i < count; ++i) whole[i] = from[i];
    return load(whole);
}

static inline void store(uint16_t *to, Vector v, int64_t count) {
    if (count >= lanes) return store(to, v);
    uint16_t whole[lanes];
    store(whole, v);
    for (int64_t i = 0; i < count; ++i) to[i] = whole[i];
}
