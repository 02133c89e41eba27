"""The float64 reference that a kernel must agree with before it is timed: Adam from the paper, on a sample of elements.

    m += (g - m)(1 - beta_1);  v += (|g|^2 - v)(1 - beta_2);  theta -= alpha_t m / (sqrt(v) + epsilon)

The step's scalars are those of the variable's real dtype (1 - float32(0.8) is not 0.2), all else is float64. Gradients
change their size and sign from step to step, v shrinks so that AMSGrad's maximum differs, and epsilon is about sqrt(v):
with usual numbers Adam's first steps are the gradient's sign, and hide a wrong m, v or clip factor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from gpu_adam import kernels
from gpu_adam.bench.inputs import Inputs, as_dtype
from gpu_adam.bench.workloads import CLIP_NORM

STEPS = 3
FACTOR = -0.125  # of the gradients from one step to the next; a power of two, so that no dtype rounds
LEARNING_RATE = 0.1  # steps that a half-precision theta can see
BETA_1, BETA_2 = 0.8, 0.75
_EPSILON = 0.25
_RANGE = 2**14  # of consecutive elements or rows that are looked at in three places of a large variable


def sampled(size: int) -> list[slice]:
    """The elements that are compared: all of a small variable, the ends and the middle of a large one."""
    if size <= 4 * _RANGE:
        return [slice(0, size)]
    middle = size // 2 - _RANGE // 2
    return [slice(0, _RANGE), slice(middle, middle + _RANGE), slice(size - _RANGE, size)]


class Reference:
    """Expected values of a workload's variables after STEPS steps with the same gradients.

    Args:
        inputs: the set of inputs.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self._workload = inputs, inputs.workload
        real = np.dtype(kernels.DTYPES[self._workload.dtype].real_dtype)
        self._one_minus = [float(real.type(1) - real.type(beta)) for beta in (BETA_1, BETA_2)]
        # alpha_t holds 1 - beta_2^t, which keeps 1 / (1 - beta_2) times less of the real dtype's digits.
        self._update_tolerance = STEPS * LEARNING_RATE * 2 * float(np.finfo(real).eps) / (1 - BETA_2)
        self._rounding = STEPS * _epsilon(as_dtype(self._workload.dtype))
        norm = self._norm() if self._workload.clip else 0.0
        sizes = [abs(FACTOR) ** step for step in range(STEPS)]
        self._factors = [CLIP_NORM / max(norm * size, CLIP_NORM) if norm else 1.0 for size in sizes]
        epsilon = _EPSILON * self._factors[0]
        self.hyperparameters = {"epsilon": epsilon, "learning_rate": LEARNING_RATE, "beta_1": BETA_1, "beta_2": BETA_2}
        self._rate, self._epsilon = float(real.type(LEARNING_RATE)), float(real.type(epsilon))

    def parts(self, k: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(which elements, expected, tolerance) for the sampled parts of variable `k`, seen as one-dimensional."""
        theta = self._inputs.theta(k).reshape(-1)
        for place in sampled(theta.size):
            wide = np.complex128 if theta.dtype.kind == "c" else np.float64
            start = theta[place].astype(wide)
            g = self._gradient(k, place).astype(wide)
            if self._workload.complex_mode == "real_imag" and wide is np.complex128:
                expected = self._adam(start.view(np.float64), g.view(np.float64)).view(wide)
            else:
                expected = self._adam(start, g)
            yield place, expected, self._update_tolerance + self._rounding * np.abs(expected)

    def _adam(self, theta: np.ndarray, g: np.ndarray) -> np.ndarray:
        m, v, vhat = np.zeros_like(g), np.zeros(g.shape), np.zeros(g.shape)
        powers = [1.0, 1.0]
        for step, factor in enumerate(self._factors):
            clipped = g * (FACTOR**step * factor)
            powers = [power * (1 - one_minus) for power, one_minus in zip(powers, self._one_minus, strict=True)]
            m = m + (clipped - m) * self._one_minus[0]
            v = v + (np.abs(clipped) ** 2 - v) * self._one_minus[1]
            vhat = np.maximum(vhat, v) if self._workload.amsgrad else v
            alpha = self._rate * math.sqrt(1 - powers[1]) / (1 - powers[0])
            theta = theta - alpha * m / (np.sqrt(vhat) + self._epsilon)
        return theta

    def _gradient(self, k: int, place: slice) -> np.ndarray:
        if not self._workload.indices:
            return self._inputs.gradient(k).reshape(-1)[place]
        values, indices = self._inputs.values(k), self._inputs.indices(k)
        width = math.prod(values.shape[1:])
        first, last = place.start // width, (place.stop - 1) // width
        inside = (first <= indices) & (indices <= last)
        wide = np.complex128 if values.dtype.kind == "c" else np.float64
        gradient = np.zeros((last - first + 1, width), wide)
        np.add.at(gradient, indices[inside] - first, values.reshape(len(values), width)[inside].astype(wide))
        return gradient.reshape(-1)[place.start - first * width : place.stop - first * width]

    def _norm(self) -> float:
        count = len(self._inputs.shapes)
        gradients = (self._inputs.gradient(k).reshape(-1) for k in range(count))
        blocks = itertools.chain.from_iterable((g[i : i + 2**22] for i in range(0, g.size, 2**22)) for g in gradients)
        return math.sqrt(sum(float(np.sum(np.abs(block.astype(np.complex128)) ** 2)) for block in blocks))


def _epsilon(dtype: np.dtype) -> float:
    """Distance from 1 to the next number of a dtype, also one of ml_dtypes'."""
    return float(np.finfo(dtype).eps if dtype.kind in "fc" else ml_dtypes.finfo(dtype).eps)
