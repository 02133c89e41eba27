// A pool of processor threads that runs the blocks of one launch: the host device's "multiprocessors".
//
// The calling thread works too, so a launch on one thread starts nothing. Blocks are handed out in runs of consecutive
// blocks, to whichever thread comes first; results do not depend on that, because blocks share nothing. Runs get shorter
// towards the end, so that no thread waits long for another's last run. Threads without work sleep. A launch that finds
// the pool busy (another Python thread's) runs on its own thread alone. After fork() the child starts a pool of its own.
//
// Nothing of the C++ library is used, which one compiler would have to build first and another (CXX=gcc) does not link.
#include <pthread.h>

using Entry = void (*)(void** arguments, long long first, long long last, long long blocks, int block_size);

namespace {

struct Pool {
    pthread_mutex_t launching = PTHREAD_MUTEX_INITIALIZER;  // one launch at a time
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t start = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
    int threads = 0;       // started so far, without the caller
    unsigned long long launch = 0;
    int wanted = 0;        // threads still to join this launch
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
            ++running;
            pthread_mutex_unlock(&mutex);
            work();
            pthread_mutex_lock(&mutex);
            if (--running == 0) pthread_cond_signal(&done);
        }
    }

    bool start_thread() {
        pthread_t thread;
        const auto serve_pool = [](void* pool) -> void* {
            static_cast<Pool*>(pool)->serve();
            return nullptr;
        };
        if (pthread_create(&thread, nullptr, serve_pool, this) != 0) return false;
        pthread_detach(thread);
        ++threads;
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
    ++p.launch;
    while (p.threads < p.wanted && p.start_thread()) {
        // Until the system grants no more threads: those that are there do the work.
    }
    pthread_mutex_unlock(&p.mutex);
    pthread_cond_broadcast(&p.start);
    p.work();
    pthread_mutex_lock(&p.mutex);
    p.wanted = 0;  // a thread that has not joined by now need not
    while (p.running != 0) pthread_cond_wait(&p.done, &p.mutex);
    pthread_mutex_unlock(&p.mutex);
    pthread_mutex_unlock(&p.launching);
}
