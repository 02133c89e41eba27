// Memory side of the updates: which thread loads, computes and stores which element, 16 bytes at a time.
//
// A range of consecutive elements belongs to one block. Its first elements up to a 16-byte boundary (the head) and the
// last ones after the last full pack (the tail) are moved one by one, the rest in packs; a misaligned array costs its
// head, never the whole range. Slots are allocated at the same offset from a 16-byte boundary as their variable, so one
// head serves theta, m, v and vhat. A gradient that lies otherwise is loaded element by element.
//
// The host's fast mode has packs of one element: its compiler vectorises the loop itself.
#pragma once
#include "adam_math.cuh"

constexpr int PACK = GPU_ADAM_PACK_BYTES / sizeof(Stored) > 0 ? GPU_ADAM_PACK_BYTES / sizeof(Stored) : 1;

template <typename T>
struct alignas(sizeof(T) * PACK) Pack {
    T x[PACK];
};

template <typename T>
__device__ inline Pack<T> load_pack(const T* p) { return *reinterpret_cast<const Pack<T>*>(p); }

template <typename T>
__device__ inline void store_pack(T* p, const Pack<T>& pack) { *reinterpret_cast<Pack<T>*>(p) = pack; }

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

// Where the elements to update lie.
struct Range {
    Stored* __restrict__ theta;
    Stored* __restrict__ m;
    StoredReal* __restrict__ v;
    StoredReal* __restrict__ vhat;
    int size;
};

// A gradient in global memory, clipped on its way in.
struct GlobalGradient {
    const Stored* __restrict__ g;
    bool packed;  // g + head is 16-byte aligned
    ClipFactor factor;

    __device__ Pack<Stored> pack(int i) const {
        if (packed) return load_pack(g + i);
        Pack<Stored> pack;
#pragma unroll
        for (int k = 0; k < PACK; ++k) pack.x[k] = g[i + k];
        return pack;
    }
    __device__ Stored element(int i) const { return g[i]; }
    __device__ Value computed(Stored x, const Step& step) const { return clipped(value(x), step, factor); }
};

// A gradient in shared memory, already clipped and summed.
struct SharedGradient {
    const Value* g;

    __device__ Pack<Value> pack(int i) const {
        Pack<Value> pack;
#pragma unroll
        for (int k = 0; k < PACK; ++k) pack.x[k] = g[i + k];
        return pack;
    }
    __device__ Value element(int i) const { return g[i]; }
    __device__ Value computed(Value x, const Step&) const { return x; }
};

// Update every element of the range once. Threads of the block stride through it; any blockDim.x is right. An element is
// read before it is written, by the thread that writes it, so the gradient may be theta, m, v or vhat itself, but must
// not overlap them otherwise. No barrier inside. size = 0: nothing happens.
template <typename Gradient>
__device__ inline void update_range(const Range range, const Gradient gradient, const Step step) {
    Stored* __restrict__ const theta = range.theta;
    Stored* __restrict__ const m = range.m;
    StoredReal* __restrict__ const v = range.v;
    StoredReal* __restrict__ const vhat = range.vhat;
    const int size = range.size;
    const int head = head_size(theta, size);
    const int packs = (size - head) / PACK;

    for (int j = threadIdx.x; j < packs; j += blockDim.x) {
        const int i = head + j * PACK;
        const auto g = gradient.pack(i);
        Pack<Stored> theta_pack = load_pack(theta + i);
        Pack<Stored> m_pack = load_pack(m + i);
        Pack<StoredReal> v_pack = load_pack(v + i);
#if GPU_ADAM_AMSGRAD
        Pack<StoredReal> vhat_pack = load_pack(vhat + i);
#endif
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            Element e = {value(theta_pack.x[k]), value(m_pack.x[k]), real(v_pack.x[k])};
#if GPU_ADAM_AMSGRAD
            e.vhat = real(vhat_pack.x[k]);
#endif
            e = adam(e, gradient.computed(g.x[k], step), step);
            store(theta_pack.x[k], e.theta);
            store(m_pack.x[k], e.m);
            store(v_pack.x[k], e.v);
#if GPU_ADAM_AMSGRAD
            store(vhat_pack.x[k], e.vhat);
#endif
        }
        store_pack(theta + i, theta_pack);
        store_pack(m + i, m_pack);
        store_pack(v + i, v_pack);
#if GPU_ADAM_AMSGRAD
        store_pack(vhat + i, vhat_pack);
#endif
    }

    // Head and tail together are fewer than 2 PACK elements; element j of them is i of the range.
    const int tail = head + packs * PACK;
    for (int j = threadIdx.x; j < head + size - tail; j += blockDim.x) {
        const int i = j < head ? j : tail + j - head;
        Element e = {value(theta[i]), value(m[i]), real(v[i])};
#if GPU_ADAM_AMSGRAD
        e.vhat = real(vhat[i]);
#endif
        e = adam(e, gradient.computed(gradient.element(i), step), step);
        store(theta[i], e.theta);
        store(m[i], e.m);
        store(v[i], e.v);
#if GPU_ADAM_AMSGRAD
        store(vhat[i], e.vhat);
#endif
    }
}
