// Adam for one element: the equations, and no memory.
//
// Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015 (arXiv:1412.6980): Algorithm 1, in the order of
// computation that the end of its section 2 gives, with "epsilon hat":
//
//     m_t     = m_{t-1} + (g - m_{t-1}) (1 - beta_1)
//     v_t     = v_{t-1} + (g^2 - v_{t-1}) (1 - beta_2)
//     alpha_t = alpha sqrt(1 - beta_2^t) / (1 - beta_1^t)                      once per step, on the host
//     theta_t = theta_{t-1} - alpha_t m_t / (sqrt(v_t) + epsilon)
//
// AMSGrad: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", ICLR 2018 (arXiv:1904.09237), Algorithm 2:
//
//     vhat_t  = max(vhat_{t-1}, v_t)                                           and takes the place of v_t in theta_t
//
// Around them, in this order:
//
//     g      <- unscale g                         1 / (the scale of the loss), before g is clipped
//     g      <- sign g                            -1 to maximize, else 1
//     g      <- g + l2 theta                      the gradient of l2/2 |theta|^2, as torch.optim.Adam's weight_decay
//     theta  <- theta decay                       1 - lr weight_decay: AdamW, Loshchilov & Hutter, "Decoupled Weight
//                                                 Decay Regularization", ICLR 2019 (arXiv:1711.05101), Algorithm 2
//     average_t = momentum average_{t-1} + (1 - momentum) theta_t              of the updated theta
//
// In a kernel with the first four of them, unscale, sign and decay are 1.0 where they are not asked for, which changes
// no bit. 0.0 is not neutral for l2 (0 times infinity is NaN): that term is left out by a condition, the same for all
// elements.
//
// A variable of 16 bits is updated in float. Its master is theta_t before it is rounded, from which the next step goes
// on; without one the next step goes on from the rounded theta_t, of which the average then is.
//
// Kernels that accumulate gradients over several calls have another line in place of all of these:
//
//     theta_t = theta_{t-1} + unscale g           theta_t = unscale g where decay is 0
//
// The order of the operations, each rounded once, is that of tf.keras.optimizers.Adam: every device gives Keras' bits.
#pragma once
#include "noise.cuh"
#include "slots.cuh"

// The scalars of one step, computed on the host. Mirrored by gpu_adam.kernels.step_scalars.
struct StepScalars {
    unsigned long long noise;     // of the optimizer's seed and t (noise.cuh)
    StoredReal alpha;             // alpha_t
    StoredReal one_minus_beta_1;
    StoredReal one_minus_beta_2;
    StoredReal epsilon;           // "epsilon hat"
    StoredReal sign;              // 1, or -1 to maximize
    StoredReal l2;                // 0 where there is none
    StoredReal decay;             // 1 where there is none
    StoredReal momentum;          // of the average
    StoredReal one_minus_momentum;
    StoredReal clip_value;        // bound of |g|, infinity where there is none
    StoredReal unscale;           // 1 where the gradient is as the loss has it
    StoredReal apply;             // 1; 0 for an update that changes nothing, which staged scalars alone may ask for
};

// Whether this kernel has sign, l2 and decay, and whether unscale too. Chosen at compile time, although neutral elements
// change no bit: on the host the first three cost float32 4 to 10 % more instructions, float64 12 to 14 %, complex64 16 to
// 43 %; unscale another 4, 3 and 9 %.
constexpr bool ADJUSTS = GPU_ADAM_ADJUST > 0;
constexpr bool SCALED = GPU_ADAM_ADJUST > 1;

// Whether theta is rounded here, for what follows or by chance, and not where it is stored.
constexpr bool ROUNDS_AT_ONCE = ROUNDS && !MASTER && (EMA || STOCHASTIC || MEASURES);

// The two moving averages.
__device__ inline Value first_moment(Value m, Value g, const StepScalars& step) {
    return m + (g - m) * real(step.one_minus_beta_1);
}
__device__ inline Real second_moment(Real v, Value g, const StepScalars& step) {
    return v + (squared(g) - v) * real(step.one_minus_beta_2);
}

