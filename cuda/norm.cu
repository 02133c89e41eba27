// Norms of gradients for clipping, in two passes; the result stays on the device as factors that the updates apply.
//
//     pass 1  square_sums (all dense gradients of a dtype) or square_sums_of (one array): sums over chunks
//     pass 2  clip_by_norm (each tensor's own norm) or clip_by_global_norm (one norm over everything)
//
// Launch   any grid, any block of at most 256 threads in x.
// Order    fixed by the element's index, not by the launch: within a chunk element i is added to lane i % 1024 in order of
//          i, then the lanes are added as a binary tree, lane k taking lane k + 512, k + 256, ... A tensor's or the
//          global sum adds the chunks' sums the same way. All in float64, so the same bits everywhere.
// Result   pass 2's sums are valid in thread 0. Empty: norm 0, which clips to factors that leave zeros zeros.
// NaN      a norm that is NaN or infinite makes every factor it belongs to NaN, so that it is noticed.
#include "memory.cuh"
#include "tensor_table.cuh"

constexpr int LANES = 1024;
// Lanes that a thread sums side by side in registers: a 16-byte load; all of them where a block is one thread.
constexpr int WIDTH = GPU_ADAM_ONE_THREAD ? LANES : PACK;

// Sum over [0, n) of the terms, in the order above; the result in lanes[0] until the block's next call.
template <typename Terms>
__device__ inline double ordered_sum(long long n, const Terms terms, double* lanes) {
    __syncthreads();  // the previous call's result has been read
    for (int group = threadIdx.x; group < LANES / WIDTH; group += blockDim.x) {
        double sum[WIDTH] = {};
        long long i = group * WIDTH;
#pragma unroll 4
        for (; i + WIDTH <= n; i += LANES) terms.add(sum, i);
        for (int k = 0; i + k < n && k < WIDTH; ++k) sum[k] += terms.at(i + k);
        for (int k = 0; k < WIDTH; ++k) lanes[group * WIDTH + k] = sum[k];
    }
    __syncthreads();
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = threadIdx.x; lane < half; lane += blockDim.x) lanes[lane] += lanes[lane + half];
        __syncthreads();
    }
    return lanes[0];
}

struct Squares {
    const Stored* g;
    StoredReal clip_value;
    bool packed;

    __device__ double term(Stored x) const { return norm_term(clamped(value(x), real(clip_value))); }
    __device__ double at(long long i) const { return term(g[i]); }
    __device__ void add(double* sum, long long i) const {
        if (!GPU_ADAM_ONE_THREAD && packed) {
            const Pack<Stored> pack = load_pack<PACK>(g + i);
#pragma unroll
            for (int k = 0; k < PACK; ++k) sum[k] += term(pack.x[k]);
        } else {
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum[k] += term(g[i + k]);
        }
    }
};

struct Partials {
    const double* sums;

    __device__ double at(long long i) const { return sums[i]; }
    __device__ void add(double* sum, long long i) const {
        for (int k = 0; k < WIDTH; ++k) sum[k] += sums[i + k];
    }
};

// sums[chunk] of every dense gradient.
extern "C" __global__ void __launch_bounds__(256)
square_sums(const TensorTable table, const StoredReal clip_value, double* sums) {
    __shared__ double lanes[LANES];
    for (long long index = blockIdx.x; index < table.chunks; index += gridDim.x) {
        const Chunk chunk = chunk_at(table, index);
        const Stored* const g = in_global_memory(table.gradients[chunk.tensor]) + chunk.begin;
        const double sum = ordered_sum(chunk.size, Squares{g, clip_value, aligned(g)}, lanes);
        if (threadIdx.x == 0) sums[index] = sum;
    }
}

// sums[chunk] of one array: the values of a sparse gradient, before duplicates are summed.
extern "C" __global__ void __launch_bounds__(256)
square_sums_of(const Stored* values, const long long size, const StoredReal clip_value, double* sums) {
    __shared__ double lanes[LANES];
    for (long long index = blockIdx.x; index * GPU_ADAM_CHUNK < size; index += gridDim.x) {
        const long long begin = index * GPU_ADAM_CHUNK;
        const long long left = size - begin;
        const Squares squares = {values + begin, clip_value, aligned(values + begin)};
        const double sum = ordered_sum(left < GPU_ADAM_CHUNK ? left : GPU_ADAM_CHUNK, squares, lanes);
        if (threadIdx.x == 0) sums[index] = sum;
    }
}

// min(1, c / n), the factor that takes a gradient of norm n to at most c, 0 where that is denormal; NaN where n is not
// finite.
__device__ inline double clip_factor(double norm, double clipnorm) {
    const double ratio = flushed(clipnorm / norm).x;
    return norm - norm == 0.0 ? (ratio < 1.0 ? ratio : 1.0) : norm - norm;
}

// factors[t] for n = ||g||_2 of each tensor. Tensor t's sums are [ends[t - 1], ends[t]); null ends mean one tensor with
// `count` sums.
extern "C" __global__ void __launch_bounds__(256)
clip_by_norm(const double* sums, const long long* ends, const long long tensors, const long long count,
             const double clipnorm, double* factors) {
    __shared__ double lanes[LANES];
    for (long long t = blockIdx.x; t < tensors; t += gridDim.x) {
        const long long begin = t == 0 ? 0 : ends[t - 1];
        const long long end = ends ? ends[t] : count;
        const double norm = sqrt(ordered_sum(end - begin, Partials{sums + begin}, lanes));
        if (threadIdx.x == 0) factors[t] = clip_factor(norm, clipnorm);
    }
}

// The one factor for n = the norm over all `count` sums.
extern "C" __global__ void __launch_bounds__(256)
clip_by_global_norm(const double* sums, const long long count, const double clipnorm, double* factor) {
    __shared__ double lanes[LANES];
    const double norm = sqrt(ordered_sum(count, Partials{sums}, lanes));
    if (threadIdx.x == 0) *factor = clip_factor(norm, clipnorm);
}
