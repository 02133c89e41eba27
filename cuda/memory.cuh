// Memory side of the updates: which thread loads, computes and stores which element, 16 bytes at a time.
//
// A range of consecutive elements belongs to one block. Its first elements up to a 16-byte boundary (the head) and the
// last ones after the last full pack (the tail) are moved one by one, the rest in packs; a misaligned array costs its
// head, never the whole range. Slots are allocated at the same offset from a 16-byte boundary as their variable, so one
// head serves every slot (slots.cuh). A gradient at another offset is loaded element by element.
//
// The host's fast mode has packs of one element: its compiler vectorises the loop itself, strip by strip. Where that is
// faster, the shim fetches a strip ahead of it, because a processor's own prefetchers stop at every 4 KB page (fast.h).
#pragma once
#include "adam_math.cuh"

#ifndef GPU_ADAM_ONE_THREAD  // defined by the host's fast mode only: a GPU hides latency behind other warps
#define GPU_ADAM_ONE_THREAD 0
#define GPU_ADAM_STRIP (1 << 30)
#define GPU_ADAM_REPLAYED 1
#define GPU_ADAM_PREFETCHES false
#define GPU_ADAM_PREFETCH(pointer)
#define GPU_ADAM_FETCH(pointer)
#define GPU_ADAM_HALVES 0
#define GPU_ADAM_INDEPENDENT
#define GPU_ADAM_CALLED
#endif

// Whether pairs of elements are moved as words of 32 bits: where a word has two BFloat16 of every array. As floats these are
// the word shifted, and the word masked; so a vector of floats comes out of a vector of words without a permutation.
template <typename T> constexpr bool IS_BFLOAT16 = false;
template <> constexpr bool IS_BFLOAT16<BFloat16> = true;
constexpr bool PAIRS = GPU_ADAM_ONE_THREAD && !EMA && !MASTER && IS_BFLOAT16<Stored> && IS_BFLOAT16<Gradient> &&
                       IS_BFLOAT16<Slot> && IS_BFLOAT16<SlotReal>;
constexpr int PACK = PAIRS ? 2 : GPU_ADAM_PACK_BYTES / sizeof(Stored) > 0 ? GPU_ADAM_PACK_BYTES / sizeof(Stored) : 1;

// N consecutive elements. Where the variable's are of 16 bits, eight of 32 are loaded as two times 16 bytes.
template <typename T, int N = PACK>
struct alignas(sizeof(T) * N < 16 || N == 1 ? sizeof(T) * N : 16) Pack {
    T x[N];
};

template <int N, typename T>
__device__ inline Pack<T, N> load_pack(const T* p) {
    if constexpr (PAIRS && IS_BFLOAT16<T> && N == 2) {
        const unsigned word = *reinterpret_cast<const unsigned*>(p);
        return {{{static_cast<unsigned short>(word)}, {static_cast<unsigned short>(word >> 16)}}};
    } else {
        return *reinterpret_cast<const Pack<T, N>*>(p);
    }
}

// A variable with a master is stored without having been loaded. NVRTC would store its pack of 16-bit numbers one by one,
// and words of 32 bits too.
template <typename T, int N>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack) {
    if constexpr (MASTER && sizeof(T) == 2 && N == 8) {
        Pack<unsigned long long, 2> words = {};
#pragma unroll
        for (int k = N - 1; k >= 0; --k) words.x[k / 4] = words.x[k / 4] << 16 | pack.x[k].bits;
        *reinterpret_cast<Pack<unsigned long long, 2>*>(p) = words;
    } else if constexpr (PAIRS && IS_BFLOAT16<T> && N == 2) {
        *reinterpret_cast<unsigned*>(p) = pack.x[0].bits | static_cast<unsigned>(pack.x[1].bits) << 16;
    } else {
        *reinterpret_cast<Pack<T, N>*>(p) = pack;
    }
}

template <typename T>
__device__ inline bool aligned(const T* p) {
    return PACK == 1 || reinterpret_cast<unsigned long long>(p) % alignof(Pack<T>) == 0;
}

