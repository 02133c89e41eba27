// Norms of gradients for clipping, in one pass; the result stays on the device as factors that the updates apply.
//
//     square_sums     of all dense gradients of a dtype: the sum of squares of each chunk
//     square_sums_of  of one array
//
// The block that writes the last sum of a norm adds the sums and writes the factor: `Norm` tells whether there is a norm for
// each tensor or one over all gradients, or whether the sums alone are asked for. Where several launches write the sums of
// one norm, clip_by_global_norm follows them: counted sums of a step whose second launch fails would be left over.
//
// With GPU_ADAM_STAGED the pass belongs to a step that guard.cu decides about: it takes the scalars from where `staged`
// points, and adds to `found`, unless that is null, how many elements of the gradients are not finite. They are integers,
// so that the order of the blocks changes nothing. add_square_sum adds the sums of one array of sums to a total.
//
// Launch   any grid, any block of at most 256 threads in x.
// Order    fixed by the element's index, not by the launch: within a chunk element i is added to lane i % 1024 in order of
//          i, then the lanes are added as a binary tree, lane k taking lane k + 512, k + 256, ... A tensor's or the
//          global sum adds the chunks' sums the same way, whichever block does it. All in float64, so the same bits
//          everywhere.
// Result   Empty gradients have no chunk, and no factor: nothing reads it.
// NaN      a norm that is NaN or infinite makes its factors NaN, and thereby every gradient that the factors clip.
#include "memory.cuh"
#include "tensor_table.cuh"

constexpr int LANES = 1024;

// Add terms [row, row + count) to the lanes, strip by strip as the updates go (memory.cuh).
template <bool FIRST, typename Terms>
__device__ inline void add_row(long long row, int count, const Terms& terms, double* lanes) {
    const bool prefetches = GPU_ADAM_PREFETCHES;
    alignas(64) float floats[GPU_ADAM_STRIP];
    for (int begin = 0; begin < count; begin += GPU_ADAM_STRIP) {
        const int n = count - begin < GPU_ADAM_STRIP ? count - begin : GPU_ADAM_STRIP;
        if (prefetches) terms.prefetch(row + begin);
        const auto strip = terms.strip(row + begin, n, floats);
        double* const own = lanes + begin;
        GPU_ADAM_INDEPENDENT
        for (int k = 0; k < n; ++k) {
            own[k] = strip.plus(FIRST ? 0.0 : own[k], k);  // 0.0 +: a denormal term may be no zero, its sum is
        }
    }
}

// The same sum by a block of one thread: the lanes stay in the processor's first cache, and each row of terms is added to
// them by a loop that the compiler vectorises. Lanes without a term would be +0, and +0 added to a sum of squares changes
// no bit: a short tensor's are left out.
template <typename Terms>
__device__ inline double sum_of_one_thread(long long n, const Terms& terms, double* lanes) {
    int used = static_cast<int>(n < LANES ? n : LANES);
    if (used == 0) return 0.0;
    add_row<true>(0, used, terms, lanes);
    for (long long row = LANES; row < n; row += LANES) {
        add_row<false>(row, static_cast<int>(n - row < LANES ? n - row : LANES), terms, lanes);
    }
    for (int half = LANES / 2; half > 0; half /= 2) {
        GPU_ADAM_INDEPENDENT
        for (int k = 0; k < used - half; ++k) lanes[k] += lanes[k + half];
        used = used < half ? used : half;
    }
    return lanes[0];
}

// Sum over [0, n) of the terms, in the order above; the result stays in lanes[0] until the block's next call.
template <typename Terms>
__device__ inline double ordered_sum(long long n, const Terms terms, double* lanes) {
    if constexpr (GPU_ADAM_ONE_THREAD) return sum_of_one_thread(n, terms, lanes);
    __syncthreads();  // the previous call's result has been read
    // A thread sums as many lanes side by side in registers as a load brings.
    for (int group = threadIdx.x; group < LANES / PACK; group += blockDim.x) {
        double sum[PACK] = {};
        long long i = group * PACK;
#pragma unroll 4
        for (; i + PACK <= n; i += LANES) terms.add(sum, i);
        for (int k = 0; i + k < n && k < PACK; ++k) sum[k] = terms.plus(sum[k], i + k);
        for (int k = 0; k < PACK; ++k) lanes[group * PACK + k] = sum[k];
    }
    __syncthreads();
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = threadIdx.x; lane < half; lane += blockDim.x) lanes[lane] += lanes[lane + half];
        __syncthreads();
    }
    return lanes[0];
}

