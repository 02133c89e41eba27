// CUDA words in plain C++, fast mode: one thread per block, so a block is a loop that the compiler vectorises, and the
// blocks of a launch are spread over a pool of processor threads (pool.cpp). Written before the kernel's source text.
#pragma once
#if defined(__x86_64__)
#define GPU_ADAM_DAZ 1  // not in the faithful mode, which flushes in software: tests compare the two ways
#endif
#include <time.h>

#include "common.h"

constexpr struct { unsigned x = 0, y = 0, z = 0; } threadIdx;
constexpr struct { unsigned x = 1, y = 1, z = 1; } blockDim;
static thread_local struct { unsigned x = 0, y = 0, z = 0; } blockIdx;
static thread_local struct { unsigned x = 1, y = 1, z = 1; } gridDim;

#define __shared__  // the block's only thread keeps it on its stack

static inline void __syncthreads() {}
static inline void __syncwarp() {}
// A lane outside the warp gives the caller's own value, as on a GPU.
template <typename T> static inline T __shfl_up_sync(unsigned, T x, unsigned) { return x; }

// The updates' loop goes in strips of 64 elements, and may fetch the memory of the strip four further on.
#define GPU_ADAM_ONE_THREAD 1
#define GPU_ADAM_STRIP 64
#define GPU_ADAM_PREFETCHES fetches_ahead
#define GPU_ADAM_PREFETCH(pointer) prefetch_strip(pointer)
// Bytes of v in a strip of deferred rows (replay.cuh): eight of x86's vectors. With fewer of them in work an operation waits
// for the result of the one before, with more of them registers do not hold them.
#if defined(__AVX512F__)
#define GPU_ADAM_REPLAYED 512
#else
#define GPU_ADAM_REPLAYED 256
#endif
// What lies at an address that nothing but an index tells, and will be needed after some other work.
#define GPU_ADAM_FETCH(pointer) __builtin_prefetch(pointer, 1)
#if defined(__clang__)
#define GPU_ADAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GPU_ADAM_INDEPENDENT _Pragma("GCC ivdep")
#endif
#if defined(__AVX512F__)
#define GPU_ADAM_HALVES 16  // Float16 that the processor converts at once
#elif defined(__F16C__)
#define GPU_ADAM_HALVES 8
#else
#define GPU_ADAM_HALVES 0
#endif
#define GPU_ADAM_CALLED __attribute__((noinline))  // a function that is compiled once, for the compiler's time
static thread_local bool fetches_ahead = false;
// By force: GCC drops calls of a function that does nothing but prefetch.
template <typename T>
static __forceinline__ void prefetch_strip(const T* p) {
    for (int i = 0; i < GPU_ADAM_STRIP; i += 64 / sizeof(T)) __builtin_prefetch(p + 4 * GPU_ADAM_STRIP + i, 1);
}

#if GPU_ADAM_HALVES
// GPU_ADAM_HALVES numbers at any addresses, with the bits of numbers.cuh: every NaN is stored as one and the same; FTZ and DAZ
// change nothing, for denormal floats are zeros in 16 bits. (The header that g++ has names for these instructions in is
// that of all intrinsics; clang++ gives up the names that g++ has for them.)
typedef float Floats __attribute__((vector_size(4 * GPU_ADAM_HALVES)));
#if defined(__clang__)
typedef __fp16 Halves __attribute__((vector_size(2 * GPU_ADAM_HALVES)));
#else
typedef short Halves __attribute__((vector_size(2 * GPU_ADAM_HALVES)));
#endif
static __forceinline__ void widen_together(const void* from, float* to) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
#if defined(__clang__)
    const Floats floats = __builtin_convertvector(halves, Floats);
#elif GPU_ADAM_HALVES == 16
    const Floats floats = __builtin_ia32_vcvtph2ps512_mask(halves, Floats{}, -1, 4);  // all lanes, exceptions as ever
#else
    const Floats floats = __builtin_ia32_vcvtph2ps256(halves);
#endif
    memcpy(to, &floats, sizeof floats);
}
static __forceinline__ void narrow_together(const float* from, void* to) {
    Floats floats;
    for (int k = 0; k < GPU_ADAM_HALVES; ++k) floats[k] = from[k] == from[k] ? from[k] : __uint_as_float(0x7fc00000u);
#if defined(__clang__)
    const Halves halves = __builtin_convertvector(floats, Halves);
#elif GPU_ADAM_HALVES == 16
    const Halves halves = __builtin_ia32_vcvtps2ph512_mask(floats, 0, Halves{}, -1);  // 0: to the nearest, ties to even
#else
    const Halves halves = __builtin_ia32_vcvtps2ph256(floats, 0);
#endif
    memcpy(to, &halves, sizeof halves);
}
#endif

// Whether fetching ahead pays is the processor's affair: on some it saves a twentieth of the time, on others it costs a
// quarter (profiling/README.md). So the first large launches of a kernel try both ways in turns of a few blocks, side by side on
// the same arrays, and the way that won more often stays for the life of the process. Either way gives the same bits.
struct Trial {
    static constexpr long long LARGE = 256;  // blocks of a launch; what is smaller comes from a cache
    static constexpr long long TURN = 4;     // blocks: 10 to 50 microseconds
    static constexpr int PAIRS = 128;        // of turns, each with one of either way

    int pairs = 0;    // so far
    int balance = 0;  // pairs won by fetching, less those lost

    bool over() const { return __atomic_load_n(&pairs, __ATOMIC_RELAXED) >= PAIRS; }
    bool fetching_won() const { return __atomic_load_n(&balance, __ATOMIC_RELAXED) > 0; }
    void count(bool fetching) {
        __atomic_fetch_add(&balance, fetching ? 1 : -1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&pairs, 1, __ATOMIC_RELAXED);
    }
};
static Trial trial;

static inline long long nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Blocks [first, last) of a grid of `blocks`; only the faithful mode uses `block_size`.
template <typename... Parameters>
static void run_blocks(void (*kernel)(Parameters...), void** arguments, long long first, long long last,
                       long long blocks, int block_size) {
    (void)block_size;
    const FlushDenormals flush;
    gridDim.x = static_cast<unsigned>(blocks);
    long long next = first;
    const auto run = [&](long long count, bool fetching) {
        fetches_ahead = fetching;
        for (const long long end = next + count; next < end; ++next) {
            blockIdx.x = static_cast<unsigned>(next);
            call(kernel, arguments);
        }
    };
    const bool large = blocks >= Trial::LARGE;
    for (bool fetching = false; large && !trial.over() && last - next >= 2 * Trial::TURN; fetching = !fetching) {
        const long long start = nanoseconds();
        run(Trial::TURN, fetching);
        const long long middle = nanoseconds();
        run(Trial::TURN, !fetching);
        trial.count(fetching == (middle - start < nanoseconds() - middle));
    }
    run(last - next, large && trial.fetching_won());
}
