// The rows of a sparse gradient in ascending order, with the positions they came from, equal rows in order of occurrence.
//
//     sort_rows   the whole job in one block, for up to GPU_ADAM_SORT_RUN indices
//     sort_keys, then per 4-bit digit sort_count, sort_scan, sort_scatter: for any number
//
// Launch   sort_rows and sort_scan: one block; the others: one block per GPU_ADAM_SORT_RUN keys. blockDim.x as in
//          sort.cuh. Both ways give the same result, whatever the block size.
// Errors   an index outside [0, rows) gets the key `rows`, so the index sorts behind every row and is never applied.
//          IndexErrors counts such indices, and keeps the smallest position of one in the first step that had any.
// count=0  nothing happens.
#include "sort.cuh"

__device__ inline void read_keys(const Indices indices, Run run, const Keys keys, IndexErrors* errors) {
    for (long long i = run.begin; i < run.end; ++i) {
        const long long row = index_at(indices, i);
        const bool inside = 0 <= row && row < indices.rows;
        if (!inside) {
            atomicAdd(&errors->count, 1ULL);
            // Later steps must not overwrite the first bad step's position: sparse.cu has recorded the index there.
            if (!errors->recorded) atomicMin(&errors->first_position, static_cast<unsigned long long>(i));
        }
        keys.row[i] = inside ? row : indices.rows;
        keys.position[i] = i;
    }
}

// The sorted keys end in `a` after an even number of passes and in `b` after an odd one.
extern "C" __global__ void __launch_bounds__(256)
sort_rows(const Indices indices, Keys a, Keys b, const long long passes, IndexErrors* errors) {
    __shared__ SortScratch scratch;
    const Run run = thread_run(0, indices.count);
    read_keys(indices, run, a, errors);
    __syncthreads();
    for (int pass = 0; pass < passes; ++pass) {
        const int shift = 4 * pass;
        count_digits(a, run, shift, scratch);
        scan_counts(scratch);
        scatter(a, b, run, shift, nullptr, 0, scratch);
        const Keys swapped = a;
        a = b;
        b = swapped;
    }
}

extern "C" __global__ void __launch_bounds__(256)
sort_keys(const Indices indices, const Keys keys, IndexErrors* errors) {
    for (long long block = blockIdx.x; block * GPU_ADAM_SORT_RUN < indices.count; block += gridDim.x) {
        const long long begin = block * GPU_ADAM_SORT_RUN;
        const long long end = begin + GPU_ADAM_SORT_RUN;
        read_keys(indices, thread_run(begin, end < indices.count ? end : indices.count), keys, errors);
    }
}

// starts[digit * runs + run]: how often the digit stands in the run.
extern "C" __global__ void __launch_bounds__(256)
sort_count(const Keys keys, const long long count, const long long shift, long long* starts) {
    __shared__ SortScratch scratch;
    const long long runs = (count + GPU_ADAM_SORT_RUN - 1) / GPU_ADAM_SORT_RUN;
    for (long long r = blockIdx.x; r < runs; r += gridDim.x) {
        const long long begin = r * GPU_ADAM_SORT_RUN;
        const long long end = begin + GPU_ADAM_SORT_RUN;
        count_digits(keys, thread_run(begin, end < count ? end : count), static_cast<int>(shift), scratch);
        for (int d = threadIdx.x; d < DIGITS; d += blockDim.x) {
            long long sum = 0;
            for (int t = 0; t < static_cast<int>(blockDim.x); ++t) sum += scratch.counts[d * blockDim.x + t];
            starts[d * runs + r] = sum;
        }
        __syncthreads();
    }
}

// starts becomes its exclusive sum: where each run's keys with each digit go.
extern "C" __global__ void __launch_bounds__(256)
sort_scan(long long* starts, const long long size) {
    __shared__ long long sums[MAX_THREADS];
    const Run run = thread_run(0, size);
    long long sum = 0;
    for (long long i = run.begin; i < run.end; ++i) sum += starts[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    long long before = 0;
    for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) before += sums[t];
    for (long long i = run.begin; i < run.end; ++i) {
        const long long here = starts[i];
        starts[i] = before;
        before += here;
    }
}

extern "C" __global__ void __launch_bounds__(256)
sort_scatter(const Keys from, const Keys to, const long long count, const long long shift, const long long* starts) {
    __shared__ SortScratch scratch;
    const long long runs = (count + GPU_ADAM_SORT_RUN - 1) / GPU_ADAM_SORT_RUN;
    for (long long r = blockIdx.x; r < runs; r += gridDim.x) {
        const long long begin = r * GPU_ADAM_SORT_RUN;
        const long long end = begin + GPU_ADAM_SORT_RUN;
        const Run run = thread_run(begin, end < count ? end : count);
        count_digits(from, run, static_cast<int>(shift), scratch);
        scan_counts(scratch);
        scatter(from, to, run, static_cast<int>(shift), starts + r, runs, scratch);
    }
}
