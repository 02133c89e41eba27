// Memory side of the updates: which thread loads, computes and stores which element, 16 bytes at a time.
//
// A range of consecutive elements belongs to one block. Its first elements up to a 16-byte boundary (the head) and the
// last ones after the last full pack (the tail) are moved one by one, the rest in packs; a misaligned array costs its
// head, never the whole range. Slots are allocated at the same offset from a 16-byte boundary as their variable, so one
// head serves theta, m, v and vhat. A gradient that lies otherwise is loaded element by element.
//
// The host's fast mode has packs of one element: its compiler vectorises the loop itself, strip by strip, and the shim
// fetches a strip ahead of it, because a processor's own prefetchers stop at every 4 KB page (measured: profiling/).
#pragma once
#include "adam_math.cuh"

#ifndef GPU_ADAM_ONE_THREAD  // defined by the host's fast mode only: a GPU hides latency behind other warps
#define GPU_ADAM_ONE_THREAD 0
#define GPU_ADAM_STRIP (1 << 30)
#define GPU_ADAM_PREFETCH(pointer)
#define GPU_ADAM_INDEPENDENT
#endif

constexpr int PACK = GPU_ADAM_PACK_BYTES / sizeof(Stored) > 0 ? GPU_ADAM_PACK_BYTES / sizeof(Stored) : 1;

template <typename T, int N = PACK>
struct alignas(sizeof(T) * N) Pack {
    T x[N];
};

template <int N, typename T>
__device__ inline Pack<T, N> load_pack(const T* p) { return *reinterpret_cast<const Pack<T, N>*>(p); }

template <typename T, int N>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack) { *reinterpret_cast<Pack<T, N>*>(p) = pack; }

template <typename T>
__device__ inline bool aligned(const T* p) {
    return reinterpret_cast<unsigned long long>(p) % sizeof(Pack<T>) == 0;
}

// Elements before the first pack boundary of p, at most n.
template <typename T>
__device__ inline int head_size(const T* p, int n) {
    const int past = static_cast<int>(reinterpret_cast<unsigned long long>(p) % sizeof(Pack<T>) / sizeof(T));
    const int head = past == 0 ? 0 : PACK - past;
    return head < n ? head : n;
}

// N elements of a gradient, which may lie at another offset from a 16-byte boundary than its variable.
template <int N, typename T>
__device__ inline Pack<T, N> gradient_pack(const T* g, bool packed) {
    if (packed) return load_pack<N>(g);
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.x[k] = g[k];
    return pack;
}

// Where the elements to update lie.
struct Range {
    Stored* __restrict__ theta;
    Stored* __restrict__ m;
    StoredReal* __restrict__ v;
    StoredReal* __restrict__ vhat;
    int size;
};

// A gradient in global memory, clipped on its way in; by value where that has a bound.
template <bool BOUNDED>
struct GlobalGradient {
    const Stored* __restrict__ g;
    bool packed;  // g + head is 16-byte aligned
    double factor;

    template <int N>
    __device__ Pack<Stored, N> pack(int i) const { return gradient_pack<N>(g + i, packed); }
    __device__ Value computed(Stored x, const Step& step) const { return clipped<BOUNDED>(value(x), step, factor); }
};

// A gradient in shared memory, already clipped and summed.
struct SharedGradient {
    const Value* g;
    bool packed;

    template <int N>
    __device__ Pack<Value, N> pack(int i) const { return gradient_pack<N>(g + i, packed); }
    __device__ Value computed(Value x, const Step&) const { return x; }
};

template <typename Gradient>
__device__ __forceinline__ void prefetch(const Range& range, const Gradient& gradient, int i) {
    GPU_ADAM_PREFETCH(range.theta + i);
    GPU_ADAM_PREFETCH(range.m + i);
    GPU_ADAM_PREFETCH(range.v + i);
#if GPU_ADAM_AMSGRAD
    GPU_ADAM_PREFETCH(range.vhat + i);
#endif
    GPU_ADAM_PREFETCH(gradient.g + i);
}

// What one thread updates in one go: a pack, or one element of head or tail.
template <int N, typename Gradient>
__device__ inline void update_pack(const Range& range, const Gradient& gradient, const Step& step, int i) {
    const auto g = gradient.template pack<N>(i);
    Pack<Stored, N> theta = load_pack<N>(range.theta + i);
    Pack<Stored, N> m = load_pack<N>(range.m + i);
    Pack<StoredReal, N> v = load_pack<N>(range.v + i);
#if GPU_ADAM_AMSGRAD
    Pack<StoredReal, N> vhat = load_pack<N>(range.vhat + i);
#endif
#pragma unroll
    for (int k = 0; k < N; ++k) {
        Element e = {value(theta.x[k]), value(m.x[k]), real(v.x[k])};
#if GPU_ADAM_AMSGRAD
        e.vhat = real(vhat.x[k]);
#endif
        e = adam(e, gradient.computed(g.x[k], step), step);
        store(theta.x[k], e.theta);
        store(m.x[k], e.m);
        store(v.x[k], e.v);
#if GPU_ADAM_AMSGRAD
        store(vhat.x[k], e.vhat);
#endif
    }
    store_pack(range.theta + i, theta);
    store_pack(range.m + i, m);
    store_pack(range.v + i, v);
#if GPU_ADAM_AMSGRAD
    store_pack(range.vhat + i, vhat);
#endif
}

// Update every element of the range once. Threads of the block stride through it; any blockDim.x is right. An element is
// read before it is written, by the thread that writes it, so the gradient may be theta, m, v or vhat itself, but must
// not overlap them otherwise. No barrier inside. size = 0: nothing happens.
template <typename Gradient>
__device__ inline void update_range(const Range range, const Gradient gradient, const Step step) {
    const int head = head_size(range.theta, range.size);
    const int packs = (range.size - head) / PACK;
    for (int strip = 0; strip < packs; strip += GPU_ADAM_STRIP) {
        const int end = packs - strip < GPU_ADAM_STRIP ? packs : strip + GPU_ADAM_STRIP;
        prefetch(range, gradient, head + strip * PACK);
        GPU_ADAM_INDEPENDENT
        for (int j = strip + threadIdx.x; j < end; j += blockDim.x) {
            update_pack<PACK>(range, gradient, step, head + j * PACK);
        }
    }
    // Head and tail together are fewer than 2 PACK elements.
    const int tail = head + packs * PACK;
    for (int j = threadIdx.x; j < head + range.size - tail; j += blockDim.x) {
        update_pack<1>(range, gradient, step, j < head ? j : tail + j - head);
    }
}
