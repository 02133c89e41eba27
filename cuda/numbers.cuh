// Numbers: what is stored, what is computed with, and the operations on which devices would otherwise differ.
//
// A row of the dtype table (gpu_adam/kernels/dtypes.py) names five types:
//   GPU_ADAM_STORED        an element of a variable in memory
//   GPU_ADAM_WIDE          the same element where it is kept without rounding; STORED but for numbers of 16 bits
//   GPU_ADAM_STORED_REAL   a scalar of a step in memory
//   GPU_ADAM_VALUE         an element while it is computed with
//   GPU_ADAM_REAL          v, and every scalar of a step, while computed with
// A variant adds what lies beside the variable:
//   GPU_ADAM_GRADIENT      an element of the gradient in memory
//   GPU_ADAM_SLOT          an element of m in memory
//   GPU_ADAM_SLOT_REAL     an element of v and vhat in memory
//
// Numbers of 16 bits are computed with in float, and rounded once, when they are stored.
//
// Rounding is IEEE nearest-even for + - * / sqrt, and no multiply-add is contracted (-fmad=false, -ffp-contract=off). One is
// written, where it changes no bit (`plus_square`).
// Denormal numbers are zero, sign kept, as operands and as results:
//   float    by the processor's modes: NVRTC is given -ftz=true, the host sets FTZ (denormal results become zero) and
//            DAZ (denormal operands are zero) around a launch;
//   Double   in software on every device, because CUDA has no such modes for 64 bits. FTZ of an x86 processor would not
//            give the same bits: FTZ rounds as if there were no smallest exponent, and then calls a result denormal,
//            which differs for a result that rounds up to the smallest normal number. DAZ does give the same bits, so
//            the host uses DAZ alone.
// A denormal Float16 is a normal float, and stays; a denormal BFloat16 is a denormal float.
#pragma once

#ifndef GPU_ADAM_DAZ  // 1 where the processor takes denormal operands for zeros
#define GPU_ADAM_DAZ 0
#endif

// A float64 whose every operation flushes denormals.
struct Double {
    double x;
};

// Zero with the sign of x where x is denormal, else x. An integer test, not a comparison: GPUs made for graphics run
// float64 instructions at 1/64 of the rate of integer ones.
__device__ inline Double flush_always(double x) {
    const long long bits = __double_as_longlong(x);
    const bool normal = (bits & 0x7ff0000000000000LL) != 0;
    return {normal ? x : __longlong_as_double(bits & static_cast<long long>(0x8000000000000000ULL))};
}

// An operand from memory, or a result. Where DAZ is on, a denormal number may stay in a register: the next operation
// takes the number for zero, and store() flushes it.
__device__ inline Double flush_unless_daz(double x) {
#if GPU_ADAM_DAZ
    return {x};
#else
    return flush_always(x);
#endif
}

__device__ inline Double operator+(Double a, Double b) { return flush_unless_daz(a.x + b.x); }
__device__ inline Double operator-(Double a, Double b) { return flush_unless_daz(a.x - b.x); }
__device__ inline Double operator*(Double a, Double b) { return flush_unless_daz(a.x * b.x); }
__device__ inline Double operator/(Double a, Double b) { return flush_unless_daz(a.x / b.x); }
__device__ inline Double operator-(Double a) { return {-a.x}; }
__device__ inline bool operator<(Double a, Double b) { return a.x < b.x; }
__device__ inline Double square_root(Double a) { return {sqrt(a.x)}; }  // of a normal number is never denormal
__device__ inline float square_root(float a) { return sqrtf(a); }

__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline Double magnitude(Double x) { return {fabs(x.x)}; }

// A complex number, which Adam only ever scales by real ones.
template <typename Real>
struct alignas(2 * sizeof(Real)) Complex {
    Real re, im;
};

template <typename Real>
__device__ inline Complex<Real> operator+(Complex<Real> a, Complex<Real> b) { return {a.re + b.re, a.im + b.im}; }
template <typename Real>
__device__ inline Complex<Real> operator-(Complex<Real> a, Complex<Real> b) { return {a.re - b.re, a.im - b.im}; }
template <typename Real>
__device__ inline Complex<Real> operator*(Complex<Real> a, Real b) { return {a.re * b, a.im * b}; }
template <typename Real>
__device__ inline Complex<Real> operator/(Complex<Real> a, Real b) { return {a.re / b, a.im / b}; }

// |x|^2 of one element: the term of v's moving average.
template <typename Real>
__device__ inline Real squared(Real x) { return x * x; }
template <typename Real>
__device__ inline Real squared(Complex<Real> x) { return x.re * x.re + x.im * x.im; }

// sum + |x|^2, by which norms are added up, in float64 whatever the dtype, so that float32 cannot overflow. The square of a
// float has at most 48 digits and is exact there: a multiply-add, which rounds once, has the bits of the two operations.
__device__ inline double plus_square(double sum, float x) {
    const double wide = x;
    return __fma_rn(wide, wide, sum);
}
__device__ inline double plus_square(double sum, Double x) { return sum + (x * x).x; }
template <typename Real>
__device__ inline double plus_square(double sum, Complex<Real> x) { return sum + plus_square(plus_square(0, x.im), x.re); }

// The larger, and `a` where `b` is NaN, as Keras computes vhat. (fmax would drop a NaN in `a` as well.)
template <typename Real>
__device__ inline Real maximum(Real a, Real b) { return a < b ? b : a; }

// Into [-bound, bound]; NaN stays NaN.
template <typename Real>
__device__ inline Real clamped(Real x, Real bound) { return bound < x ? bound : (x < -bound ? -bound : x); }