// All but what comes behind the rounding of theta.
// MOVES: false where g is 0 and it is known that the quotient is too small to move theta, and what v will be (replay.cuh).
template <bool MOVES = true>
__device__ inline Element unrounded(Element e, Value g, const StepScalars& step) {
    if constexpr (ACCUMULATES) {
        e.theta = step.decay == 0 ? g : e.theta + g;  // 0 begins a new sum: the old one may be infinite
        return e;
    }
    if constexpr (MASTER) e.theta = e.master;
    const Value before = e.theta;
    if constexpr (ADJUSTS) {
        g = g * real(step.sign);
        if (step.l2 != 0) g = g + e.theta * real(step.l2);
    }
    e.m = first_moment(e.m, g, step);
    if constexpr (ADJUSTS) e.theta = e.theta * real(step.decay);
    if constexpr (MOVES) {
        e.v = second_moment(e.v, g, step);
        Real s = e.v;
        if constexpr (AMSGRAD) s = e.vhat = maximum(e.vhat, e.v);
        e.theta = e.theta - (e.m * real(step.alpha)) / (square_root(s) + real(step.epsilon));
    }
    if constexpr (MEASURES) e.moved = e.theta - before;
    if constexpr (MASTER) e.master = e.theta;
    return e;
}

__device__ inline Element rounded(Element e, unsigned noise) {
    e.rounded = as_stored(e.theta, noise);
    e.theta = value(e.rounded);
    return e;
}

__device__ inline Element averaged(Element e, const StepScalars& step) {
    e.average = e.average * real(step.momentum) + e.theta * real(step.one_minus_momentum);
    return e;
}

template <bool MOVES = true>
__device__ inline Element adam(Element e, Value g, const StepScalars& step, unsigned noise) {
    e = unrounded<MOVES>(e, g, step);
    if constexpr (ROUNDS_AT_ONCE) e = rounded(e, noise);
    if constexpr (EMA) e = averaged(e, step);
    return e;
}

// Whether this kernel clips gradients, and whether by value too. Chosen at compile time, although a factor of 1.0 and an
// infinite bound change no bit: they cost instructions ("dense float32 clip" beside "dense float32" in
// profiling/results/static.json).
constexpr bool CLIPS = GPU_ADAM_CLIP > 0;
constexpr bool BOUNDED = GPU_ADAM_CLIP > 1;

// Unscaled, then clipped by value.
__device__ inline Value bounded(Value g, const StepScalars& step) {
    if constexpr (SCALED) g = g * real(step.unscale);
    if constexpr (BOUNDED) g = clamped(g, real(step.clip_value));
    return g;
}

// Unscaled, clipped by value, then by norm: `factor` is the one that norm.cu computed, which has the equations.
__device__ inline Value clipped(Value g, const StepScalars& step, const Factor& factor) {
    g = bounded(g, step);
    if constexpr (CLIPS) g = g * factor;
    return g;
}

// Where a kernel finds the scalars:
//
//     0  among its arguments
//     1  in device memory, where each replay of a graph can find other ones
//     2  in device memory from the time on that they are written there, which bounds |g| by a number > 0; before, as they
//        were when the graph was captured: in memory at `frozen`, or among the arguments where that is null
//
// Chosen at compile time: an argument is an operand that takes no register. Kernels that chose between 0 and 1 at run time
// took up to 12 registers more; 66 of 224 rows of profiling/static.py were worse by more than 2 %.
constexpr int STAGED = GPU_ADAM_STAGED;

// The scalars of a group; `staged` and `frozen` have those of each group.
__device__ inline StepScalars scalars_of(long long group, const StepScalars& argument, const StepScalars* staged,
                                         const StepScalars* frozen) {
    if constexpr (STAGED == 0) return argument;
    if constexpr (STAGED == 2) {
        if (!(staged->clip_value > 0)) return frozen ? frozen[group] : argument;
    }
    return staged[group];
}
