"""What does recording cost?  value_and_grad of a small perceptron, on the host, beside HIPS autograd.

    python profiling/autodiff.py

Batch 64, layers 64-128-10, tanh, cross-entropy, float32: small enough that the time is mostly that of the calls, not of
the arithmetic.  Both compute the same loss with the same NumPy functions; the gradients are compared first, then the
two are timed in turn, and the best of the rounds counts.  "forward" is the loss alone, on plain arrays.
"""

import os
import platform
import timeit
from collections.abc import Callable
from typing import Any

# Before NumPy is imported: for matrices this small, a second thread costs more than it brings.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import autograd
import autograd.numpy as anp
import numpy as np

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad

ROUNDS, CALLS = 30, 100
TARGET_US = 120


def cross_entropy(np: Any, x: Any, labels: Any, weights: Any) -> Any:
    """The loss, with the functions of numpy or autograd.numpy."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    logits = hidden @ w2 + b2
    return np.mean(np.log(np.sum(np.exp(logits), axis=1)) - np.sum(labels * logits, axis=1))


def main() -> None:
    """Compare, then time."""
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 64), dtype=np.float32)
    labels = np.eye(10, dtype=np.float32)[random.integers(10, size=64)]
    arrays = [random.standard_normal(shape, dtype=np.float32) / 8 for shape in ((64, 128), (128,), (128, 10), (10,))]
    variables = [Variable(array) for array in arrays]
    of_arrays = autograd.value_and_grad(lambda weights: cross_entropy(anp, x, labels, weights))

    def ours() -> Any:
        return value_and_grad(lambda: cross_entropy(np, x, labels, variables), variables)

    def hips() -> Any:
        return of_arrays(arrays)

    def forward() -> Any:
        return cross_entropy(np, x, labels, arrays)

    (value, gradients), (expected, expected_gradients) = ours(), hips()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-7)

    best = fastest({"forward": forward, "gpu_adam": ours, "HIPS autograd": hips})
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    for name, microseconds in best.items():
        print(f"{name:>14}  {microseconds:7.1f} us")
    ratio = best["HIPS autograd"] / best["gpu_adam"]
    print(f"target: at most {TARGET_US} us, and twice as fast as HIPS autograd (here {ratio:.1f} times)")


def fastest(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds per call, best of the rounds; in turn, so that a busy machine slows all alike."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            best[name] = min(best[name], timeit.timeit(contender, number=CALLS) / CALLS * 1e6)
    return best


if __name__ == "__main__":
    main()
