// Compiles the file FORMWRIGHT_ARITHMETIC for several instruction sets, in the namespaces portable, avx2 and avx512, and takes the best
// that this processor has at run time: FORMWRIGHT_BEST(forward) is one of portable::forward, avx2::forward and avx512::forward.
// Also here: sharing work among threads.

#include <cstdint>
#include <cstring>
#include <new>

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

namespace portable {
#define FORMWRIGHT_LANES 4
#include "lanes.h"
#include FORMWRIGHT_ARITHMETIC
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
#include "lanes.h"
#include FORMWRIGHT_ARITHMETIC
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
#include "lanes.h"
#include FORMWRIGHT_ARITHMETIC
#undef FORMWRIGHT_LANES
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

enum class InstructionSet { portable, avx2, avx512 };

[[maybe_unused]] InstructionSet instruction_set() {
    static const InstructionSet best = [] {
#ifdef FORMWRIGHT_X86
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f")) return InstructionSet::avx512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
        return InstructionSet::portable;
    }();
    return best;
}

#ifdef FORMWRIGHT_X86
#define FORMWRIGHT_BEST(name)                                                \
    (instruction_set() == InstructionSet::avx512 ? avx512::name              \
                                                 : (instruction_set() == InstructionSet::avx2 ? avx2::name : portable::name))
#else
#define FORMWRIGHT_BEST(name) (portable::name)
#endif

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
    if (threads > items) threads = items;
    if (threads < 1) threads = 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
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

// Into how many parts to split each of `batch` sequences: as few as keep all threads busy, and no more than `most`.
[[maybe_unused]] int64_t parts(int64_t batch, int64_t most, int64_t threads) {
    if (batch < 1 || most < 1 || threads < 1) return 1;
    int64_t divisor = threads, rest = batch;
    while (rest != 0) {
        const int64_t next = divisor % rest;
        divisor = rest;
        rest = next;
    }
    const int64_t wanted = threads / divisor;
    return wanted < most ? wanted : most;
}

}  // namespace
