"""What does recording cost?  value_and_grad of a small perceptron, on the host, beside HIPS autograd.

    python profiling/autodiff.py

Batch 64, layers 64-128-10, tanh, cross-entropy, float32: small enough that the time is mostly that of the calls, not of
the arithmetic.  Both compute the same loss with the same NumPy functions; the gradients are compared first, then the
two are timed in turn, and the best of the rounds counts.  "by hand" is the gradient written out in NumPy calls: what no
recorder can beat, and what the target is worth on a machine that is slow or busy.
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


def by_hand(x: Any, labels: Any, weights: Any) -> Any:
    """The same loss and its gradients, written out."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    logits = hidden @ w2 + b2
    exponentials = np.exp(logits)
    sums = np.sum(exponentials, axis=1)
    value = np.mean(np.log(sums) - np.sum(labels * logits, axis=1))
    of_logits = (exponentials / sums[:, None] - labels) / len(x)
    of_hidden = (of_logits @ w2.T) * (1 - hidden * hidden)
    return value, [x.T @ of_hidden, of_hidden.sum(axis=0), hidden.T @ of_logits, of_logits.sum(axis=0)]


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

    value, gradients = ours()
    assert {gradient.dtype for gradient in gradients} == {np.dtype(np.float32)}
    for expected, expected_gradients in (hips(), by_hand(x, labels, arrays)):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-6)

    best = fastest({"by hand": lambda: by_hand(x, labels, arrays), "gpu_adam": ours, "HIPS autograd": hips})
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
