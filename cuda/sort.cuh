// Stable radix sort of row numbers with the positions they came from: least significant digit first, 7 bits a pass.
//
// Each block sorts a contiguous run of GPU_ADAM_SORT_RUN keys by one digit, and within it each warp a contiguous run,
// one key a lane at a time. Keys are counted in the order (digit, block, warp, lane), which gives every key its place
// with equal keys in order of occurrence, whatever the launch shape. A pass is count -> scan -> scatter. All numbers are
// integers; atomics only add ones and set bits, so that their order changes nothing.
//
// A count for each warp, and not for each thread, leaves few enough numbers to scan for digits of 7 bits. The lanes
// whose keys have the same digit find each other by bits that they set in shared memory; seven ballots take several
// times as many instructions. Whole words in shared memory, not halves: tools that look for races cannot tell one half
// from the other.
//
// Threads: blockDim.x is 1 or a multiple of 32, at most 256. All threads of the block call these functions together.
#pragma once

// The indices of a sparse gradient. Mirrored by gpu_adam.kernels.INDICES.
struct Indices {
    const void* data;
    long long wide;   // 1: int64, 0: int32
    long long count;
    long long rows;   // of the variable
};

// Which indices were out of range. Mirrored by gpu_adam.kernels.INDEX_ERRORS.
struct IndexErrors {
    unsigned long long count;
    unsigned long long first_position;  // the largest value where there is none
    long long first_index;
    long long recorded;                 // 1: first_index holds the index at first_position
};

constexpr int DIGIT_BITS = GPU_ADAM_DIGIT_BITS;
constexpr int DIGITS = 1 << DIGIT_BITS;
constexpr int MAX_WARPS = 8;
constexpr int BATCH = 4;  // keys that a lane loads before it uses the first

struct Keys {
    long long* row;
    long long* position;
};

// Shared memory of one block, for all functions below.
struct SortScratch {
    // While counting, how often a digit stands in a warp's run; while scattering, which of the warp's 32 keys have the
    // digit, as bits. All zero between the two.
    unsigned table[MAX_WARPS][DIGITS];
    unsigned before[MAX_WARPS][DIGITS];  // keys with a digit in the runs of warps before, and in this one so far
    long long starts[DIGITS];            // where the block's keys with a digit go
    long long warp_sums[MAX_WARPS];
};

__device__ inline long long index_at(const Indices& indices, long long i) {
    return indices.wide ? static_cast<const long long*>(indices.data)[i] : static_cast<const int*>(indices.data)[i];
}

// Record the index at the first bad position, once all positions are known. One thread of a later launch calls this.
__device__ inline void record_first(IndexErrors* errors, const Indices& indices) {
    if (errors->count == 0 || errors->recorded) return;
    errors->first_index = index_at(indices, static_cast<long long>(errors->first_position));
    errors->recorded = 1;
}

__device__ inline int lanes_of_warp() { return blockDim.x < 32 ? blockDim.x : 32; }
__device__ inline int warps_of_block() { return (blockDim.x + 31) / 32; }

struct Run {
    int begin, end;
};

// Share number `index` of [0, count), one of `shares` that are contiguous and multiples of `unit` long.
__device__ inline Run share(int count, int index, int shares, int unit) {
    const int units = (count + unit - 1) / unit;
    const int each = (units + shares - 1) / shares * unit;
    const int first = each * index;
    return {first < count ? first : count, first + each < count ? first + each : count};
}

// The part of [0, count) that belongs to this thread or to its warp, in order of threads.
__device__ inline Run thread_run(int count) { return share(count, threadIdx.x, blockDim.x, 1); }
__device__ inline Run warp_run(int count) {
    return share(count, threadIdx.x / 32, warps_of_block(), lanes_of_warp());
}

