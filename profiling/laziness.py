"""What does it cost to leave rows without a gradient alone? The demo of words by Adam, and by the Adam that does so.

    python profiling/laziness.py                  2000 steps; writes results/laziness.json and results/laziness.png
    python profiling/laziness.py --steps 200 --results FOLDER

It is trained three times, from the same initial vectors and by the same batches: with `sparse_update="dense"` and
`"deferred"` of Adam, whose losses must not differ in any bit, and with `LazyAdam`. Then both are trained at other rates
too: a row that moves less often may want a higher one.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.demos.words import RATE, Words, rate

RESULTS = Path(__file__).parent / "results"
MEAN = 40
"""Steps of one number of a curve: a batch's loss depends on the batch more than on the optimizer."""
RATES = (0.005, 0.01, 0.02, 0.03, 0.05)
LAST = 5
"""Numbers of a curve whose mean is its last loss."""
LAZY = "lazy"


class LazyAdam:
    """Adam that moves rows with a gradient alone, moments included, however many steps they have missed.

    For each row r of a gradient's indices, with g the sum of its values for that row, t the step and η its rate:

        α    = η sqrt(1 - β₂^t) / (1 - β₁^t)
        m[r] = β₁ m[r] + (1 - β₁) g          v[r] = β₂ v[r] + (1 - β₂) g²
        θ[r] = θ[r] - α m[r] / (sqrt(v[r]) + ε)

    Args:
        rate: η, by the number of steps done before.
        variables: float32 in host memory.

    Reference: `LazyAdam._resource_apply_sparse` of TensorFlow Addons 0.23,
    https://github.com/tensorflow/addons/blob/v0.23.0/tensorflow_addons/optimizers/lazy_adam.py
    """

    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7

    def __init__(self, rate: Callable[[int], float], variables: Iterable[gpu_adam.Variable]) -> None:
        self._rate, self._step = rate, 0
        self._moments = {id(v): (np.zeros(v.shape, np.float32), np.zeros(v.shape, np.float32)) for v in variables}

    def apply_gradients(self, pairs: Iterable[tuple[gpu_adam.IndexedSlices, gpu_adam.Variable]]) -> None:
        """Do one step."""
        rate, self._step = self._rate(self._step), self._step + 1
        alpha = np.float32(rate * np.sqrt(1 - self.beta_2**self._step) / (1 - self.beta_1**self._step))
        for gradient, variable in pairs:
            (m, v), theta = self._moments[id(variable)], variable.value
            rows, which = np.unique(gradient.indices, return_inverse=True)
            g = np.zeros((len(rows), *theta.shape[1:]), np.float32)
            np.add.at(g, which, gradient.values)
            m[rows] += (g - m[rows]) * np.float32(1 - self.beta_1)
            v[rows] += (g * g - v[rows]) * np.float32(1 - self.beta_2)
            theta[rows] -= alpha * m[rows] / (np.sqrt(v[rows]) + np.float32(self.epsilon))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write the curves and their picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Words.default_steps, help=f"a multiple of {MEAN}")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    gpu_adam.set_device("host")
    trained = {sparse: losses(sparse, options.steps) for sparse in ("dense", "deferred", LAZY)}
    if trained["dense"].tobytes() != trained["deferred"].tobytes():
        raise SystemExit("the losses of dense and deferred updates differ")
    found = {
        "facts": f"gpu_adam {gpu_adam.__version__}, NumPy {np.__version__}, text of Python {platform.python_version()}",
        "steps": np.arange(MEAN, options.steps + 1, MEAN).tolist(),
        "losses": {sparse: curve(each) for sparse, each in trained.items()},
        "rates": RATES,
        "last losses": {
            sparse: [last(curve(losses(sparse, options.steps, begin))) for begin in RATES] for sparse in ("dense", LAZY)
        },
    }
    (options.results / "laziness.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, options.results / "laziness.png")
    print(cost(found))


def losses(sparse: str, steps: int, begin: float = RATE) -> np.ndarray:
    """The loss of each step's batch before the step, [steps], float32.

    Args:
        sparse: "dense" or "deferred", of Adam, or LAZY.
        steps: how many.
        begin: the rate of the first one.
    """
    demo = Words() if sparse == LAZY else Words(sparse=sparse)
    demo.optimizer.learning_rate = rate(Words.default_steps, begin)
    if sparse == LAZY:
        lazy = LazyAdam(rate(Words.default_steps, begin), demo.variables)
        demo.optimizer = lazy  # type: ignore[assignment]  # which can do what a step of the demo asks
    found = np.empty(steps, np.float32)
    for step in range(steps):
        demo.train()
        found[step] = demo.measure().loss
    return found


def curve(each: np.ndarray) -> list[float]:
    """Means of MEAN steps."""
    means: list[float] = each.reshape(-1, MEAN).mean(1, dtype=np.float64).tolist()
    return means


def last(numbers: Sequence[float]) -> float:
    """Where a curve ends."""
    return float(np.mean(numbers[-LAST:]))


def cost(found: Mapping[str, Any]) -> str:
    """Where the lazy curve ends, and when the exact one was there; the same of the best of all rates."""
    exact, lazy = (found["losses"][sparse] for sparse in ("deferred", LAZY))
    there = found["steps"][next(number for number, loss in enumerate(exact) if loss <= lazy[-1])]
    best = [min(found["last losses"][sparse]) for sparse in ("dense", LAZY)]
    return (
        f"last loss {last(exact):.3f}, lazy {last(lazy):.3f}; at the best rates {best[0]:.3f}, lazy {best[1]:.3f}\n"
        f"the lazy curve ends where the exact one is after {there} of {found['steps'][-1]} steps"
    )


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the curves of a result into a PNG file."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (optional: extra `demo`)

    figure = Figure(figsize=(10, 3.4), dpi=110, layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(2, 1))
    for sparse, label, look in (
        ("dense", "all rows move at every step (dense)", {"color": "tab:blue", "linewidth": 5, "alpha": 0.35}),
        ("deferred", "rows catch up when they are needed (deferred)", {"color": "tab:blue", "linewidth": 1.2}),
        (LAZY, "rows without a gradient stay as they are (LazyAdam)", {"color": "tab:orange"}),
    ):
        curves.plot(found["steps"], found["losses"][sparse], label=label, **look)
    end = last(found["losses"]["dense"])
    curves.set(title=f"word vectors, at the rate {RATE:g}", xlabel="step", ylabel=f"loss (mean of {MEAN} steps)")
    curves.set(xlim=(0, found["steps"][-1]), ylim=(end - 0.05, end + 0.75))
    curves.legend()
    for sparse, label, colour in (("dense", "dense, deferred", "tab:blue"), (LAZY, "LazyAdam", "tab:orange")):
        ends.plot(found["rates"], found["last losses"][sparse], "o-", label=label, color=colour)
    ends.set(title="at other rates", xlabel="rate of the first step", ylabel="loss at the end", xscale="log")
    ends.set_xticks(found["rates"], [f"{rate:g}" for rate in found["rates"]], minor=False)
    ends.minorticks_off()
    ends.legend()
    for axis in (curves, ends):
        axis.grid(alpha=0.3)
    figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
