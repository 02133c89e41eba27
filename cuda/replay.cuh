// Steps that a row has missed, made up for in registers: the same operations in the same order as if each step had moved
// the row with a gradient of zeros, hence the same bits. deferred.md has the mathematics at length.
//
// With g = 0 a step is, each operation rounded:
//
//     m     <- m + (0 - m) c1                     c1 = 1 - beta_1, c2 = 1 - beta_2, both in (0, 1]
//     v     <- v + (0 - v) c2
//     theta <- theta decay - (m alpha) / (sqrt(s) + epsilon)          s = v, or vhat <- max(vhat, v)
//
// 1. v does not depend on m and theta: it is computed first, for all missed steps. For c2 in (0, 1] rounding, which is
//    monotone, keeps v from growing, so that this last v is a lower bound of every v on the way. (vhat does not change after
//    the first missed step: v does not grow, so vhat >= every later v.) A v that is rounded to 16 bits when it is stored may
//    be more than the v that moves theta, by 2^-8 of it at most: half of the stored one is the bound then.
// 2. The full recurrence, until theta cannot change any more. |m| does not grow either. With A the largest |alpha| and E
//    the smallest epsilon of all logged steps, and s the bound of point 1, every later quotient is, all roundings and
//    flushes being monotone, at most
//
//        Q = (|m| A) / (sqrt(s) + E)              computed by the same operations
//
//    theta - q rounds to theta where |q| <= 2^-25 |theta| (float64: 2^-54): half of the distance to the nearer neighbour,
//    and a tie goes to theta, whose mantissa is even where that neighbour is the nearer one. Where Q is below the smallest
//    normal number, every q is a zero, which changes no theta but -0.
//    With decay |theta| shrinks to not less than |theta| (1 - n (1 - d)) (1 - 2^-24)^n in the n steps that are left, d
//    being the smallest decay: then half of the bound, for this number, is asked for (n is below 2^21: max_deferral). A
//    theta of 16 bits without master
//    is rounded in each step, may lose more than that, and goes through the full recurrence.
// 3. m (with theta decay and the average, where there are such), until it stands still: m does not reach 0 but stops where
//    the product m c1 is flushed, near 2^-126 / c1. v stops, too, near 2^-126 / c2.
//
// With replay="closed_form" point 1 is v (1 - c2)^n, a product in float64 that is rounded once, the same on every device:
// where beta_2 was the same in all n steps, v has the variable's precision, and the product stays above the place where v
// stands still. It differs from the recurrence by the roundings of that, and half of it is the lower bound.
//
// NaN and infinities make these comparisons false, and go through the full recurrence. So does l2: its gradient is not 0.
//
// A strip has consecutive elements of one row, as a thread of a GPU, or in the host's fast mode of several short rows, so
// that points 1 and 3 are vector code across rows: their steps are counted from each row's first missed one, and a row that
// missed fewer waits for the others.
#pragma once
#include "memory.cuh"

// A step in the log of a variable. The others' numbers are of this step and all before. Mirrored by
// gpu_adam.kernels.logged_step.
struct LoggedStep {
    StepScalars scalars;
    StoredReal largest_alpha;     // of their absolute values
    StoredReal smallest_epsilon;
    StoredReal smallest_decay;    // at most 1
    int decays;                   // whether some decay is not 1
    int penalized;                // whether some l2 is not 0
    long long steady_since;       // from this entry on beta_1 and beta_2 are what they are now
};

// The steps since all rows of a variable were last up to date. Steps that were left out are not among them. Mirrored by
// gpu_adam.kernels.STEP_LOG.
struct StepLog {
    long long count;
    unsigned long long blocks;  // of a launch that is at work, which are done
    LoggedStep* steps;
};