// Exclusive sum of `x` over the threads of the block.
__device__ inline long long block_exclusive_sum(long long x, long long* warp_sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long inclusive = x;
    for (int d = 1; d < 32; d *= 2) {
        const long long below = __shfl_up_sync(0xffffffffu >> (32 - lanes_of_warp()), inclusive, d);
        if (lane >= d) inclusive += below;
    }
    __syncthreads();  // the previous call's readers of warp_sums are done
    if (lane == lanes_of_warp() - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    long long before = inclusive - x;
    for (int w = 0; w < warp; ++w) before += warp_sums[w];
    return before;
}

// scratch.starts becomes its exclusive sum over the digits; each thread reads and writes those of its own digits.
__device__ inline void sum_starts(SortScratch& scratch) {
    const Run digits = thread_run(DIGITS);
    long long sum = 0;
#pragma unroll 1
    for (int d = digits.begin; d < digits.end; ++d) sum += scratch.starts[d];
    long long before = block_exclusive_sum(sum, scratch.warp_sums);
#pragma unroll 1
    for (int d = digits.begin; d < digits.end; ++d) {
        const long long count = scratch.starts[d];
        scratch.starts[d] = before;
        before += count;
    }
}

// Make the scratch ready for a first pass. A barrier must follow.
__device__ inline void clear(SortScratch& scratch) {
    for (int d = threadIdx.x; d < DIGITS; d += blockDim.x) {
        for (int w = 0; w < warps_of_block(); ++w) scratch.table[w][d] = 0;
    }
}

// Take the keys of the warp's run in order, one a lane at a time: take(key, whether this lane has one). `from` has
// load(k), the block's key number k, and digit(key).
template <typename From, typename Take>
__device__ inline void for_each_key(const From& from, Run run, Take take) {
    const int lanes = lanes_of_warp();
    for (int first = run.begin; first < run.end; first += BATCH * lanes) {
        const int k = first + threadIdx.x % 32;
        decltype(from.load(0)) key[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) key[b] = from.load(k + b * lanes < run.end ? k + b * lanes : run.end - 1);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (first + b * lanes < run.end) take(key[b], k + b * lanes < run.end);
        }
    }
}

// Count the digits of the block's keys: scratch.before[warp][digit] becomes how often the digit stands in the runs of
// the warps before, and scratch.starts[digit] how often in all. A thread may read the starts of its own digits,
// thread_run(DIGITS), at once.
template <typename From>
__device__ inline void count_digits(const From& from, Run run, SortScratch& scratch) {
    unsigned* const counts = scratch.table[threadIdx.x / 32];
    for_each_key(from, run, [&](const auto& key, bool has_key) {
        if (has_key) atomicAdd(&counts[from.digit(key)], 1u);
    });
    __syncthreads();
    const Run digits = thread_run(DIGITS);
#pragma unroll 1
    for (int d = digits.begin; d < digits.end; ++d) {
        unsigned before = 0;
        for (int w = 0; w < warps_of_block(); ++w) {
            scratch.before[w][d] = before;
            before += scratch.table[w][d];
            scratch.table[w][d] = 0;
        }
        scratch.starts[d] = before;
    }
}

// The lanes of this warp whose keys have this lane's digit, as bits. `found` is the place of the warp and the digit in
// the table. A lane without a key finds nothing of use.
__device__ inline unsigned lanes_with_digit(unsigned& found, bool has_key) {
    if (lanes_of_warp() == 1) return 1;
    const unsigned self = 1u << threadIdx.x % 32;
    if (has_key) atomicOr(&found, self);
    __syncwarp();
    const unsigned lanes = found;
    __syncwarp();
    if (has_key && (lanes & (self - 1)) == 0) found = 0;
    return lanes;
}

// Move the warp's run to its places: the block's keys with digit d go to scratch.starts[d] and after, in the order of
// warps, then of the run. Begins and ends with a barrier.
template <typename From, typename To>
__device__ inline void scatter(const From& from, const To& to, Run run, SortScratch& scratch) {
    const int warp = threadIdx.x / 32;
    const unsigned earlier = (1u << threadIdx.x % 32) - 1;
    __syncthreads();
    for_each_key(from, run, [&](const auto& key, bool has_key) {
        const int digit = from.digit(key);
        const unsigned lanes = lanes_with_digit(scratch.table[warp][digit], has_key);
        unsigned& before = scratch.before[warp][digit];
        const int rank = __popc(lanes & earlier);
        const long long place = scratch.starts[digit] + before + rank;
        __syncwarp();  // all have read what the first of them changes
        if (!has_key) return;
        if (rank == 0) before += __popc(lanes);
        to.store(place, key);
    });
    __syncthreads();
}