template <typename Number>
struct Squares {
    Number* g;
    const StepScalars& step;
    bool packed;

    __device__ double with(double sum, Number x) const { return plus_square(sum, bounded(value(x), step)); }
    __device__ double plus(double sum, long long i) const { return with(sum, g[i]); }
    __device__ void prefetch(long long i) const { GPU_ADAM_PREFETCH(g + i); }
    __device__ auto strip(long long begin, int n, float* floats) const {
        return Squares<typename InStrip<Number>::Type>{in_strip(g + begin, n, floats), step, packed};
    }
    __device__ void add(double* sum, long long i) const {
        if (packed) {
            const auto pack = load_pack<PACK>(g + i);
#pragma unroll
            for (int k = 0; k < PACK; ++k) sum[k] = with(sum[k], pack.x[k]);
        } else {
#pragma unroll
            for (int k = 0; k < PACK; ++k) sum[k] = with(sum[k], g[i + k]);
        }
    }
};

__device__ inline bool is_finite(float x) { return x - x == 0; }
__device__ inline bool is_finite(Double x) { return x.x - x.x == 0; }
template <typename Real>
__device__ inline bool is_finite(Complex<Real> x) { return is_finite(x.re) && is_finite(x.im); }

// The sum over one chunk. An element that is not finite shows in the sum, unless it is clipped by value first. A sum of
// finite numbers may become infinite too, so that the elements decide; they are in a cache by then.
__device__ inline double sum_of_squares(const Gradient* g, int n, const StepScalars& step, unsigned long long* found,
                                        double* lanes) {
    const double sum = ordered_sum(n, Squares<const Gradient>{g, step, aligned(g)}, lanes);
    if constexpr (STAGED) {
        if (found && (BOUNDED || !(sum - sum == 0))) {
            unsigned long long here = 0;
            for (int i = threadIdx.x; i < n; i += blockDim.x) here += !is_finite(value(g[i]));
            if (here) atomicAdd(found, here);
        }
    }
    return sum;
}

struct Partials {
    const double* sums;

    __device__ double plus(double sum, long long i) const { return sum + sums[i]; }
    __device__ void prefetch(long long i) const { GPU_ADAM_PREFETCH(sums + i); }
    __device__ Partials strip(long long begin, int, float*) const { return {sums + begin}; }
    __device__ void add(double* sum, long long i) const {
        for (int k = 0; k < PACK; ++k) sum[k] += sums[i + k];
    }
};

__device__ GPU_ADAM_CALLED inline double sum_of_partials(const double* sums, long long count, double* lanes) {
    return ordered_sum(count, Partials{sums}, lanes);
}

// min(1, c / n), the factor that takes a gradient of norm n to at most c; 0 where c / n is denormal, NaN where n is not
// finite.
__device__ inline double clip_factor(double norm, double clipnorm) {
    const double ratio = flush_always(clipnorm / norm).x;
    return norm - norm == 0.0 ? (ratio < 1.0 ? ratio : 1.0) : norm - norm;
}

// What becomes of the sums. Mirrored by gpu_adam.kernels.NORM.
struct Norm {
    double* factors;              // of each norm; null where the sums alone are asked for
    unsigned long long* written;  // how many of its sums are there: zero before a launch, and after it
    long long stride;             // 1 where each tensor has a norm of its own, 0 where there is one
    double limit;                 // of a norm
};

// The sums that make norm number `which`.
struct NormSums {
    double* begin;
    long long count, which;
};