// Onto the disc of radius `bound`, keeping the direction; a number that is NaN or infinite stays. x is divided by its
// larger part first, so that no square overflows.
template <typename Real>
__device__ inline Complex<Real> clamped(Complex<Real> x, Real bound) {
    const Real largest = maximum(magnitude(x.re), magnitude(x.im));
    if (!(bound < largest + largest)) return x;  // |x| <= sqrt(2) largest
    const Real length = largest * square_root(squared(x / largest));
    return bound < length ? x * (bound / length) : x;
}

// Numbers of 16 bits in memory: 5 bits of exponent and 10 of fraction, or 8 and 7, the upper half of a float.
struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// By integers and by float operations whose operands and results are no denormals: the same bits on every device in every
// mode, in a form that compilers vectorise. Every NaN is stored as one and the same.
__device__ inline float widened(Float16 x) {
    const unsigned extended = static_cast<unsigned>(static_cast<short>(x.bits));  // its sign is where a float has it
    const unsigned places = extended << 13 & 0x0fffe000u;  // of exponent and fraction, in a float
    // The exponent is brought from one end of float's range to where it belongs, so that infinity stays infinity.
    const float normal = __uint_as_float(places + (224u << 23)) * __uint_as_float(15u << 23);  // 2^-112
    const float denormal = __uint_as_float(places + (113u << 23)) - 0x1p-14f;  // without the leading 1
    return __uint_as_float((extended & 0x80000000u) | __float_as_uint(places < 1u << 23 ? denormal : normal));
}
__device__ inline float widened(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

// To the nearest, ties to even; beyond the largest number infinity.
__device__ inline void narrow(Float16& place, float x) {
    const unsigned bits = __float_as_uint(x), absolute = bits & 0x7fffffffu, smallest = 113u << 23;  // 2^-14
    const unsigned infinite = 143u << 23, bounded = absolute < infinite ? absolute : infinite;       // 2^16
    const unsigned exponent = bounded & 0x7f800000u;
    // A number 2^13 times as large is added, so that the sum is rounded where a Float16 is. The last 16 bits of the sum
    // are the fraction and the leading 1, which counts up the exponent that the shift brings there: one that is 2 too
    // small, modulo 64.
    const float larger = __uint_as_float((exponent > smallest ? exponent : smallest) + (13u << 23));
    const unsigned sum = __float_as_uint(__uint_as_float(bounded) + larger);
    const unsigned rounded = (sum >> 13) + sum + (2u << 10);
    place.bits = static_cast<unsigned short>(x != x ? 0x7e00u : rounded | (bits >> 16 & 0x8000u));
}
__device__ inline void narrow(BFloat16& place, float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    place.bits = static_cast<unsigned short>(x != x ? 0x7fc0u : rounded);
}

// To one of the two neighbours, away from zero with the probability that makes the mean x. `noise` is uniform in its
// lower 16 bits, which infinity has zeros in: it stays.
__device__ inline void narrow_stochastically(BFloat16& place, float x, unsigned noise) {
    const unsigned bits = __float_as_uint(x);
    place.bits = static_cast<unsigned short>(x != x ? 0x7fc0u : (bits + (noise & 0xffffu)) >> 16);
}

// Memory <-> registers.
template <typename To> struct Converted;
template <> struct Converted<float> {
    __device__ static float from(float x) { return x; }
    __device__ static float from(Float16 x) { return widened(x); }
    __device__ static float from(BFloat16 x) { return widened(x); }
};
template <> struct Converted<Double> {
    __device__ static Double from(double x) { return flush_unless_daz(x); }
};
template <typename Real> struct Converted<Complex<Real>> {
    template <typename From>
    __device__ static Complex<Real> from(Complex<From> x) {
        return {Converted<Real>::from(x.re), Converted<Real>::from(x.im)};
    }
};
__device__ inline void store(float& place, float x) { place = x; }
__device__ inline void store(Float16& place, float x) { narrow(place, x); }
__device__ inline void store(BFloat16& place, float x) { narrow(place, x); }
__device__ inline void store(double& place, Double x) { place = GPU_ADAM_DAZ ? flush_always(x.x).x : x.x; }
template <typename To, typename From>
__device__ inline void store(Complex<To>& place, Complex<From> x) {
    store(place.re, x.re);
    store(place.im, x.im);
}

// Names without brackets for the dtype table.
using ComplexFloat = Complex<float>;
using StoredComplexDouble = Complex<double>;
using ComplexDouble = Complex<Double>;

using Stored = GPU_ADAM_STORED;
using Wide = GPU_ADAM_WIDE;
using StoredReal = GPU_ADAM_STORED_REAL;
using Value = GPU_ADAM_VALUE;
using Real = GPU_ADAM_REAL;
using Gradient = GPU_ADAM_GRADIENT;

constexpr bool ROUNDS = sizeof(Stored) < sizeof(Wide);  // theta, when it is stored

template <typename Memory>
__device__ inline Value value(Memory x) { return Converted<Value>::from(x); }
__device__ inline Real real(StoredReal x) { return Converted<Real>::from(x); }

// A number in [0, 1], rounded once to Real, as a product: 1 / x of float's largest numbers x is denormal. `first` is 1, or
// 2^-64 where the number is below 2^-62: by either an element is multiplied exactly, or it is too small to count.
struct Factor {
    static constexpr bool SPLIT = sizeof(Real) == sizeof(float);
    Real first, second;

    __device__ explicit Factor(double x) {
        const bool tiny = SPLIT && x < 0x1p-62;
        first = real(static_cast<StoredReal>(tiny ? 0x1p-64 : 1.0));
        second = real(static_cast<StoredReal>(tiny ? x * 0x1p64 : x));
    }
};

template <typename Number>
__device__ inline Number operator*(Number x, const Factor& factor) {
    if constexpr (Factor::SPLIT) x = x * factor.first;
    return x * factor.second;
}