constexpr int STRIP_SIZE = GPU_ADAM_ONE_THREAD ? GPU_ADAM_REPLAYED / int{sizeof(StoredReal)} : PACK;  // its elements
constexpr int STRIP_ROWS = GPU_ADAM_ONE_THREAD ? STRIP_SIZE : 1;        // rows, at most
constexpr int PATIENCE = 16;                                       // steps between two looks whether theta still moves
constexpr int LONG_PATIENCE = 64;                                  // the same of a moment, whose steps are short
constexpr bool SLOTS_ROUND = sizeof(SlotReal) < sizeof(StoredReal);  // v, when it is stored
constexpr bool WIDE_REAL = sizeof(Real) == sizeof(double);

__device__ inline bool is_minus_zero(float x) { return __float_as_uint(x) == 0x80000000u; }
__device__ inline bool is_minus_zero(Double x) { return __double_as_longlong(x.x) == static_cast<long long>(1ULL << 63); }
__device__ inline bool is_plus_zero(float x) { return __float_as_uint(x) == 0; }
__device__ inline bool is_plus_zero(Double x) { return __double_as_longlong(x.x) == 0; }
__device__ inline bool equal(float a, float b) { return a == b; }
__device__ inline bool equal(Double a, Double b) { return a.x == b.x; }
template <typename T>
__device__ inline bool equal(Complex<T> a, Complex<T> b) { return equal(a.re, b.re) && equal(a.im, b.im); }

// The rows of a strip, and which steps each has missed. Lanes without an element are zeros.
struct StripRows {
    int rows;                  // > 0
    int columns;               // lanes of each
    long long from[STRIP_ROWS];  // first missed step of each
    long long now;             // the number of steps in the log

    __device__ int count() const { return STRIP_ROWS == 1 ? 1 : rows; }
    // The lanes of a row; in a strip of one row all of them.
    __device__ int begin(int r) const { return STRIP_ROWS == 1 ? 0 : r * columns; }
    __device__ int end(int r) const { return STRIP_ROWS == 1 ? STRIP_SIZE : (r + 1) * columns; }
};

// What point 2 compares with.
struct Bounds {
    Real alpha, epsilon, share, smallest;
    bool decays;

    // Of the steps of a log that are left, `left` of them, for rows that miss them all.
    __device__ Bounds(const LoggedStep& last, long long left) {
        alpha = real(last.largest_alpha);
        epsilon = real(last.smallest_epsilon);
        decays = ADJUSTS && last.decays;
        double kept = 1;
        if (decays) kept = ROUNDS && !MASTER ? 0 : (1 - left * (1 - static_cast<double>(last.smallest_decay))) / 2;
        if (!(kept > 0) || (ADJUSTS && last.penalized)) kept = 0;
        share = real(static_cast<StoredReal>(kept * (WIDE_REAL ? 0x1p-54 : 0x1p-25)));
        smallest = real(static_cast<StoredReal>(kept > 0 ? (WIDE_REAL ? 0x1p-1022 : 0x1p-126) : 0));
    }

    // Whether theta stays, but for its decay, whatever of these steps comes. No && and ||: branches are no vector code.
    __device__ bool keep(Real theta, Real m, Real divisor) const {
        const Real quotient = (magnitude(m) * alpha) / divisor;
        const bool is_small = quotient < magnitude(theta) * share;
        return is_small | ((quotient < smallest) & (decays ? is_plus_zero(theta) : !is_minus_zero(theta)));
    }
    template <typename T>
    __device__ bool keep(Complex<T> theta, Complex<T> m, Real divisor) const {
        return keep(theta.re, m.re, divisor) & keep(theta.im, m.im, divisor);
    }
};

// Let lanes [begin, end) take a step, with a gradient that is given for each lane.
template <bool MOVES, typename Source>
__device__ __forceinline__ void step_lanes(SlotPacks<STRIP_SIZE>& packs, int begin, int end, const StepScalars& step,
                                           unsigned long long noise, long long first, Source gradient) {
    const StepScalars own = step;
#pragma unroll
    GPU_ADAM_INDEPENDENT
    for (int k = begin; k < end; ++k) {
        Element e = {};
#define READ(slot, Memory, Register, present) \
    if constexpr (present) e.slot = Converted<Register>::from(packs.slot.x[k]);
        GPU_ADAM_SLOTS(READ)
#undef READ
        e = adam<MOVES>(e, gradient(k), own, noise_at(noise, first, k - begin));
#define WRITE(slot, Memory, Register, present) \
    if constexpr (present) store(packs.slot.x[k], e.slot);
        GPU_ADAM_SLOTS(WRITE)
#undef WRITE
    }
}

