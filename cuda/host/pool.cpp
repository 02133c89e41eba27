// A pool of processor threads that runs the blocks of one launch: the host device's "multiprocessors".
//
// The calling thread works too, so a launch on one thread starts nothing. Blocks are handed out in runs of consecutive
// blocks, to whichever thread comes first; results do not depend on that, because blocks share nothing. Runs get shorter
// towards the end, so that no thread waits long for another's last run. A launch that finds the pool busy (another Python
// thread's) runs on its own thread alone. After fork() the child starts a pool of its own.
//
// Threads without work sleep, but look for some during `patience` first: waking takes 20 to 50 us, half as long as a step of
// 100,000 elements does, and the launches of one step, or small steps in a row, follow each other in less. Where another
// process waits for a launch and then computes, that keeps a processor from it, so that a process can set less.
//
// A thread that is woken must not share the caller's processor. Linux may let it, while another one is idle: on virtual
// machines it was seen to do so at more than half of the launches, which then took up to half as long again. So a sleeping
// thread is kept from the processor on which the caller is.
//
// Nothing of the C++ library is used, which one compiler would have to build first and another (CXX=gcc) does not link.
#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif
#include <time.h>

using Entry = void (*)(void** arguments, long long first, long long last, long long blocks, int block_size);

namespace {

long long patience = 100'000;  // nanoseconds

long long nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Return as soon as `found` says so, or when patience is over.
template <typename Found>
void look(const Found& found) {
    for (const long long end = nanoseconds() + __atomic_load_n(&patience, __ATOMIC_RELAXED); nanoseconds() < end;) {
        for (int i = 0; i < 32; ++i) {
            if (found()) return;
            pause();
        }
    }
}

// A thread of the pool.
struct Worker {
    pthread_t thread;
    int kept_from;  // a processor; -1 for none

    // Keep it from a processor on which the calling thread runs, to others that this one may use; where there are none,
    // or the system refuses, it stays as it is.
    void keep_from(int processor) {
#if defined(__linux__)
        cpu_set_t allowed;
        if (processor == kept_from || processor < 0) return;
        if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed) != 0) return;
        CPU_CLR(processor, &allowed);
        if (CPU_COUNT(&allowed) == 0 || pthread_setaffinity_np(thread, sizeof allowed, &allowed) != 0) return;
#endif
        kept_from = processor;
    }
};

int processor_of_caller() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

struct Pool {
    pthread_mutex_t launching = PTHREAD_MUTEX_INITIALIZER;  // one launch at a time
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t start = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
    Worker workers[1024];
    int threads = 0;       // started so far, without the caller
    unsigned long long launch = 0;  // changes under the mutex, and is looked at without, as `running` is
    int wanted = 0;                 // threads still to join this launch
    int running = 0;

    Entry entry = nullptr;
    void** arguments = nullptr;
    long long blocks = 0, sharers = 1;
    long long next = 0;    // block to hand out; atomic

    void work() {
        long long first = __atomic_load_n(&next, __ATOMIC_RELAXED);
        while (first < blocks) {
            const long long fair = (blocks - first) / (2 * sharers);
            const long long end = first + (fair > 1 ? fair : 1);
            if (__atomic_compare_exchange_n(&next, &first, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                entry(arguments, first, end, blocks, 1);
                first = __atomic_load_n(&next, __ATOMIC_RELAXED);
            }
        }
    }

    void serve() {
        unsigned long long seen = 0;
        pthread_mutex_lock(&mutex);
        for (;;) {
            while (launch == seen) pthread_cond_wait(&start, &mutex);
            seen = launch;
            if (wanted == 0) continue;
            --wanted;
            __atomic_add_fetch(&running, 1, __ATOMIC_RELAXED);
            pthread_mutex_unlock(&mutex);
            work();
            pthread_mutex_lock(&mutex);
            if (__atomic_sub_fetch(&running, 1, __ATOMIC_RELAXED) == 0) pthread_cond_signal(&done);
            pthread_mutex_unlock(&mutex);
            look([&] { return __atomic_load_n(&launch, __ATOMIC_RELAXED) != seen; });
            pthread_mutex_lock(&mutex);
        }
    }

    bool start_thread() {
        if (threads == sizeof workers / sizeof *workers) return false;
        pthread_t thread;
        const auto serve_pool = [](void* pool) -> void* {
            static_cast<Pool*>(pool)->serve();
            return nullptr;
        };
        if (pthread_create(&thread, nullptr, serve_pool, this) != 0) return false;
        pthread_detach(thread);
        workers[threads++] = {thread, -1};
        return true;
    }
};

Pool pool;

// In the child only the thread that forked is there, and it is in no launch: whatever another one held is free.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool = Pool(); });

}  // namespace

// pthread_atfork asks for it. Compilers have it in the start files, which are left out (gpu_adam/devices/compiler.py).
extern "C" {
__attribute__((weak, visibility("hidden"))) void* __dso_handle = &__dso_handle;
}

extern "C" void set_patience(long long duration) { __atomic_store_n(&patience, duration, __ATOMIC_RELAXED); }

extern "C" void launch_blocks(Entry entry, void** arguments, long long blocks, int threads) {
    Pool& p = pool;
    // A thread is worth waking for four blocks or more: waking takes as long as one or two.
    const long long useful = blocks / 4 < threads ? blocks / 4 : threads;
    if (useful < 2 || pthread_mutex_trylock(&p.launching) != 0) {
        entry(arguments, 0, blocks, blocks, 1);
        return;
    }
    pthread_mutex_lock(&p.mutex);
    p.entry = entry;
    p.arguments = arguments;
    p.blocks = blocks;
    p.sharers = useful;
    __atomic_store_n(&p.next, 0, __ATOMIC_RELAXED);
    p.wanted = static_cast<int>(useful) - 1;
    __atomic_add_fetch(&p.launch, 1, __ATOMIC_RELAXED);
    while (p.threads < p.wanted && p.start_thread()) {
        // Until the system grants no more threads: those that are there do the work.
    }
    const int processor = processor_of_caller();
    for (int i = 0; i < p.wanted && i < p.threads; ++i) p.workers[i].keep_from(processor);
    pthread_mutex_unlock(&p.mutex);
    pthread_cond_broadcast(&p.start);
    p.work();
    pthread_mutex_lock(&p.mutex);
    p.wanted = 0;  // a thread that has not joined by now need not
    pthread_mutex_unlock(&p.mutex);
    look([&] { return __atomic_load_n(&p.running, __ATOMIC_RELAXED) == 0; });
    pthread_mutex_lock(&p.mutex);
    while (p.running != 0) pthread_cond_wait(&p.done, &p.mutex);
    pthread_mutex_unlock(&p.mutex);
    pthread_mutex_unlock(&p.launching);
}