// Elements before the first pack boundary of p, at most n.
template <typename T>
__device__ inline int head_size(const T* p, int n) {
    const int past = static_cast<int>(reinterpret_cast<unsigned long long>(p) % sizeof(Pack<T>) / sizeof(T));
    const int head = past == 0 ? 0 : PACK - past;
    return head < n ? head : n;
}

// N elements of a gradient, which may lie at another offset from a 16-byte boundary than its variable: not PACKED.
template <int N, bool PACKED, typename T>
__device__ inline Pack<T, N> gradient_pack(const T* g) {
    if constexpr (PACKED) return load_pack<N>(g);
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.x[k] = g[k];
    return pack;
}

// Consecutive elements of a variable to update.
template <typename Pointers>
struct RangeOf {
    Pointers slots;            // where they begin
    int size;                  // how many
    long long first;           // index of the first one in the variable
    unsigned long long noise;  // of the variable
};
using Range = RangeOf<Slots>;

// N consecutive elements of every slot, as one thread loads and stores them.
template <int N>
struct SlotPacks {
#define PACK_OF(slot, Memory, Register, present) Pack<Memory, N> slot;
    GPU_ADAM_SLOTS(PACK_OF)
#undef PACK_OF
};

// Whether a strip has floats in place of Float16, converted before its loop and after it, as many at once as the host's
// processor can: g++ 12 makes no vectors of its instructions for one number.
template <typename T> constexpr bool IS_FLOAT16 = false;
template <> constexpr bool IS_FLOAT16<Float16> = true;
template <> constexpr bool IS_FLOAT16<const Float16> = true;
constexpr bool HALVES = GPU_ADAM_HALVES && (IS_FLOAT16<Stored> || IS_FLOAT16<Gradient>);
// Whether theta is rounded there, a strip at once, and what comes behind that follows in a second loop.
constexpr bool ROUNDS_BY_STRIPS = HALVES && ROUNDS_AT_ONCE && IS_FLOAT16<Stored>;

template <typename T, bool = HALVES && IS_FLOAT16<T>> struct InStrip { using Type = T; };
template <typename T> struct InStrip<T, true> { using Type = float; };

// The n numbers at p as a strip has them: Float16 in `floats`, others where they are.
template <typename T>
__device__ inline typename InStrip<T>::Type* in_strip(T* p, int n, float* floats) {
    if constexpr (HALVES && IS_FLOAT16<T>) {
        int i = 0;
        for (; i + GPU_ADAM_HALVES <= n; i += GPU_ADAM_HALVES) widen_together(p + i, floats + i);
        for (; i < n; ++i) floats[i] = widened(p[i]);
        return floats;
    } else {
        return p;
    }
}
// Back to p, from where in_strip had put them.
template <typename T>
__device__ inline void out_of_strip(T* p, int n, const float* floats) {
    if constexpr (HALVES && IS_FLOAT16<T>) {
        int i = 0;
        for (; i + GPU_ADAM_HALVES <= n; i += GPU_ADAM_HALVES) narrow_together(floats + i, p + i);
        for (; i < n; ++i) narrow(p[i], floats[i]);
    }
}

// The slots of a strip.
struct StripSlots : Slots {
    InStrip<Stored>::Type* theta;  // in place of that of Slots
};

// A gradient in global memory, clipped on its way in.
template <bool PACKED, typename Number = Gradient>
struct GlobalGradient {
    const Number* __restrict__ g;
    Factor factor;

    template <int N>
    __device__ Pack<Number, N> pack(int i) const { return gradient_pack<N, PACKED>(g + i); }
    __device__ Value computed(Number x, const StepScalars& step) const {
        return clipped(value(x), step, factor);
    }
    // That of a strip, for which there is room in `floats`.
    __device__ auto strip(int begin, int n, float* floats) const {
        return GlobalGradient<PACKED, typename InStrip<Number>::Type>{in_strip(g + begin, n, floats), factor};
    }
};

// A gradient in shared memory, already clipped and summed.
template <bool PACKED>
struct SharedGradient {
    const Value* g;

