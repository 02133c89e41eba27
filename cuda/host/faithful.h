// CUDA words in plain C++, faithful mode: every CUDA thread is a fiber, at the launch shape that a GPU would be given.
//
// Barriers and warp shuffles are real: a fiber that reaches one waits for the others. Shared memory is one per block and
// full of garbage when a block starts. Fibers run one at a time, each as far as it gets, then their warp as far as it
// gets, in ascending and descending order by turns, so that a missing barrier shows as a wrong result. Where a barrier
// cannot be passed (a thread has left, or waits at another barrier) the process ends with a sentence. This mode is slow,
// and for tests: blocks run one after the other.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include "common.h"

#if defined(__SANITIZE_ADDRESS__)
#define GPU_ADAM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GPU_ADAM_ASAN 1
#endif
#endif
#ifdef GPU_ADAM_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

// One section for all shared variables of this kernel, whose bounds the linker knows.
#define __shared__ static __attribute__((section("gpu_adam_shared")))
extern "C" char __start_gpu_adam_shared[] __attribute__((weak));
extern "C" char __stop_gpu_adam_shared[] __attribute__((weak));

namespace faithful {

enum class State { runnable, at_barrier, in_step, finished };
constexpr size_t STACK = 256 * 1024;
constexpr int MAX_THREADS = 1024;  // of a block, as on a GPU

struct Fiber {
    ucontext_t context;
    char* stack;     // kept for later blocks
    State state;
    int line;        // of the barrier it waits at
    int shuffles;    // so far: picks one of two exchange buffers
    unsigned mask;   // of the lanes that it waits for
    void* asan_stack;
};

static Fiber fibers[MAX_THREADS];
static int threads;  // of the block
static ucontext_t scheduler;
static void* scheduler_asan_stack;
static const void* scheduler_bottom;
static size_t scheduler_size;
static int running;
static uint64_t exchanged[2][MAX_THREADS];
static void (*invoke)(void*);
static void* invoked;

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "gpu_adam: block %u: %s\n", blockIdx.x, what);
    abort();
}

static void leave(State state) {
    Fiber& fiber = fibers[running];
    fiber.state = state;
#ifdef GPU_ADAM_ASAN
    __sanitizer_start_switch_fiber(state == State::finished ? nullptr : &fiber.asan_stack, scheduler_bottom, scheduler_size);
#endif
    swapcontext(&fiber.context, &scheduler);
#ifdef GPU_ADAM_ASAN
    __sanitizer_finish_switch_fiber(fiber.asan_stack, &scheduler_bottom, &scheduler_size);
#endif
}

static void body() {
#ifdef GPU_ADAM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    invoke(invoked);
    leave(State::finished);
}

static void enter(int thread) {
    running = thread;
    threadIdx.x = static_cast<unsigned>(thread);
#ifdef GPU_ADAM_ASAN
    __sanitizer_start_switch_fiber(&scheduler_asan_stack, fibers[thread].stack, STACK);
#endif
    swapcontext(&scheduler, &fibers[thread].context);
#ifdef GPU_ADAM_ASAN
    __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
}

// Run the threads [first, last) of a warp until none gets further. Wake them when all wait for each other.
static void run_warp(int first, int last, bool backwards) {
    for (bool complete = true; complete;) {
        for (int i = first; i < last; ++i) {
            const int thread = backwards ? first + last - 1 - i : i;
            if (fibers[thread].state == State::runnable) enter(thread);
        }
        for (int i = first; i < last; ++i) {
            if (fibers[i].state != State::in_step) {
                complete = false;
            } else if (!(fibers[i].mask >> (i - first) & 1)) {
                fail("a lane waits for its warp with a mask that leaves it out");
            }
        }
        for (int i = first; complete && i < last; ++i) fibers[i].state = State::runnable;
    }
}

// Wake the block when all its threads wait at one barrier.
static bool release_barrier() {
    for (int t = 0; t < threads; ++t) {
        if (fibers[t].state != State::at_barrier) return false;
        if (fibers[t].line != fibers[0].line) fail("its threads wait at different barriers");
    }
    for (int t = 0; t < threads; ++t) fibers[t].state = State::runnable;
    return true;
}

static void run_block(int block_size) {
    if (__start_gpu_adam_shared) {
        memset(__start_gpu_adam_shared, 0xff, static_cast<size_t>(__stop_gpu_adam_shared - __start_gpu_adam_shared));
    }
    if (block_size > MAX_THREADS) fail("it has more threads than a block may have");
    threads = block_size;
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        if (!fiber.stack) fiber.stack = static_cast<char*>(malloc(STACK));
        if (!fiber.stack) fail("there is no memory for the stacks of its threads");
        fiber.state = State::runnable;
        fiber.shuffles = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, body, 0);
    }
    for (int turn = 0;; ++turn) {
        const bool backwards = turn % 2;
        for (int i = 0; i < threads; i += 32) {
            const int first = backwards ? (threads - 1) / 32 * 32 - i : i;
            run_warp(first, first + 32 < threads ? first + 32 : threads, backwards);
        }
        int finished = 0;
        for (int t = 0; t < threads; ++t) finished += fibers[t].state == State::finished;
        if (finished == threads) return;
        if (!release_barrier()) fail("a barrier or shuffle is not reached by all of its threads");
    }
}

static void wait_at_barrier(int line) {
    fibers[running].line = line;
    leave(State::at_barrier);
}

// Wait until all lanes of the warp are here.
static void step_with_warp(unsigned mask) {
    fibers[running].mask = mask;
    leave(State::in_step);
}

template <typename T>
static T shuffle_up(unsigned mask, T x, unsigned delta) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 8 bytes at most");
    const int self = running;
    uint64_t* const slots = exchanged[fibers[self].shuffles++ % 2];
    memcpy(&slots[self], &x, sizeof x);
    step_with_warp(mask);
    if (static_cast<unsigned>(self % 32) >= delta) memcpy(&x, &slots[self - static_cast<int>(delta)], sizeof x);
    return x;
}

}  // namespace faithful

#define __syncthreads() faithful::wait_at_barrier(__LINE__)
template <typename T>
static T __shfl_up_sync(unsigned mask, T x, unsigned delta) { return faithful::shuffle_up(mask, x, delta); }
static void __syncwarp(unsigned mask = 0xffffffffu) { faithful::step_with_warp(mask); }

// Blocks [first, last) of a grid of `blocks`, each of `block_size` threads.
template <typename... Parameters>
static void run_blocks(void (*kernel)(Parameters...), void** arguments, long long first, long long last,
                       long long blocks, int block_size) {
    const FlushDenormals flush;  // fibers are created with the mode of this moment
    struct Call {
        void (*kernel)(Parameters...);
        void** arguments;
    } call_of = {kernel, arguments};
    faithful::invoke = [](void* x) { call(static_cast<Call*>(x)->kernel, static_cast<Call*>(x)->arguments); };
    faithful::invoked = &call_of;
    gridDim.x = static_cast<unsigned>(blocks);
    blockDim.x = static_cast<unsigned>(block_size);
    for (long long block = first; block < last; ++block) {
        blockIdx.x = static_cast<unsigned>(block);
        faithful::run_block(block_size);
    }
}
