"""The oracle: Adam and AMSGrad in plain NumPy, in the order of operations of Kingma & Ba, each rounded in one dtype.

Shares no code with gpu_adam. Dense gradients; denormals are flushed, as the kernels do. float32 and float64; float16
and bfloat16 in float32, rounded once, when a variable or slot is stored.
"""

import ctypes
import ctypes.util
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_powf = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6").powf
_powf.argtypes, _powf.restype = (ctypes.c_float, ctypes.c_float), ctypes.c_float


class Adam:
    """Variables with their m, v and vhat, and the steps they take.

    Args:
        initial: the variables' first values; copied.
        learning_rate, beta_1, beta_2, epsilon, decay: Python numbers; may be changed between steps.
        amsgrad: whether vhat takes the place of v.
        iterations: steps done before.
        weight_decay, l2, maximize, paper, ema: what the keywords of gpu_adam.Adam add; `paper` for the paper's form of
            epsilon, `ema` the momentum of the averages.
        slot_dtype: of m, v and vhat; default: the one that is computed in.
        masters: whether steps go on from what a variable was before it was rounded.
    """

    def __init__(
        self,
        initial: Sequence[Any],
        learning_rate: float = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        decay: float = 0.0,
        iterations: int = 0,
        *,
        weight_decay: float = 0.0,
        l2: float = 0.0,
        maximize: bool = False,
        paper: bool = False,
        ema: float | None = None,
        slot_dtype: Any = None,
        masters: bool = False,
    ) -> None:
        self.variables: list[Array] = [np.array(value) for value in initial]
        self.masters = [widened(variable) for variable in self.variables] if masters else None
        slots = [np.zeros_like(widened(variable), slot_dtype) for variable in self.variables]
        self.m, self.v, self.vhat = ([slot.copy() for slot in slots] for _ in range(3))
        self.learning_rate, self.beta_1, self.beta_2, self.epsilon = learning_rate, beta_1, beta_2, epsilon
        self.amsgrad, self.decay, self.iterations = amsgrad, decay, iterations
        self.weight_decay, self.l2, self.maximize, self.paper, self.ema = weight_decay, l2, maximize, paper, ema
        self.average = [widened(variable) for variable in self.variables]

    def step(self, gradients: Iterable[Any]) -> None:
        """One step with a gradient for each variable, or None."""
        self.step_pairs((gradient, k) for k, gradient in enumerate(gradients) if gradient is not None)

    def step_pairs(self, pairs: Iterable[tuple[Any, int]]) -> None:
        """One step with (gradient, number of the variable) pairs, in order."""
        with np.errstate(all="ignore"):
            for gradient, k in pairs:
                self._update(k, np.asarray(gradient))
        self.iterations += 1

    def _update(self, k: int, g: Array) -> None:
        kept, slot = self.variables[k].dtype, self.m[k].dtype
        theta = self.variables[k] if self.masters is None else self.masters[k]
        g, theta, m, v = (flushed(widened(x)) for x in (g, theta, self.m[k], self.v[k]))
        real = theta.dtype.type
        one, beta_1, beta_2 = real(1), real(self.beta_1), real(self.beta_2)
        g = -g if self.maximize else g
        if self.l2:
            g = flushed(g + flushed(theta * real(self.l2)))
        m = flushed(m + flushed(flushed(g - m) * (one - beta_1)))
        v = flushed(v + flushed(flushed(flushed(g * g) - v) * (one - beta_2)))
        self.m[k], self.v[k] = m.astype(slot), v.astype(slot)
        if self.amsgrad:
            vhat = widened(self.vhat[k])
            v = np.where(vhat < v, v, vhat)
            self.vhat[k] = v.astype(slot)
        epsilon = real(self.epsilon) * self._root(real) if self.paper else real(self.epsilon)
        divisor = flushed(flushed(np.sqrt(v)) + flushed(epsilon))
        if self.weight_decay:
            rate = float(self.learning_rate) / (1 + self.decay * self.iterations)
            theta = flushed(theta * real(1 - rate * self.weight_decay))
        theta = flushed(theta - flushed(flushed(m * flushed(self._alpha(real))) / divisor))
        self.variables[k] = theta.astype(kept)
        if self.masters is not None:
            self.masters[k] = theta
        else:
            theta = widened(self.variables[k])
        if self.ema is not None:
            old = flushed(flushed(self.average[k]) * real(self.ema))
            self.average[k] = flushed(old + flushed(theta * real(1 - self.ema)))

    def _root(self, real: Any) -> Any:
        power = _powf if real is np.float32 else math.pow
        return np.sqrt(real(1) - real(power(real(self.beta_2), float(self.iterations + 1))))

    def _alpha(self, real: Any) -> Any:
        """(lr sqrt(1 - beta_2^t)) / (1 - beta_1^t), by the C library's power functions."""
        power = _powf if real is np.float32 else math.pow
        one, t = real(1), float(self.iterations + 1)
        rate = real(self.learning_rate)
        if self.decay > 0:
            rate = rate / (one + real(self.decay) * real(self.iterations))
        return (rate * self._root(real)) / (one - real(power(real(self.beta_1), t)))


def widened(x: Any) -> Array:
    """A copy in the dtype that is computed in."""
    copied: Array = np.array(x)
    return copied.astype(np.float32) if copied.dtype.itemsize == 2 else copied


def flushed(x: Any) -> Array:
    """Denormal numbers as zeros of their sign."""
    x = np.asarray(x)
    kept: Array = np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)
    return kept


def densified(values: Any, indices: Any, like: Array) -> Array:
    """The gradient of some rows written out for the whole variable; duplicates are added in order of occurrence."""
    dense = np.zeros_like(like)
    np.add.at(dense, np.asarray(indices, np.int64), values)
    return dense


def clipped_by_norm(gradient: Any, clipnorm: float) -> Array:
    """Return g c / max(|g|, c) in float64."""
    g = np.asarray(gradient, np.float64)
    return g * clipnorm / max(float(np.sqrt(np.sum(g * g))), clipnorm)


def clipped_by_global_norm(gradients: Sequence[Any], clipnorm: float) -> list[Array]:
    """Return g c / max(n, c) in float64, with one norm n over all gradients."""
    doubles = [np.asarray(gradient, np.float64) for gradient in gradients]
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in doubles))
    return [g * clipnorm / max(norm, clipnorm) for g in doubles]


def assert_same_bits(actual: Any, expected: Any, what: str = "array") -> None:
    """Same dtype, shape and bits, but that every NaN is as good as another; says where they differ first."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    a, b = _bytes(actual), _bytes(expected)
    unequal = (a != b).any(axis=1) & ~(_is_nan(actual) & _is_nan(expected))
    if unequal.any():
        first = int(np.argmax(unequal))
        index = list(map(int, np.unravel_index(first, actual.shape)))
        got, wanted = (f"{x.ravel()[first]!r} ({x.ravel()[first].tobytes()[::-1].hex()})" for x in (actual, expected))
        raise AssertionError(f"{what}{index}: {got}, expected {wanted}; {int(unequal.sum())} of {unequal.size} differ")


def _bytes(x: Array) -> Array:
    return np.frombuffer(x.tobytes(), np.uint8).reshape(x.size, x.dtype.itemsize)


def _is_nan(x: Array) -> Array:
    return np.zeros(x.size, bool) if x.dtype.kind in "biu" else np.isnan(np.ravel(x))