    template <int N>
    __device__ Pack<Value, N> pack(int i) const { return gradient_pack<N, PACKED>(g + i); }
    __device__ Value computed(Value x, const StepScalars&) const { return x; }
    __device__ SharedGradient strip(int begin, int, float*) const { return {g + begin}; }
};

// Sums of squares that a thread takes of its elements, in float64: of theta_t - theta_{t-1}, before it is rounded to 16
// bits, and of theta_t, from which the next step goes on. Of no use where the kernel does not measure. In the host's fast
// mode there are as many sums as a strip has elements, so that its loop is vectorised.
struct Measures {
    static constexpr int LANES = MEASURES && GPU_ADAM_ONE_THREAD ? GPU_ADAM_STRIP : 1;
    double update[LANES], theta[LANES];

    __device__ void add_update(const Element& e, int lane) { update[lane] = plus_square(update[lane], e.moved); }
    __device__ void add_theta(const Element& e, int lane) { theta[lane] = plus_square(theta[lane], e.theta); }
};

// The sums of each thread of a block, in shared memory.
struct BlockMeasures {
    double update[MEASURES ? 256 : 1], theta[MEASURES ? 256 : 1];
};

// Where the sums of each chunk or tile go. Mirrored by gpu_adam.kernels.MEASURED_SUMS.
struct MeasuredSums {
    double* update;
    double* theta;
};

// Write what all threads of the block have measured: each thread's lanes in order, then a binary tree over the threads,
// thread k taking thread k + 128, k + 64, ... So the order depends on the launch shape. To be called by all threads.
__device__ inline void write_measures(const MeasuredSums& sums, long long index, const Measures& own,
                                      BlockMeasures& block) {
    if constexpr (MEASURES) {
        double* const update = block.update;
        double* const theta = block.theta;
        const int k = threadIdx.x, threads = blockDim.x;
        __syncthreads();  // the previous sums have been read
        update[k] = theta[k] = 0;
        for (int lane = 0; lane < Measures::LANES; ++lane) update[k] += own.update[lane], theta[k] += own.theta[lane];
        __syncthreads();
        for (int half = 128; half > 0; half /= 2) {
            if (k < half && k + half < threads) update[k] += update[k + half], theta[k] += theta[k + half];
            __syncthreads();
        }
        if (k == 0) sums.update[index] = update[0], sums.theta[index] = theta[0];
    }
}

template <typename Source>
__device__ __forceinline__ void prefetch(const Range& range, const Source& gradient, int i) {
#define FETCH(slot, Memory, Register, present) \
    if constexpr (present) GPU_ADAM_PREFETCH(range.slots.slot + i);
    GPU_ADAM_SLOTS(FETCH)
#undef FETCH
    GPU_ADAM_PREFETCH(gradient.g + i);
}

// Load, compute and store what one thread updates in one go: a pack, or one element of head or tail; and measure it.
// COMPLETE: false where theta is left as it is before its rounding.
template <int N, bool COMPLETE = true, typename Pointers, typename Source>
__device__ inline void update_pack(const RangeOf<Pointers>& range, const Source& gradient, const StepScalars& step, int i,
                                   Measures& measures, int lane) {
    const Pointers& slots = range.slots;
    const auto g = gradient.template pack<N>(i);
    struct {
#define PACK_OF(slot, Memory, Register, present) decltype(load_pack<N>(slots.slot)) slot;
        GPU_ADAM_SLOTS(PACK_OF)
#undef PACK_OF
    } packs;
#define LOAD(slot, Memory, Register, present) \
    if constexpr (present) packs.slot = load_pack<N>(slots.slot + i);
    GPU_ADAM_SLOTS(LOAD)
#undef LOAD
#pragma unroll
    for (int k = 0; k < N; ++k) {
        Element e = {};
#define READ(slot, Memory, Register, present) \
    if constexpr (present) e.slot = Converted<Register>::from(packs.slot.x[k]);
        GPU_ADAM_SLOTS(READ)
#undef READ
        const Value own = gradient.computed(g.x[k], step);
        if constexpr (COMPLETE) {
            e = adam(e, own, step, noise_at(range.noise, range.first, i + k));
        } else {
            e = unrounded(e, own, step);
        }
        if constexpr (MEASURES) measures.add_update(e, lane);
        if constexpr (MEASURES && COMPLETE) measures.add_theta(e, lane);
#define WRITE(slot, Memory, Register, present) \
    if constexpr (present) store(packs.slot.x[k], e.slot);
        GPU_ADAM_SLOTS(WRITE)
#undef WRITE
        // In place of a second rounding, which changes nothing, and which no compiler knows to change nothing.
        if constexpr (COMPLETE && ROUNDS_AT_ONCE) packs.theta.x[k] = e.rounded;
    }
#define STORE(slot, Memory, Register, present) \
    if constexpr (present) store_pack(slots.slot + i, packs.slot);
    GPU_ADAM_SLOTS(STORE)
#undef STORE
}

