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
// The order of the operations, each rounded once, is that of tf.keras.optimizers.Adam: every device gives its bits.
#pragma once
#include "numbers.cuh"

// The scalars of one step, by value. Mirrored by gpu_adam.kernels.STEP.
struct Step {
    StoredReal alpha;             // alpha_t
    StoredReal one_minus_beta_1;
    StoredReal one_minus_beta_2;
    StoredReal epsilon;
    StoredReal clip_value;        // bound of |g|, infinity where there is none
};

struct Element {
    Value theta;
    Value m;
    Real v;
    Real vhat;  // with AMSGrad only
};

__device__ inline Element adam(Element e, Value g, const Step& step) {
    e.m = e.m + (g - e.m) * real(step.one_minus_beta_1);
    e.v = e.v + (squared(g) - e.v) * real(step.one_minus_beta_2);
#if GPU_ADAM_AMSGRAD
    e.vhat = maximum(e.vhat, e.v);
    const Real second_moment = e.vhat;
#else
    const Real second_moment = e.v;
#endif
    e.theta = e.theta - (e.m * real(step.alpha)) / (square_root(second_moment) + real(step.epsilon));
    return e;
}

// Whether gradients are clipped by value: the same for all elements of a step.
__device__ inline bool bounded(const Step& step) { return GPU_ADAM_CLIP && step.clip_value - step.clip_value == 0; }

// Clip by value, then by norm: `factor` is the one that norm.cu computed, which has the equations. Compiled out where
// nothing is clipped.
template <bool BOUNDED>
__device__ inline Value clipped(Value g, const Step& step, double factor) {
#if GPU_ADAM_CLIP
    return scaled(BOUNDED ? clamped(g, real(step.clip_value)) : g, factor);
#else
    return g;
#endif
}