// A moment x after a step with a gradient of zeros: x + (0 - x) c to the bit, for (0 - x) c is -(x c), flushed or not, and
// a zero becomes +0 either way.
template <typename T>
__device__ inline T decayed(T x, Real c) { return x - x * c; }

// Let one moment of every lane decay so many times, `most` at most, all of a strip `least`; until no lane moves.
template <typename Register, typename Memory>
__device__ __forceinline__ void decay_together(Pack<Memory, STRIP_SIZE>& slot, const int* left, int least, int most, Real c) {
    for (int i = 0; i < most;) {
        int moving = 0;
#pragma unroll
        GPU_ADAM_INDEPENDENT
        for (int k = 0; k < STRIP_SIZE; ++k) {
            Memory next = slot.x[k];
            const Register before = Converted<Register>::from(next);
            store(next, decayed(before, c));
            const bool takes = STRIP_ROWS == 1 || i < left[k];
            moving |= takes && !equal(before, Converted<Register>::from(next));
            slot.x[k] = takes ? next : slot.x[k];
        }
        if (!moving) return;
        ++i;
        const int end = i + LONG_PATIENCE < most ? i + LONG_PATIENCE : most;
        for (; i < end && (STRIP_ROWS == 1 || i < least); ++i) {
#pragma unroll
            GPU_ADAM_INDEPENDENT
            for (int k = 0; k < STRIP_SIZE; ++k) store(slot.x[k], decayed(Converted<Register>::from(slot.x[k]), c));
        }
        for (; i < end; ++i) {
#pragma unroll
            GPU_ADAM_INDEPENDENT
            for (int k = 0; k < STRIP_SIZE; ++k) {
                Memory next = slot.x[k];
                store(next, decayed(Converted<Register>::from(next), c));
                slot.x[k] = i < left[k] ? next : slot.x[k];
            }
        }
    }
}

__device__ inline double wide(float x) { return x; }
__device__ inline double wide(Double x) { return x.x; }

// base^n by squaring: the same operations on every device.
__device__ inline double power(double base, int n) {
    double product = 1;
    for (; n > 0; n /= 2, base = base * base) {
        if (n % 2) product = product * base;
    }
    return product;
}

// v after each lane's steps as one product. False, and nothing done, where some v comes near to where it stands still.
__device__ inline bool advance_at_once(Pack<SlotReal, STRIP_SIZE>& v, const StripRows& rows, const StepScalars& step) {
    constexpr double FEW = WIDE_REAL ? 0x1p-960 : 0x1p-100;
    auto next = v;
    bool fits = true;
#pragma unroll 1
    for (int r = 0; r < rows.count(); ++r) {
        const double kept = power(1 - static_cast<double>(step.one_minus_beta_2), static_cast<int>(rows.now - rows.from[r]));
#pragma unroll
        for (int k = rows.begin(r); k < rows.end(r); ++k) {
            const double x = wide(Converted<Real>::from(v.x[k]));
            fits = fits && (x == 0 || (x * kept > FEW && x - x == 0));
            store(next.x[k], real(static_cast<StoredReal>(x * kept)));
        }
    }
    if (fits) v = next;
    return fits;
}

// How many steps each lane has left, the most and the least, where its row has missed all from `from` on.
__device__ inline int count_left(const StripRows& rows, int* left, int& least) {
    int most = 0;
    for (int r = 0; r < rows.count(); ++r) {
        const int missed = static_cast<int>(rows.now - rows.from[r]);
        if (missed > most) most = missed;
        if (r == 0 || missed < least) least = missed;
        for (int k = 0; STRIP_ROWS > 1 && k < rows.columns; ++k) left[r * rows.columns + k] = missed;
    }
    return most;
}

