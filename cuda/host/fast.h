// CUDA words in plain C++, fast mode: one thread per block, so a block is a loop that the compiler vectorises, and the
// blocks of a launch are spread over a pool of processor threads (pool.cpp). Written before the kernel's source text.
#pragma once
#if defined(__x86_64__)
#define GPU_ADAM_HARDWARE_OPERANDS 1  // whose faithful twin stays with software, so that tests compare the two
#endif
#include "common.h"

constexpr struct { unsigned x = 0, y = 0, z = 0; } threadIdx;
constexpr struct { unsigned x = 1, y = 1, z = 1; } blockDim;
static thread_local struct { unsigned x = 0, y = 0, z = 0; } blockIdx;
static thread_local struct { unsigned x = 1, y = 1, z = 1; } gridDim;

#define __shared__  // the block's only thread keeps it on its stack

static inline void __syncthreads() {}
// A lane outside the warp gives the caller's own value, as on a GPU.
template <typename T> static inline T __shfl_up_sync(unsigned, T x, unsigned) { return x; }

// The updates' loop goes in strips of 64 elements, and asks for the memory of the strip four further on.
#define GPU_ADAM_ONE_THREAD 1
#define GPU_ADAM_STRIP 64
#define GPU_ADAM_PREFETCH(pointer) prefetch_strip(pointer)
#if defined(__clang__)
#define GPU_ADAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GPU_ADAM_INDEPENDENT _Pragma("GCC ivdep")
#endif
// By force: GCC drops calls of a function that does nothing but prefetch.
template <typename T>
static __forceinline__ void prefetch_strip(const T* p) {
    for (int i = 0; i < GPU_ADAM_STRIP; i += 64 / sizeof(T)) __builtin_prefetch(p + 4 * GPU_ADAM_STRIP + i, 1);
}

// Blocks [first, last) of a grid of `blocks`; `block_size` is the faithful mode's business.
template <typename... Parameters>
static void run_blocks(void (*kernel)(Parameters...), void** arguments, long long first, long long last,
                       long long blocks, int block_size) {
    (void)block_size;
    const FlushDenormals flush;
    gridDim.x = static_cast<unsigned>(blocks);
    for (long long block = first; block < last; ++block) {
        blockIdx.x = static_cast<unsigned>(block);
        call(kernel, arguments);
    }
}
