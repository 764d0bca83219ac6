// Selective scan on CPUs, forward and backward, float32, with a plain C interface.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t        y_t = C_t . h_t + D x_t
//
// The (length, channels, states) array of hidden states is never stored: the forward keeps the state at the start of each chunk, the
// backward recomputes a chunk from it in a buffer that fits the cache. Work is shared out over sequences and blocks of channels. The
// arithmetic (selective_scan_lanes.h) is compiled for several instruction sets and the best that this processor has is taken at run time.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FORMWRIGHT_X86 1
#include <immintrin.h>
#endif

#if defined(_WIN32)
#define FORMWRIGHT_EXPORT extern "C" __declspec(dllexport)
#else
#define FORMWRIGHT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr float log2_e = 1.4426950408889634f;

struct Sizes {
    int64_t batch, length, channels, states, chunk;
    int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

struct Inputs {
    const float *x, *delta, *A, *B, *C, *D, *state, *borders;
};

struct Outputs {
    float *y, *final_state, *borders;  // borders (batch, chunks + 1, states, channels): the states before each chunk and after the last
};

struct Gradients {
    const float *y, *final_state;
    float *dx, *ddelta, *dA, *dB, *dC, *dD, *dstate;  // dA and dD a sequence each, dB and dC a group of channels each
};

namespace portable {
#define FORMWRIGHT_LANES 4
#include "selective_scan_lanes.h"
#undef FORMWRIGHT_LANES
}  // namespace portable

#ifdef FORMWRIGHT_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define FORMWRIGHT_LANES 8
#include "selective_scan_lanes.h"
#undef FORMWRIGHT_LANES
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif
namespace avx512 {
#define FORMWRIGHT_LANES 16
#include "selective_scan_lanes.h"
#undef FORMWRIGHT_LANES
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

struct Kernels {
    const char *name;
    int64_t lanes;
    int64_t (*forward_scratch)(const Sizes &);
    void (*forward)(const Sizes &, const Inputs &, const Outputs &, int64_t, int64_t, float *);
    int64_t (*backward_scratch)(const Sizes &, int64_t);
    void (*backward)(const Sizes &, const Inputs &, const Gradients &, int64_t, int64_t, int64_t, float *);
};

#define FORMWRIGHT_KERNELS(isa, name) \
    {name, isa::lanes, isa::forward_scratch, isa::forward, isa::backward_scratch, isa::backward}

const Kernels &kernels() {
    static const Kernels best = []() -> Kernels {
#ifdef FORMWRIGHT_X86
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f")) return FORMWRIGHT_KERNELS(avx512, "AVX-512");
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FORMWRIGHT_KERNELS(avx2, "AVX2");
#endif
        return FORMWRIGHT_KERNELS(portable, "portable");
    }();
    return best;
}

// A state that decays under zero input runs into denormal numbers, which some processors handle a hundred times slower.
struct FlushDenormals {
#ifdef FORMWRIGHT_X86
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040u); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

struct Scratch {
    float *data;
    explicit Scratch(int64_t floats)
        : data(static_cast<float *>(::operator new(sizeof(float) * floats, std::align_val_t(64), std::nothrow))) {}
    ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
};

// Runs work(item, scratch) for every item, each thread with its own scratch. 0 = done, 1 = out of memory.
template <class Work>
int share_out(int64_t items, int64_t floats, int64_t threads, Work work) {
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads < items ? (threads > 0 ? threads : 1) : (items > 0 ? items : 1)))
#endif
    {
        FlushDenormals flush;
        Scratch scratch(floats);
        if (scratch.data == nullptr) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = 1;
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t item = 0; item < items; ++item) {
            if (scratch.data != nullptr) work(item, scratch.data);
        }
    }
    return failed;
}

int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

}  // namespace

FORMWRIGHT_EXPORT const char *formwright_instruction_set() { return kernels().name; }

// Into how many groups the backward splits the channels of a sequence: as few as keep all threads busy, since each has its own dB and dC.
FORMWRIGHT_EXPORT int64_t formwright_scan_groups(int64_t batch, int64_t channels, int64_t threads) {
    if (batch < 1 || channels < 1 || threads < 1) return 1;
    const int64_t blocks = (channels + kernels().lanes - 1) / kernels().lanes, wanted = threads / common_divisor(threads, batch);
    return wanted < blocks ? wanted : blocks;
}

FORMWRIGHT_EXPORT int formwright_scan_forward(
    const float *x, const float *delta, const float *A, const float *B, const float *C, const float *D, const float *state, float *y,
    float *final_state, float *borders, int64_t batch, int64_t length, int64_t channels, int64_t states, int64_t chunk, int64_t threads
) {
    const Sizes sizes{batch, length, channels, states, chunk};
    const Inputs in{x, delta, A, B, C, D, state, nullptr};
    const Outputs out{y, final_state, borders};
    const Kernels &best = kernels();
    const int64_t blocks = (channels + best.lanes - 1) / best.lanes;
    return share_out(batch * blocks, best.forward_scratch(sizes), threads, [&](int64_t item, float *scratch) {
        best.forward(sizes, in, out, item / blocks, item % blocks * best.lanes, scratch);
    });
}

FORMWRIGHT_EXPORT int formwright_scan_backward(
    const float *x, const float *delta, const float *A, const float *B, const float *C, const float *D, const float *borders,
    const float *grad_y, const float *grad_final, float *dx, float *ddelta, float *dA, float *dB, float *dC, float *dD, float *dstate,
    int64_t batch, int64_t length, int64_t channels, int64_t states, int64_t chunk, int64_t groups, int64_t threads
) {
    const Sizes sizes{batch, length, channels, states, chunk};
    const Inputs in{x, delta, A, B, C, D, nullptr, borders};
    const Gradients grad{grad_y, grad_final, dx, ddelta, dA, dB, dC, dD, dstate};
    const Kernels &best = kernels();
    const int64_t blocks = ((channels + best.lanes - 1) / best.lanes + groups - 1) / groups;
    return share_out(batch * groups, best.backward_scratch(sizes, blocks), threads, [&](int64_t item, float *scratch) {
        best.backward(sizes, in, grad, item / groups, item % groups, groups, scratch);
    });
}