// Write a chunk's sum to `place` and, where it is the last one of its norm, the factor.
__device__ inline void write_sum(double* place, double sum, const NormSums& sums, const Norm& norm, double* lanes,
                                 bool& is_last) {
    if (threadIdx.x == 0) *place = sum;
    if (!norm.factors) return;
    if (threadIdx.x == 0) {
        __threadfence();  // the sum is there before it is counted
        is_last = atomicAdd(norm.written + sums.which, 1ULL) + 1 == static_cast<unsigned long long>(sums.count);
        __threadfence();  // all are counted before they are read
    }
    __syncthreads();
    if (!is_last) return;
    const double length = sqrt(sum_of_partials(sums.begin, sums.count, lanes));
    if (threadIdx.x == 0) {
        norm.factors[sums.which] = clip_factor(length, norm.limit);
        norm.written[sums.which] = 0;
    }
}

// The sums of one tensor.
__device__ inline NormSums sums_of(const TensorTable& table, int t, double* sums) {
    const Tensor& tensor = table.tensors[t];
    return {sums + tensor.first_chunk, (tensor.size + GPU_ADAM_CHUNK - 1) / GPU_ADAM_CHUNK, t};
}

// sums[chunk] of every dense gradient.
extern "C" __global__ void __launch_bounds__(256)
square_sums(const TensorTable table, const StepScalars scalars, const StepScalars* staged, double* sums,
            unsigned long long* found, const Norm norm) {
    const StepScalars step = STAGED ? *staged : scalars;
    __shared__ double lanes[LANES];
    __shared__ bool is_last;
    for (long long index = blockIdx.x; index < table.chunks; index += gridDim.x) {
        const Chunk chunk = chunk_at(table, index);
        const Gradient* const g = in_global_memory(table.gradients[chunk.tensor]) + chunk.begin;
        const double sum = sum_of_squares(g, chunk.size, step, found, lanes);
        const NormSums all = {sums, table.chunks, 0};
        write_sum(sums + index, sum, norm.stride ? sums_of(table, chunk.tensor, sums) : all, norm, lanes, is_last);
    }
}

// sums[chunk] of one array: the values of a sparse gradient, before duplicates are summed.
extern "C" __global__ void __launch_bounds__(256)
square_sums_of(const Gradient* values, const long long size, const StepScalars scalars, const StepScalars* staged,
               double* sums, unsigned long long* found, const Norm norm) {
    const StepScalars step = STAGED ? *staged : scalars;
    __shared__ double lanes[LANES];
    __shared__ bool is_last;
    for (long long index = blockIdx.x; index * GPU_ADAM_CHUNK < size; index += gridDim.x) {
        const long long begin = index * GPU_ADAM_CHUNK;
        const long long left = size - begin;
        const int size_here = static_cast<int>(left < GPU_ADAM_CHUNK ? left : GPU_ADAM_CHUNK);
        const double sum = sum_of_squares(values + begin, size_here, step, found, lanes);
        const NormSums all = {sums, (size + GPU_ADAM_CHUNK - 1) / GPU_ADAM_CHUNK, 0};
        write_sum(sums + index, sum, all, norm, lanes, is_last);
    }
}

// The one factor for n = the norm over all `count` sums.
extern "C" __global__ void __launch_bounds__(256)
clip_by_global_norm(const double* sums, const long long count, const double clipnorm, double* factor) {
    __shared__ double lanes[LANES];
    const double norm = sqrt(sum_of_partials(sums, count, lanes));
    if (threadIdx.x == 0) *factor = clip_factor(norm, clipnorm);
}

// The factor of each of several norms: number i is over the sums [begins[2 i], begins[2 i + 1]).
extern "C" __global__ void __launch_bounds__(256)
clip_by_norms(const double* sums, const long long* begins, const long long norms, const double clipnorm, double* factors) {
    __shared__ double lanes[LANES];
    for (long long i = blockIdx.x; i < norms; i += gridDim.x) {
        const double* const own = sums + begins[2 * i];
        const double norm = sqrt(ordered_sum(begins[2 * i + 1] - begins[2 * i], Partials{own}, lanes));
        if (threadIdx.x == 0) factors[i] = clip_factor(norm, clipnorm);
        __syncthreads();  // before the next norm's lanes
    }
}

// Add all `count` sums to the total.
extern "C" __global__ void __launch_bounds__(256)
add_square_sum(const double* sums, const long long count, double* total) {
    __shared__ double lanes[LANES];
    const double sum = sum_of_partials(sums, count, lanes);
    if (threadIdx.x == 0) *total += sum;
}