// Load, compute and store n elements from `begin` on, where HALVES is true.
template <typename Source>
__device__ inline void update_halves(const Range& range, const Source& gradient, const StepScalars& step, int begin, int n,
                                     Measures& measures) {
    alignas(64) float theta[GPU_ADAM_STRIP], g[GPU_ADAM_STRIP];
    const auto source = gradient.strip(begin, n, g);
    StripSlots slots = {range.slots.at(begin)};
    slots.theta = in_strip(range.slots.theta + begin, MASTER ? 0 : n, theta);  // a master is read in its place
    const RangeOf<StripSlots> strip = {slots, n, range.first + begin, range.noise};
    GPU_ADAM_INDEPENDENT
    for (int k = 0; k < n; ++k) update_pack<1, !ROUNDS_BY_STRIPS>(strip, source, step, k, measures, k);
    out_of_strip(range.slots.theta + begin, n, theta);
    if constexpr (ROUNDS_BY_STRIPS) {
        in_strip(range.slots.theta + begin, n, theta);
        GPU_ADAM_INDEPENDENT
        for (int k = 0; k < n; ++k) {
            Element e = {};
            e.theta = theta[k];
            if constexpr (MEASURES) measures.add_theta(e, k);
            if constexpr (EMA) {
                e.average = slots.average[k];
                slots.average[k] = averaged(e, step).average;
            }
        }
    }
}

// Update every element of the range once. Threads of the block stride through it; any blockDim.x is right. An element is
// read before it is written, by the thread that writes it, so the gradient may be one of the slots itself, but must
// not overlap a slot otherwise. No barrier inside. size = 0: nothing happens. Returns what the thread has measured.
template <typename Source>
__device__ inline Measures update_range(const Range range, const Source gradient, const StepScalars step) {
    Measures measures = {};
    const int head = head_size(range.slots.theta, range.size);
    const int packs = (range.size - head) / PACK;
    const bool prefetches = GPU_ADAM_PREFETCHES;
    constexpr int STRIP = PAIRS ? GPU_ADAM_STRIP / PACK : GPU_ADAM_STRIP;  // packs; on a GPU one strip is all there is
    for (int strip = 0; strip < packs; strip += STRIP) {
        const int end = packs - strip < STRIP ? packs : strip + STRIP;
        if (prefetches) prefetch(range, gradient, head + strip * PACK);
        if constexpr (HALVES) {
            update_halves(range, gradient, step, strip, end - strip, measures);
            continue;
        }
        GPU_ADAM_INDEPENDENT
        for (int j = strip + threadIdx.x; j < end; j += blockDim.x) {
            update_pack<PACK>(range, gradient, step, head + j * PACK, measures, GPU_ADAM_ONE_THREAD ? j - strip : 0);
        }
    }
    // Head and tail together are fewer than 2 PACK elements.
    const int tail = head + packs * PACK;
    for (int j = threadIdx.x; j < head + range.size - tail; j += blockDim.x) {
        update_pack<1>(range, gradient, step, j < head ? j : tail + j - head, measures, 0);
    }
    return measures;
}
