// A pool of processor threads that runs the blocks of one launch: the host device's "multiprocessors".
//
// The calling thread works too, so a launch on one thread starts nothing. Blocks are handed out in runs of consecutive
// blocks, to whichever thread comes first; results do not depend on that, because blocks share nothing. Runs get shorter
// towards the end, so that no thread waits long for another's last run. Threads without work sleep. A launch that finds the pool busy (another Python thread's) runs on its own thread alone. After
// fork() the child starts a pool of its own.
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

using Entry = void (*)(void** arguments, long long first, long long last, long long blocks, int block_size);

namespace {

struct Pool {
    std::mutex launching;  // one launch at a time
    std::mutex mutex;
    std::condition_variable start, done;
    int threads = 0;       // started so far, without the caller
    unsigned long long launch = 0;
    int wanted = 0;        // threads still to join this launch
    int running = 0;

    Entry entry;
    void** arguments;
    long long blocks, sharers;
    std::atomic<long long> next;

    void work() {
        long long first = next.load(std::memory_order_relaxed);
        while (first < blocks) {
            const long long fair = (blocks - first) / (2 * sharers);
            const long long end = first + (fair > 1 ? fair : 1);
            if (next.compare_exchange_weak(first, end, std::memory_order_relaxed)) {
                entry(arguments, first, end, blocks, 1);
                first = next.load(std::memory_order_relaxed);
            }
        }
    }

    void serve() {
        unsigned long long seen = 0;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            start.wait(lock, [&] { return launch != seen; });
            seen = launch;
            if (wanted == 0) continue;
            --wanted;
            ++running;
            lock.unlock();
            work();
            lock.lock();
            if (--running == 0) done.notify_one();
        }
    }
};

// Never destroyed: its threads sleep in it when the process ends.
Pool* pool = new Pool;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

extern "C" void launch_blocks(Entry entry, void** arguments, long long blocks, int threads) {
    Pool& p = *pool;
    // A thread is worth waking for four blocks or more: waking takes as long as one or two.
    const long long useful = blocks / 4 < threads ? blocks / 4 : threads;
    if (useful < 2 || !p.launching.try_lock()) {
        entry(arguments, 0, blocks, blocks, 1);
        return;
    }
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        p.entry = entry;
        p.arguments = arguments;
        p.blocks = blocks;
        p.sharers = useful;
        p.next.store(0, std::memory_order_relaxed);
        p.wanted = static_cast<int>(useful) - 1;
        ++p.launch;
        try {
            for (; p.threads < p.wanted; ++p.threads) std::thread([&p] { p.serve(); }).detach();
        } catch (const std::system_error&) {
            // The system grants no more threads: those that are there do the work.
        }
    }
    p.start.notify_all();
    p.work();
    {
        std::unique_lock<std::mutex> lock(p.mutex);
        p.wanted = 0;  // a thread that has not joined by now need not
        p.done.wait(lock, [&] { return p.running == 0; });
    }
    p.launching.unlock();
}
