// Noise for stochastic rounding: a hash of counters, so that an element's noise depends on nothing but
//
//     the optimizer's seed and t, as one number         (StepScalars::noise, computed on the host)
//     the variable's place in the order of slots        (Tensor::place)
//     the element's index in its variable
//
// and is the same on every device, for every launch shape, and for dense and sparse gradients.
#pragma once
#include "numbers.cuh"

constexpr bool STOCHASTIC = GPU_ADAM_STOCHASTIC;  // rounding of theta

// Every bit of x changes every bit of the result with a probability of a half: the finalizer of splitmix64 (Steele, Lea &
// Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
__device__ inline unsigned long long mixed(unsigned long long x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

// The noise of one variable in one step.
__device__ inline unsigned long long noise_of(unsigned long long step_noise, long long place) {
    return STOCHASTIC ? mixed(step_noise + static_cast<unsigned long long>(place) * 0x9e3779b97f4a7c15ULL) : 0;
}

// The noise of its element first + i: 32 bits, by the finalizer of MurmurHash3 (Appleby, 2011) with half of the variable's
// noise before the first multiplication and half before the second. In 32 bits, which processors multiply eight at a time.
__device__ inline unsigned noise_at(unsigned long long noise, long long first, int i) {
    if constexpr (!STOCHASTIC) return 0;
    const unsigned low = static_cast<unsigned>(first) + static_cast<unsigned>(i);
    const unsigned high = static_cast<unsigned>(first >> 32) + (low < static_cast<unsigned>(i));
    unsigned x = low ^ static_cast<unsigned>(noise);
    x = (x ^ x >> 16) * 0x85ebca6bu + static_cast<unsigned>(noise >> 32) + high;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
}

// A number as its variable's memory keeps it.
template <typename Memory = Stored>
__device__ inline Memory as_stored(Value x, unsigned noise) {
    Memory place;
    if constexpr (STOCHASTIC) {
        narrow_stochastically(place, x, noise);
    } else {
        store(place, x);
    }
    return place;
}
