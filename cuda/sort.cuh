// Stable radix sort of row numbers with the positions they came from: least significant digit first, 4 bits a pass.
//
// Each block sorts a contiguous run of GPU_ADAM_SORT_RUN keys by one digit, and within it each thread a contiguous run,
// so that counting (digit, block, thread) in that order gives every key its place with equal keys in order of
// occurrence, whatever the launch shape. Integers only, no atomics. A pass is count -> scan -> scatter.
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

constexpr int DIGITS = 16;
constexpr int MAX_THREADS = 256;

struct Keys {
    long long* row;
    long long* position;
};

// Shared memory of one block, for all functions below.
struct SortScratch {
    unsigned counts[DIGITS * MAX_THREADS];  // [digit][thread], then the exclusive sums
    unsigned warp_sums[32];
    unsigned total;
    long long offset[DIGITS];
};

__device__ inline int digit_of(long long row, int shift) { return static_cast<int>(row >> shift & (DIGITS - 1)); }

__device__ inline long long index_at(const Indices& indices, long long i) {
    return indices.wide ? static_cast<const long long*>(indices.data)[i] : static_cast<const int*>(indices.data)[i];
}

// Record the index at the first bad position, once all positions are known. One thread of a later launch calls this.
__device__ inline void record_first(IndexErrors* errors, const Indices& indices) {
    if (errors->count == 0 || errors->recorded) return;
    errors->first_index = index_at(indices, static_cast<long long>(errors->first_position));
    errors->recorded = 1;
}

// Exclusive sum of `x` over the threads of the block. The sum of all is in scratch.total, until the next barrier
// but one.
__device__ inline unsigned block_exclusive_sum(unsigned x, SortScratch& scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    const unsigned mask = blockDim.x < 32 ? (1u << blockDim.x) - 1 : 0xffffffffu;
    unsigned inclusive = x;
    for (int d = 1; d < 32; d *= 2) {
        const unsigned below = __shfl_up_sync(mask, inclusive, d);
        if (lane >= d) inclusive += below;
    }
    __syncthreads();  // the previous call's readers of warp_sums and total are done
    if (lane == 31 || threadIdx.x == blockDim.x - 1) scratch.warp_sums[warp] = inclusive;
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned sum = 0;
        for (int w = 0; w < warps; ++w) {
            const unsigned next = sum + scratch.warp_sums[w];
            scratch.warp_sums[w] = sum;
            sum = next;
        }
        scratch.total = sum;
    }
    __syncthreads();
    return scratch.warp_sums[warp] + inclusive - x;
}

struct Run {
    long long begin, end;
};

// The part of [begin, end) that belongs to this thread: contiguous, in order of threads.
__device__ inline Run thread_run(long long begin, long long end) {
    const long long each = (end - begin + blockDim.x - 1) / blockDim.x;
    const long long first = begin + each * threadIdx.x;
    return {first < end ? first : end, first + each < end ? first + each : end};
}

// scratch.counts[digit * blockDim.x + thread]: how often the thread's run has the digit. Ends with a barrier.
__device__ inline void count_digits(const Keys keys, Run run, int shift, SortScratch& scratch) {
    for (int d = 0; d < DIGITS; ++d) scratch.counts[d * blockDim.x + threadIdx.x] = 0;
    for (long long i = run.begin; i < run.end; ++i) {
        ++scratch.counts[digit_of(keys.row[i], shift) * blockDim.x + threadIdx.x];
    }
    __syncthreads();
}

// scratch.counts becomes its exclusive sum in (digit, thread) order. Ends with a barrier.
__device__ inline void scan_counts(SortScratch& scratch) {
    const int first = threadIdx.x * DIGITS;
    unsigned sum = 0;
    for (int i = first; i < first + DIGITS; ++i) sum += scratch.counts[i];
    unsigned before = block_exclusive_sum(sum, scratch);
    for (int i = first; i < first + DIGITS; ++i) {
        const unsigned count = scratch.counts[i];
        scratch.counts[i] = before;
        before += count;
    }
    __syncthreads();
}

// Move the thread's run to its places: the block's keys with digit d go to starts[d * stride] and after. Null starts mean
// that the block sorts all keys there are, so that scratch.counts is the place already. Ends with a barrier.
__device__ inline void scatter(const Keys from, const Keys to, Run run, int shift, const long long* starts,
                               long long stride, SortScratch& scratch) {
    for (int d = threadIdx.x; d < DIGITS; d += blockDim.x) {
        scratch.offset[d] = starts ? starts[d * stride] - scratch.counts[d * blockDim.x] : 0;
    }
    __syncthreads();  // before any thread moves on in its counts, thread 0's are the digits' starts in the block
    for (long long i = run.begin; i < run.end; ++i) {
        const long long row = from.row[i];
        const int d = digit_of(row, shift);
        const long long place = scratch.offset[d] + scratch.counts[d * blockDim.x + threadIdx.x]++;
        to.row[place] = row;
        to.position[place] = from.position[i];
    }
    __syncthreads();
}
