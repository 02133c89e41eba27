// The rows of a sparse gradient in ascending order, with the positions they came from, equal rows in order of
// occurrence.
//
//     sort_rows   the whole job in one block, for up to GPU_ADAM_SORT_RUN indices of fewer than GPU_ADAM_SORT_ROWS rows
//     sort_keys, then per digit sort_count, sort_scan, sort_scatter: for any number
//
// Launch   sort_rows: one block. sort_scan: any grid, best one block per digit; the others: any grid, best one block per
//          GPU_ADAM_SORT_RUN keys. blockDim.x as in sort.cuh. Both ways give the same result, whatever the launch shape.
// Errors   an index outside [0, rows) gets the key `rows`, so the index sorts behind every row and is never applied.
//          IndexErrors counts such indices, and keeps the smallest position of one in the first step that had any.
// count=0  nothing happens.
#include "sort.cuh"

__device__ inline long long key_at(const Indices& indices, long long i) {
    const long long row = index_at(indices, i);
    return 0 <= row && row < indices.rows ? row : indices.rows;
}

// The key at position i, an index out of range noted.
__device__ inline long long read_key(const Indices& indices, long long i, IndexErrors* errors) {
    const long long key = key_at(indices, i);
    if (key == indices.rows) {
        atomicAdd(&errors->count, 1ULL);
        // Later steps must not overwrite the first bad step's position: sparse.cu has recorded the index there.
        if (!errors->recorded) atomicMin(&errors->first_position, static_cast<unsigned long long>(i));
    }
    return key;
}

// Keys in shared memory, 32 bits each: before the first pass the row; after it the rest of the row, and below that the
// position.
constexpr int POSITION_BITS = 12;
static_assert(GPU_ADAM_SORT_RUN <= 1 << POSITION_BITS, "a position must fit");
static_assert(GPU_ADAM_SORT_ROWS <= 1LL << (32 - POSITION_BITS + DIGIT_BITS), "the rest of a row must fit");

struct KeysInBlock {
    unsigned* keys;
    int pass;

    struct Key {
        unsigned digit, rest;
    };
    __device__ Key load(int k) const {
        const unsigned key = keys[k];
        if (pass == 0) return {key % DIGITS, key / DIGITS << POSITION_BITS | k};
        return {key >> (POSITION_BITS + DIGIT_BITS * (pass - 1)) & (DIGITS - 1), key};
    }
    __device__ int digit(const Key& key) const { return key.digit; }
    __device__ void store(long long place, const Key& key) const { keys[place] = key.rest; }
};

extern "C" __global__ void __launch_bounds__(256)
sort_rows(const Indices indices, const Keys sorted, const long long passes, IndexErrors* errors) {
    __shared__ SortScratch scratch;
    __shared__ unsigned keys[2][GPU_ADAM_SORT_RUN];
    const int count = static_cast<int>(indices.count);
    const Run run = warp_run(count);
    clear(scratch);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        keys[0][i] = static_cast<unsigned>(read_key(indices, i, errors));
    }
    __syncthreads();
    for (int pass = 0; pass < passes; ++pass) {
        const KeysInBlock from = {keys[pass % 2], pass}, to = {keys[1 - pass % 2], pass};
        count_digits(from, run, scratch);
        sum_starts(scratch);
        scatter(from, to, run, scratch);
    }
    const unsigned* const result = keys[passes % 2];
    unsigned* const rows = keys[1 - passes % 2];
    for (int i = threadIdx.x; i < count; i += blockDim.x) rows[i] = static_cast<unsigned>(key_at(indices, i));
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const unsigned position = result[i] % (1 << POSITION_BITS);
        sorted.row[i] = rows[position];
        sorted.position[i] = position;
    }
}

// Keys in global memory, from one on.
struct KeysInMemory {
    Keys keys;
    int shift;

    struct Key {
        long long row, position;
    };
    __device__ Key load(int k) const { return {keys.row[k], keys.position[k]}; }
    __device__ int digit(const Key& key) const { return static_cast<int>(key.row >> shift & (DIGITS - 1)); }
    __device__ void store(long long place, const Key& key) const {
        keys.row[place] = key.row;
        keys.position[place] = key.position;
    }
};

