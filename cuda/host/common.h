// Common to both modes of the shim: qualifiers, bit casts, atomics, the denormal mode and the call of a kernel.
#pragma once
#include <stddef.h>
#include <string.h>

// By name, and not all intrinsics or what C++ makes of math.h: compilers read those two for longer than they compile most
// kernels.
#if defined(__x86_64__)
#include <xmmintrin.h>  // _mm_getcsr
#endif
extern "C" {
float sqrtf(float);
double sqrt(double);
float fabsf(float);
double fabs(double);
}

// gpu_adam/devices/compiler.py asks for IEEE arithmetic; this is for a $CXX that adds words behind ours.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "the compiler relaxes arithmetic, and results would have other bits: leave out -ffast-math and its like"
#endif

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

static inline bool __isGlobal(const void*) { return true; }
#define __builtin_assume(condition)

static inline long long __double_as_longlong(double x) {
    long long bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline double __longlong_as_double(long long bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The kernels call it where the product is exact: without the instruction, two operations have the same bits.
static inline double __fma_rn(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline int __popc(unsigned x) { return __builtin_popcount(x); }

static inline unsigned long long atomicAdd(unsigned long long* place, unsigned long long x) {
    return __atomic_fetch_add(place, x, __ATOMIC_RELAXED);
}
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
// Of shared memory only: threads of one block never run at a time here.
static inline void atomicAdd(unsigned* place, unsigned x) { *place += x; }
static inline void atomicOr(unsigned* place, unsigned x) { *place |= x; }
static inline unsigned long long atomicMin(unsigned long long* place, unsigned long long x) {
    unsigned long long old = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (x < old && !__atomic_compare_exchange_n(place, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

#ifndef GPU_ADAM_FTZ  // a source without a dtype
#define GPU_ADAM_FTZ 0
#endif
#ifndef GPU_ADAM_DAZ
#define GPU_ADAM_DAZ 0
#endif

// The processor's modes while a kernel runs. Kernels of float32 have FTZ and DAZ: denormal results and operands are zero,
// as NVRTC's -ftz=true makes them. Kernels of float64 have DAZ where the fast mode asks for it, and flush the rest in
// software (numbers.cuh). The destructor restores the caller's modes.
struct FlushDenormals {
#if defined(__x86_64__) && (GPU_ADAM_FTZ || GPU_ADAM_DAZ)
    static constexpr unsigned DAZ = 0x0040, FTZ = 0x8000;  // bits of MXCSR
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | DAZ | (GPU_ADAM_FTZ ? FTZ : 0)); }
    ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__) && GPU_ADAM_FTZ
    unsigned long long before;
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | 1ULL << 24));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#elif GPU_ADAM_FTZ
#error "gpu_adam's host device knows the denormal mode of x86-64 and 64-bit Arm processors only"
#else
    FlushDenormals() {}
#endif
};

// 0, 1, ..., N - 1 as a type: std::index_sequence, without the C++ library, which not every compiler has at hand.
template <size_t...> struct Numbers {};
template <size_t N, size_t... Found> struct Below : Below<N - 1, N - 1, Found...> {};
template <size_t... Found> struct Below<0, Found...> { using Type = Numbers<Found...>; };

// Call a kernel with arguments packed as for cuLaunchKernel: an array of pointers to them.
template <typename... Parameters, size_t... Index>
static inline void call(void (*kernel)(Parameters...), void** arguments, Numbers<Index...>) {
    kernel(*static_cast<Parameters*>(arguments[Index])...);
}
template <typename... Parameters>
static inline void call(void (*kernel)(Parameters...), void** arguments) {
    call(kernel, arguments, typename Below<sizeof...(Parameters)>::Type());
}

// The entry point of a kernel, appended to its source text by gpu_adam/devices/compiler.py.
#define GPU_ADAM_ENTRY(kernel)                                                                                       \
    extern "C" void kernel##_entry(void** arguments, long long first, long long last, long long blocks,              \
                                   int block_size) {                                                                 \
        run_blocks(kernel, arguments, first, last, blocks, block_size);                                              \
    }
