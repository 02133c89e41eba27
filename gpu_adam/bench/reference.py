"""The float64 reference that a kernel must agree with before it is timed: Adam from the paper, on a sample of elements.

    m += (g - m)(1 - beta_1);  v += (|g|^2 - v)(1 - beta_2);  theta -= alpha_t m / (sqrt(v) + epsilon)

The step's scalars are those of the variable's real dtype (1 - float32(0.8) is not 0.2), all else is float64. Gradients
change their size and sign from step to step, v shrinks so that AMSGrad's maximum differs, and epsilon is about sqrt(v):
with usual numbers Adam's first steps are the gradient's sign, and hide a wrong m, v or clip factor.

How far rounding may take a right result is computed beside the values (running error analysis: Higham, Accuracy and
Stability of Numerical Algorithms, 2002, section 3.3), to first order in the unit u, half the distance from 1 to its
successor:

- A sum of n values, each scaled by a clip factor, has the error n u sum |values|. That is a gradient's error; a dense
  gradient has n = 1. (A factor's own error is one of float64; of those variables none is clipped here.)
- An operation adds u times its result to what it makes of its operands' errors. m keeps beta_1 of its error and takes
  1 - beta_1 of the gradient's. So does v of |g|^2, whose error is 2 |g| times the gradient's. The root of v moves most
  towards a smaller v. N / D has the error (dN + |N / D| dD) / (D - dD).
- 1 - beta^t cancels: the error of beta^t, up to 2 u beta^t, is up to 2 u beta / (1 - beta) of the difference.

The reference rounds in float64 where the kernel rounds in its dtype, so that u is the sum of both units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from gpu_adam import kernels
from gpu_adam.bench.inputs import Inputs
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
        self._unit = (_epsilon(real) + _epsilon(np.dtype(np.float64))) / 2
        # What a variable's store adds to the rounding of its last operation.
        self._store = _epsilon(self._inputs.dtype) / 2 if self._workload.dtype in kernels.HALVES else 0.0
        differences = [2 * beta / (1 - beta) + 1 for beta in (BETA_1, BETA_2)]  # 1 - beta^t, relative, in units
        # The root halves what comes with 1 - beta_2^t; root, product and quotient are rounded.
        self._alpha_error = self._unit * (differences[0] + differences[1] / 2 + 3)
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
            g, g_error = self._gradient(k, place)
            if self._workload.complex_mode == "real_imag" and wide is np.complex128:
                parts, errors = self._adam(start.view(np.float64), g.view(np.float64), np.repeat(g_error, 2))
                yield place, parts.view(wide), np.hypot(errors[::2], errors[1::2])
            else:
                yield place, *self._adam(start, g, g_error)

    def _adam(self, theta: np.ndarray, g: np.ndarray, g_error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Theta after all steps, and how far rounding may take it from there."""
        unit, (c1, c2) = self._unit, self._one_minus
        m, v, vhat = np.zeros_like(g), np.zeros(g.shape), np.zeros(g.shape)
        m_error, v_error, vhat_error, theta_error = (np.zeros(g.shape) for _ in range(4))
        powers = [1.0, 1.0]
        for step, factor in enumerate(self._factors):
            clipped = g * (FACTOR**step * factor)
            clipped_error = g_error * abs(FACTOR**step * factor)
            powers = [power * (1 - one_minus) for power, one_minus in zip(powers, self._one_minus, strict=True)]

            change = (clipped - m) * c1
            m = m + change
            m_error = (1 - c1) * m_error + c1 * clipped_error + unit * (2 * np.abs(change) + np.abs(m))

            square = np.square(clipped.real) + np.square(clipped.imag)
            square_error = (2 * np.abs(clipped) + clipped_error) * clipped_error + 2 * unit * square
            change = (square - v) * c2
            v = v + change
            v_error = (1 - c2) * v_error + c2 * square_error + unit * (2 * np.abs(change) + v)
            vhat, vhat_error = (
                (np.maximum(vhat, v), np.maximum(vhat_error, v_error)) if self._workload.amsgrad else (v, v_error)
            )

            root = np.sqrt(vhat)
            divisor = root + self._epsilon
            divisor_error = root - np.sqrt(np.maximum(vhat - vhat_error, 0)) + unit * (root + divisor)
            alpha = self._rate * math.sqrt(1 - powers[1]) / (1 - powers[0])
            update = alpha * m / divisor
            size = np.abs(update)
            update_error = (alpha * m_error + size * divisor_error) / (divisor - divisor_error)
            theta = theta - update
            theta_error += update_error + size * (self._alpha_error + 2 * unit) + (unit + self._store) * np.abs(theta)
        return theta, theta_error

    def _gradient(self, k: int, place: slice) -> tuple[np.ndarray, np.ndarray]:
        """The gradient before clipping, and how far the rounding of its sum and its clipping may take it from there."""
        if not self._workload.indices:
            g = self._inputs.gradient(k).reshape(-1)[place]
            g = g.astype(np.complex128 if g.dtype.kind == "c" else np.float64)
            return g, self._unit * np.abs(g)
        values, indices = self._inputs.values(k), self._inputs.indices(k)
        width = math.prod(values.shape[1:])
        first, last = place.start // width, (place.stop - 1) // width
        inside = (first <= indices) & (indices <= last)
        rows, wide = indices[inside] - first, np.complex128 if values.dtype.kind == "c" else np.float64
        values = values.reshape(len(values), width)[inside].astype(wide)
        count = last - first + 1
        gradient, magnitude = np.zeros((count, width), wide), np.zeros((count, width))
        np.add.at(gradient, rows, values)
        np.add.at(magnitude, rows, np.abs(values))
        error = self._unit * np.bincount(rows, minlength=count)[:, None] * magnitude
        part = slice(place.start - first * width, place.stop - first * width)
        return gradient.reshape(-1)[part], error.reshape(-1)[part]

    def _norm(self) -> float:
        count = len(self._inputs.shapes)
        values = self._inputs.values if self._workload.indices else self._inputs.gradient
        gradients = (values(k).reshape(-1) for k in range(count))
        blocks = itertools.chain.from_iterable((g[i : i + 2**22] for i in range(0, g.size, 2**22)) for g in gradients)
        return math.sqrt(sum(float(np.sum(np.abs(block.astype(np.complex128)) ** 2)) for block in blocks))


def _epsilon(dtype: np.dtype) -> float:
    """Distance from 1 to the next number of a dtype, also one of ml_dtypes'."""
    return float(np.finfo(dtype).eps if dtype.kind in "fc" else ml_dtypes.finfo(dtype).eps)