// Let every row take the steps that it has missed. `firsts` are the indices of the rows' first elements in the variable.
__device__ inline void replay(SlotPacks<STRIP_SIZE>& packs, StripRows& rows, const long long* firsts, const LoggedStep* log,
                              long long place, bool at_once) {
    if constexpr (ACCUMULATES) return;
    alignas(64) int left[STRIP_ROWS > 1 ? STRIP_SIZE : 1] = {};
    int least = 0;
    int most = count_left(rows, left, least);
    if (most == 0) return;
    const LoggedStep& last = log[rows.now - 1];
    bool steady = true;
    for (int r = 0; r < rows.count(); ++r) steady = steady && rows.from[r] >= last.steady_since;

    const auto zero = [](int) { return value(Gradient{}); };
    const bool is_free = !(ADJUSTS && last.penalized);  // v, of theta
    auto v = packs.v;  // as it is going to be
    at_once = at_once && is_free && steady && !SLOTS_ROUND;
    if (at_once) at_once = advance_at_once(v, rows, last.scalars);
    if (!is_free || at_once) {
        // The full recurrence has it, or it is there.
    } else if (steady) {
        decay_together<Real>(v, left, least, most, real(last.scalars.one_minus_beta_2));
    } else {
        for (int r = 0; r < rows.count(); ++r) {
            const int begin = rows.begin(r), end = rows.end(r);
            for (long long t = rows.from[r]; t < rows.now; ++t) {
                const StepScalars step = log[t].scalars;
#pragma unroll
                GPU_ADAM_INDEPENDENT
                for (int k = begin; k < end; ++k) {
                    store(v.x[k], second_moment(Converted<Real>::from(v.x[k]), value(Gradient{}), step));
                }
            }
        }
    }

    for (int r = 0; r < rows.count(); ++r) {
        const int begin = rows.begin(r), end = rows.end(r);
        long long& t = rows.from[r];
        for (int few = 1; t < rows.now; few = PATIENCE) {
            for (const long long until = t + few < rows.now ? t + few : rows.now; t < until; ++t) {
                const StepScalars& step = log[t].scalars;
                step_lanes<true>(packs, begin, end, step, noise_of(step.noise, place), firsts[r], zero);
            }
            const Bounds bounds(last, rows.now - t);
            int keeps = 1;
#pragma unroll
            GPU_ADAM_INDEPENDENT
            for (int k = begin; k < end; ++k) {
                Real s = Converted<Real>::from(v.x[k]);
                if constexpr (AMSGRAD) s = Converted<Real>::from(packs.vhat.x[k]);
                if (at_once || (!AMSGRAD && SLOTS_ROUND)) s = s * real(static_cast<StoredReal>(0.5));
                const Real divisor = square_root(s) + bounds.epsilon;
                Value theta;
                if constexpr (MASTER) {
                    theta = Converted<Value>::from(packs.master.x[k]);
                } else {
                    theta = Converted<Value>::from(packs.theta.x[k]);
                }
                keeps &= bounds.keep(theta, Converted<Value>::from(packs.m.x[k]), divisor);
            }
            if (keeps) break;
        }
    }

    most = count_left(rows, left, least);
    if (steady && !EMA && !(ADJUSTS && last.decays)) {
        decay_together<Value>(packs.m, left, least, most, real(last.scalars.one_minus_beta_1));
    } else {
        for (int r = 0; r < rows.count(); ++r) {
            for (long long t = rows.from[r]; t < rows.now; ++t) {
                const StepScalars& step = log[t].scalars;
                const unsigned long long noise = noise_of(step.noise, place);
                step_lanes<false>(packs, rows.begin(r), rows.end(r), step, noise, firsts[r], zero);
            }
        }
    }
    if (is_free) packs.v = v;
}