// Run number r of GPU_ADAM_SORT_RUN keys: where it begins, and how many it has.
__device__ inline KeysInMemory run_at(const Keys keys, long long shift, long long r) {
    const long long begin = r * GPU_ADAM_SORT_RUN;
    return {{keys.row + begin, keys.position + begin}, static_cast<int>(shift)};
}
__device__ inline int run_size(long long count, long long r) {
    const long long left = count - r * GPU_ADAM_SORT_RUN;
    return static_cast<int>(left < GPU_ADAM_SORT_RUN ? left : GPU_ADAM_SORT_RUN);
}
__device__ inline long long runs_of(long long count) { return (count + GPU_ADAM_SORT_RUN - 1) / GPU_ADAM_SORT_RUN; }

extern "C" __global__ void __launch_bounds__(256)
sort_keys(const Indices indices, const Keys keys, IndexErrors* errors) {
    for (long long r = blockIdx.x; r < runs_of(indices.count); r += gridDim.x) {
        const KeysInMemory run = run_at(keys, 0, r);
        for (int k = threadIdx.x; k < run_size(indices.count, r); k += blockDim.x) {
            const long long position = r * GPU_ADAM_SORT_RUN + k;
            run.store(k, {read_key(indices, position, errors), position});
        }
    }
}

// starts[digit * runs + run]: how often the digit stands in the run.
extern "C" __global__ void __launch_bounds__(256)
sort_count(const Keys keys, const long long count, const long long shift, long long* starts) {
    __shared__ SortScratch scratch;
    const Run digits = thread_run(DIGITS);
    const long long runs = runs_of(count);
    clear(scratch);
    __syncthreads();
    for (long long r = blockIdx.x; r < runs; r += gridDim.x) {
        count_digits(run_at(keys, shift, r), warp_run(run_size(count, r)), scratch);
#pragma unroll 1
        for (int d = digits.begin; d < digits.end; ++d) starts[d * runs + r] = scratch.starts[d];
        __syncthreads();  // before the next run's counts
    }
}

// Of each digit: starts become their exclusive sum over the runs, and starts[DIGITS * runs + digit] their sum.
extern "C" __global__ void __launch_bounds__(256)
sort_scan(long long* starts, const long long runs) {
    __shared__ long long warp_sums[MAX_WARPS];
    for (int d = blockIdx.x; d < DIGITS; d += gridDim.x) {
        long long* const counts = starts + d * runs;
        const Run mine = thread_run(static_cast<int>(runs));
        long long sum = 0;
        for (int r = mine.begin; r < mine.end; ++r) sum += counts[r];
        long long before = block_exclusive_sum(sum, warp_sums);
        for (int r = mine.begin; r < mine.end; ++r) {
            const long long count = counts[r];
            counts[r] = before;
            before += count;
        }
        if (threadIdx.x == blockDim.x - 1) starts[DIGITS * runs + d] = before;
    }
}

extern "C" __global__ void __launch_bounds__(256)
sort_scatter(const Keys from, const Keys to, const long long count, const long long shift, const long long* starts) {
    __shared__ SortScratch scratch;
    const Run digits = thread_run(DIGITS);
    const long long runs = runs_of(count);
    clear(scratch);
    __syncthreads();
    for (long long r = blockIdx.x; r < runs; r += gridDim.x) {
        const KeysInMemory source = run_at(from, shift, r);
        const Run run = warp_run(run_size(count, r));
        count_digits(source, run, scratch);
#pragma unroll 1
        for (int d = digits.begin; d < digits.end; ++d) scratch.starts[d] = starts[DIGITS * runs + d];
        sum_starts(scratch);
#pragma unroll 1
        for (int d = digits.begin; d < digits.end; ++d) scratch.starts[d] += starts[d * runs + r];
        scatter(source, KeysInMemory{to, 0}, run, scratch);
    }
}
